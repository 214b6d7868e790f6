# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What single changes of the recipe of tiny-imagenet-20-64 do: curves over the images that a run has seen.

    python reproduction/curves.py --data tiny-imagenet-20 --work_dir runs/curves --jobs 2

Every run is a script of examples/ with a recipe of examples/configs/tiny-imagenet-20-64, from scratch, but for what
its arm changes. Content models learn on the codes of the bundled autoencoder, and draw with the bundled grain model.
`--data` is a folder with splits train and validation, whose labels are ids of ImageNet. What is finished is not done
again, and what was interrupted goes on.

- Content models: samples of every class, with the guidance of the bundled checkpoint and without.
- Autoencoders: reconstructions of the validation images.

The judge is efficientnet-lite2, which has trained nothing here: top-1 accuracy, Frechet distance to the validation
images.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bundled_checkpoint import CALLS, describe_machine, draw
from dcdit import RESOLUTION, VAE, call
from report import RESULTS
from study import EXAMPLES, write_json

from diffusers_d2it import (
    D2iTContentModel,
    D2iTPipeline,
    DynamicAutoencoderKL,
    bundled_checkpoint,
    load_features,
    load_sampler,
)
from diffusers_d2it.evaluation import Evaluator, ImageSet, evaluate_reconstructions, open_images
from diffusers_d2it.files import lock
from diffusers_d2it.objectives import make_objective


NAME = "curves-tiny-imagenet-20-64"
BUNDLED = Path(bundled_checkpoint("tiny-imagenet-20-64"))
RECIPES = EXAMPLES / "configs" / BUNDLED.name
RATIO = 0.5  # of the reconstructions
BATCH_SIZE = 32  # of both recipes


@dataclass(frozen=True)
class Arm:
    """The recipe, and what is changed in it."""

    script: str
    recipe: str
    flags: tuple = ()

    @property
    def objective(self) -> str:
        """What a content model predicts."""
        return dict(zip(self.flags, self.flags[1:])).get("--objective", "flow_matching")


CONTENT = "train_d2it.py", "content.txt"
# A short run has no use for an average over a thousand updates, nor one that is continued for a rate that falls
AUTOENCODER = "train_dvae.py", "dvae.txt"
SHORT = ("--ema_decay", 0.99)
CONSTANT = (*SHORT, "--lr_scheduler", "constant_with_warmup")
ARMS = {
    "flow matching": Arm(*CONTENT, SHORT),
    "with alignment": Arm(*CONTENT, (*SHORT, "--alignment", "efficientnet-lite0")),
    "noise predicted": Arm(*CONTENT, (*SHORT, "--objective", "epsilon")),
    "autoencoder": Arm(*AUTOENCODER, CONSTANT),
    "without perceptual loss": Arm(*AUTOENCODER, (*CONSTANT, "--perceptual_weight", 0)),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with splits train and validation")
    parser.add_argument("--work_dir", type=Path, required=True, help="runs and scores are kept here")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 500, 1000], help="updates of a content model")
    parser.add_argument("--steps_of_autoencoders", type=int, nargs="+", default=[125, 250, 500])
    parser.add_argument("--num_samples", type=int, default=300, help="of all classes together")
    parser.add_argument("--seed", type=int, default=0, help="of runs and samples")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    return parser.parse_args()


def train(name: str, steps: Sequence[int], args: argparse.Namespace) -> dict[int, Path]:
    """The averaged models of a run, by the number of updates."""
    arm, folder = ARMS[name], args.work_dir / "runs" / name.replace(" ", "-")
    models = {one: folder / f"checkpoint-{one}" / "model_ema" for one in steps}
    flags = [f"@{RECIPES / arm.recipe}", "--dataset_name", args.data, "--output_dir", folder, "--seed", args.seed]
    flags += ["--report_to", "none", "--validation_steps", 10**9, *arm.flags]
    if arm.script == CONTENT[0]:
        flags += ["--vae", VAE, "--grain", BUNDLED, "--num_classes", 1000]
    for one, model in models.items():
        if not model.exists():
            call(arm.script, *flags, "--max_train_steps", one, "--resume_from_checkpoint", "latest")
    return models


