# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A small DC-DiT, made by one command, and judged as the bundled D2iT of the same photographs is.

    python reproduction/small_dcdit.py --data tiny-imagenet-20 --work_dir runs/small-dcdit

Trains by the recipe examples/configs/tiny-imagenet-20-64/dcdit.txt on the latents of the bundled autoencoder; the
pipeline is <work_dir>/run/pipeline. What is finished is not done again, and what was interrupted goes on. `--data` is
a folder with splits train and validation, whose labels are ids of ImageNet.

- Samples of every class under several calls: tokens of an image and step, top-1 accuracy, Frechet distance to the
  validation images, spread of the codes in units of that of the data.
- The averaged model after several lengths of its training, by the measures of dcdit.py: error under two budgets and
  with the boundaries at random places, natural share of the cells by timestep, whether they lie where detail is.

The judge is efficientnet-lite2, which has trained nothing here.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bundled_checkpoint import describe_machine, draw, picture
from dcdit import RESOLUTION, TIMESTEPS, VAE, cache_of, call, measure, measures_table, validation
from PIL import Image
from report import RESULTS, markdown_table
from study import EXAMPLES, write_json

from diffusers_d2it import D2iTPipeline, DCDiTPipeline, bundled_checkpoint, load_features, visualize_boundary_map
from diffusers_d2it.evaluation import Evaluator, ImageSet, open_images
from diffusers_d2it.files import lock
from diffusers_d2it.objectives import FlowMatchingObjective


NAME = "dcdit-tiny-imagenet-20-64"
RECIPE = EXAMPLES / "configs" / "tiny-imagenet-20-64" / "dcdit.txt"
CALLS: dict[str, dict[str, Any]] = {
    "as called by default": {},
    "budget 0.7": {"budget": 0.7},
    "budget 0.4": {"budget": 0.4},
    "0.1 without labels": {"null_budget": 0.1},
    "without guidance": {"guidance_scale": 1.0},
}
COLUMNS = {
    "error, budget 1": ("error", "1"),
    "budget 0.4": ("error", "0.4"),
    "boundaries at random places": ("random",),
    "without the tokens": ("without_tokens",),
    f"natural share, t = {TIMESTEPS[0]}": ("natural_share", 0),
    f"natural share, t = {TIMESTEPS[-1]}": ("natural_share", -1),
    "follows detail": ("detail",),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with splits train and validation")
    parser.add_argument("--work_dir", type=Path, required=True, help="caches and the run are kept here")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000], help="updates; the last are judged"
    )
    parser.add_argument("--num_samples", type=int, default=300, help="of all classes together")
    parser.add_argument("--num_images", type=int, default=200, help="of the validation split, for the lengths")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    return parser.parse_args()


def train(cache: Path, run: Path, lengths: list[int]) -> None:
    """Train a run, with a checkpoint after each of these numbers of updates and a pipeline after the last."""
    flags = [f"@{RECIPE}", "--latent_cache", cache, "--vae", VAE, "--output_dir", run, "--report_to", "none"]
    for steps in lengths:
        # Where the last updates are made it writes the pipeline, if that is all that is missing
        if steps == lengths[-1] or not (run / f"checkpoint-{steps}").exists():
            call("train_dcdit.py", *flags, "--max_train_steps", steps, "--resume_from_checkpoint", "latest")


def judge(pipe: DCDiTPipeline, args: argparse.Namespace, spread: float) -> tuple[dict[str, dict], Image.Image]:
    """Rows by the names of their calls, and a picture of what the default call draws.

    Args:
        spread: standard deviation of the codes of the data.
    """
    features = load_features("efficientnet-lite2")
    evaluator = Evaluator(open_images(args.data, RESOLUTION, "validation"), ["top1", "fid"], features)
    labels = torch.tensor(sorted(pipe.id2label)).repeat_interleave(args.num_samples // len(pipe.id2label))
    rows = {}
    for name, arguments in CALLS.items():
        images, outputs = draw(pipe, labels, args.seed, **arguments)
        tokens = torch.cat([one.token_counts for one in outputs]).float().mean().item()
        deviation = torch.cat([one.images for one in outputs]).std().item()
        found = evaluator(ImageSet.from_tensor(images, name, {"arguments": arguments, "seed": args.seed}, labels))
        rows[name] = {"tokens": tokens, "spread": deviation / spread, "results": [asdict(one) for one in found]}
        if not arguments:
            shown = picture(images, torch.cat([one.boundary_maps for one in outputs]), visualize_boundary_map)
    return rows, shown


def judged_table(rows: dict[str, dict[str, float]]) -> str:
    """As Markdown: a row a call."""
    lines = [["", "tokens", "top-1", "Fréchet distance", "spread of codes"]]
    for name, row in rows.items():
        top1, distance = (one["value"] for one in row["results"])
        lines.append([name, f"{row['tokens']:.1f}", f"{top1:.2f}", f"{distance:.1f}", f"{row['spread']:.2f}"])
    return markdown_table(*lines)


def lengths_table(lengths: dict[str, dict[str, Any]]) -> str:
    """As Markdown: a row a number of updates."""
    return measures_table("updates", {updates: [found] for updates, found in lengths.items()}, COLUMNS)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    with lock(args.work_dir):
        named = ("--id2label", args.work_dir / "id2label.json")
        write_json(named[1], D2iTPipeline.load_config(bundled_checkpoint("tiny-imagenet-20-64"))["id2label"])
        caches = {split: cache_of(args.data, split, args.work_dir, *named) for split in ("train", "validation")}
        run, steps = args.work_dir / "run", sorted(args.lengths)
        train(caches["train"], run, steps)
        latents, labels = validation(caches["validation"], args.num_images)
        objective = FlowMatchingObjective()  # of the recipe
        lengths = {
            str(one): measure(run / f"checkpoint-{one}" / "model_ema", latents, labels, objective) for one in steps
        }
        pipe = DCDiTPipeline.from_pretrained(run / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        rows, shown = judge(pipe, args, latents.std().item())
    print(lengths_table(lengths), judged_table(rows), sep="\n")
    protocol = {"recipe": RECIPE.read_text().split(), "timesteps": TIMESTEPS, "num_images": args.num_images}
    protocol |= {"data": Path(args.data).name, "machine": describe_machine("cpu")}
    write_json(args.output_dir / f"{NAME}.json", {"protocol": protocol, "lengths": lengths, "rows": rows})
    shown.save(args.output_dir / f"{NAME}.png")


if __name__ == "__main__":
    main()