def judged_samples(model: Path, objective: str, evaluator: Evaluator, args: argparse.Namespace) -> dict[str, list]:
    """Scores of what a content model draws, by the names of `CALLS`."""
    scheduler = load_sampler("unipc", make_objective(objective, None, False).sampling_scheduler())
    transformer = D2iTContentModel.from_pretrained(model)
    pipe = D2iTPipeline.from_pretrained(BUNDLED, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.tensor(sorted(pipe.id2label)).repeat_interleave(args.num_samples // len(pipe.id2label))
    found = {}
    for name, arguments in CALLS.items():
        images, _ = draw(pipe, labels, args.seed, **arguments)
        found[name] = evaluator(
            ImageSet.from_tensor(images, name, {"arguments": arguments, "seed": args.seed}, labels)
        )
    return found


def judged_reconstructions(model: Path, evaluator: Evaluator) -> dict[str, list]:
    """Scores of an autoencoder's reconstructions."""
    vae = DynamicAutoencoderKL.from_pretrained(model)
    # Thresholds are counted on pixels, so those of the bundled one are those of any
    vae.register_to_config(calibration=DynamicAutoencoderKL.load_config(VAE)["calibration"])
    metrics = ["top1", "rfid"]
    return {"": evaluate_reconstructions(vae, evaluator.images, metrics, evaluator.features, fine_ratio=RATIO)}


@cache
def evaluator_of(data: str) -> Evaluator:
    """The judge, which reads the validation images once."""
    return Evaluator(open_images(data, RESOLUTION, "validation"), ["top1", "fid"], load_features("efficientnet-lite2"))


def curve(name: str, args: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Scores of an arm by the number of updates and by what is scored."""
    arm, points = ARMS[name], {}
    is_content = arm.script == CONTENT[0]
    for steps, model in train(name, sorted(args.steps if is_content else args.steps_of_autoencoders), args).items():
        file = args.work_dir / "scores" / f"{name.replace(' ', '-')}-{steps}.json"
        if not file.exists():
            evaluator = evaluator_of(args.data)
            judged = judged_samples(model, arm.objective, evaluator, args) if is_content else None
            found = judged or judged_reconstructions(model, evaluator)
            write_json(file, {what: [asdict(one) for one in results] for what, results in found.items()})
        points[str(steps)] = json.loads(file.read_text())
    return points


def over_images(curves: dict[str, dict]) -> str:
    """As Markdown: a row an arm and what is scored of it, a column a number of images; top-1 accuracy / distance."""
    lengths = sorted({int(steps) for points in curves.values() for steps in points})
    lines = [["", "", *(f"{BATCH_SIZE * steps:,}" for steps in lengths)]]
    lines.append(["---"] * len(lines[0]))
    for name, points in curves.items():
        for what in next(iter(points.values())):
            lines.append(
                [name, what, *(_cell(points[str(one)][what]) if str(one) in points else "" for one in lengths)]
            )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(results: list[dict[str, Any]]) -> str:
    top1, distance, *_ = (one["value"] for one in results)
    return f"{top1:.3f} / {distance:.1f}"


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    with lock(args.work_dir), ThreadPoolExecutor(args.jobs) as pool:
        curves = dict(zip(args.arms, pool.map(lambda name: curve(name, args), args.arms)))
    print(over_images(curves))
    protocol = {"arms": {name: asdict(ARMS[name]) for name in curves}, "num_samples": args.num_samples}
    protocol |= {"seed": args.seed, "data": Path(args.data).name, "machine": describe_machine("cpu")}
    write_json(args.output_dir / f"{NAME}.json", {"protocol": protocol, "curves": curves})


if __name__ == "__main__":
    main()
