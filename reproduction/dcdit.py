# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""DC-DiT in miniature: which start, which router, which budgets; and does its share of tokens follow noise and detail?

    python reproduction/dcdit.py --data tiny-imagenet-20 --work_dir runs/dcdit --jobs 2

Every arm is trained by examples/train_dcdit.py itself, on the latents of the bundled autoencoder at 64 pixels, 16x16
cells; the seed decides weights, batches, noise and budgets. Measured are, on validation images and at five timesteps,
the squared error of the noise under several budgets, the natural share of cells, and whether these lie where the
latents have detail; and the error with as many boundaries at random places. What is finished is not done again.
"""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import RESULTS, SEEN, markdown_table, spread, verdict
from study import EXAMPLES, run_script, write_json
from torch import nn
from torch.utils.data import DataLoader

from diffusers_d2it import DCDiTModel, LatentCodec, bundled_checkpoint
from diffusers_d2it.data import LatentCache
from diffusers_d2it.files import lock
from diffusers_d2it.objectives import DiffusionObjective, FlowMatchingObjective
from diffusers_d2it.training import load_autoencoder


VAE = str(Path(bundled_checkpoint(), "vae"))
RESOLUTION, NUM_CLASSES = 64, 1000  # labels of the data are ids of ImageNet
CONFIG = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_classes": NUM_CLASSES,
    "norm_num_groups": 8,
    "sample_size": 16,
}
TRAINING = ["--train_batch_size", 16, "--learning_rate", 3e-4, "--ema_decay", 0.99, "--budget_warmup_steps", 100]
TIMESTEPS = (50, 250, 500, 750, 950)
BUDGETS = (1.0, 0.7, 0.4)
BATCH = 50


@dataclass(frozen=True)
class DCDiTArm:
    """A DC-DiT that differs from the first arm by what is named here."""

    config: dict[str, Any] = field(default_factory=dict)
    flags: tuple = ()
    zero_residual: bool = False  # the projection of the residual starts at zero
    zero_adaln: bool = True  # blocks start as the identity


ARMS = {
    "dc-dit": DCDiTArm(),
    "residual at zero": DCDiTArm(zero_residual=True),
    "adaLN by Xavier": DCDiTArm(zero_adaln=False),
    "one budget": DCDiTArm(flags=("--budgets", 1.0)),
    "cosine router": DCDiTArm(config={"router": "cosine"}),
    "no smoothing": DCDiTArm(config={"smoothing_sigma": 0.1}),  # no neighbour has a weight
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with splits train and validation, columns image, label")
    parser.add_argument("--work_dir", type=Path, required=True, help="caches and runs are kept here")
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 900], help="updates after which is measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--num_images", type=int, default=200, help="of the validation split")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    return parser.parse_args()


def call(script: str, *flags) -> None:
    """`run_script` of examples/, in one thread."""
    run_script(EXAMPLES / script, *flags, OMP_NUM_THREADS="1")


def cache_of(data: str, split: str, work_dir: Path, *more) -> Path:
    """The latent cache of a split, written with further flags of cache_latents.py."""
    folder = work_dir / f"cache-{split}"
    flags = ["--dataset_name", data, "--split", split, "--resolution", RESOLUTION, "--num_classes", NUM_CLASSES]
    call("cache_latents.py", *flags, *more, "--vae", VAE, "--output_dir", folder)
    return folder


def start_of(arm: DCDiTArm, seed: int) -> DCDiTModel:
    """The model before its first update."""
    torch.manual_seed(seed)
    model = DCDiTModel(**CONFIG | arm.config)
    if arm.zero_residual:
        nn.init.zeros_(model.residual_proj.weight)
    if not arm.zero_adaln:
        for block in model.transformer_blocks:
            nn.init.xavier_uniform_(block.adaln.weight)
    return model


def train(name: str, seed: int, args: argparse.Namespace, cache: Path) -> dict[int, Path]:
    """The averaged models of a run, by the number of updates."""
    folder = args.work_dir / "runs" / f"{name.replace(' ', '-')}-{seed}"
    start = folder.with_name(f"{folder.name}-start")
    models = {steps: folder / f"checkpoint-{steps}" / "model_ema" for steps in args.steps}
    if not start.exists():
        start_of(ARMS[name], seed).save_pretrained(start)
    for steps, model in sorted(models.items()):
        if not model.exists():
            resume = ["--resume_from_checkpoint", "latest"] if folder.exists() else []
            flags = [
                "--latent_cache",
                cache,
                "--vae",
                VAE,
                "--resolution",
                RESOLUTION,
                "--init_from",
                start,
                "--seed",
                seed,
            ]
            flags += [*TRAINING, *ARMS[name].flags, "--max_train_steps", steps, "--output_dir", folder, *resume]
            call("train_dcdit.py", *flags, "--report_to", "none", "--validation_steps", 10**9)
    return models


class MovedBoundaries(nn.Module):
    """A router whose probabilities lie at other places of the image, drawn anew for each: as many, of no meaning."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.router, self.generator = router, torch.Generator().manual_seed(0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        probability = self.router(features)
        order = torch.rand(probability.flatten(1).shape, generator=self.generator).argsort(dim=1)
        return probability.flatten(1).gather(1, order).view_as(probability)


@torch.no_grad()
def measure(
    folder: Path,
    latents: torch.Tensor,
    labels: torch.Tensor,
    objective: DiffusionObjective | FlowMatchingObjective | None = None,
) -> dict[str, Any]:
    """What a model does on latents (N, C, H, W): lists over TIMESTEPS.

    Args:
        objective: what the model was trained for; None for the noise.

    Returns:
        "error" by budget, as it is written, "random", that of moved boundaries under the whole budget,
        "without_tokens", with what the transformer made of them put to zero, "natural_share", and "detail", the
        correlation over images and cells of being natural with the local spread of the latents.
    """
    model, objective = DCDiTModel.from_pretrained(folder).eval(), objective or DiffusionObjective()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    spread_of = local_spread(latents)
    measured: dict[str, Any] = {
        "error": {f"{budget:g}": [] for budget in BUDGETS},
        "random": [],
        "natural_share": [],
        "detail": [],
    }
    moved = MovedBoundaries(model.boundary_router)

    def run(timestep: int, budget: float) -> tuple[float, torch.Tensor]:
        timesteps = torch.full((len(latents),), timestep)
        noised = objective.add_noise(latents, noise, timesteps)
        outputs = [model(x, timestep, y, budget=budget) for x, y in zip(noised.split(BATCH), labels.split(BATCH))]
        predicted = torch.cat([one.sample for one in outputs])
        target = objective.target(latents, noise, timesteps)
        return F.mse_loss(predicted, target).item(), torch.cat([one.boundary_probability for one in outputs]) > 0.5

    for timestep in TIMESTEPS:
        for budget in BUDGETS:
            error, natural = run(timestep, budget)
            measured["error"][f"{budget:g}"].append(error)
        measured["natural_share"].append(natural.float().mean().item())
        pair = torch.stack([natural.float().flatten(), spread_of.flatten()])
        measured["detail"].append(torch.corrcoef(pair)[0, 1].item())
    model.boundary_router = moved
    measured["random"] = [run(timestep, 1.0)[0] for timestep in TIMESTEPS]
    # Of zeros no place matters
    model.norm_backbone.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    measured["without_tokens"] = [run(timestep, 1.0)[0] for timestep in TIMESTEPS]
    return measured


def local_spread(latents: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the latents in the 3x3 cells around each, mean over channels: (N, H, W)."""
    mean, square = (F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False) for x in (latents, latents**2))
    return (square - mean**2).clamp_min(0).sqrt().mean(dim=1)


def validation(folder: Path, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents, the means of the posterior, and labels of the first images."""
    codec = LatentCodec(load_autoencoder(VAE, RESOLUTION))
    cache = LatentCache(folder, codec, seed=0)
    batch = next(iter(DataLoader(cache, batch_size=num_images, collate_fn=cache.collate)))
    return codec.scale(codec.posterior(codec.moments(batch)).mode()), batch["class_labels"]


COLUMNS = {
    "error, budget 1": ("error", "1"),
    "error, budget 0.4": ("error", "0.4"),
    "boundaries at random places": ("random",),
    "without the tokens": ("without_tokens",),
    "natural share": ("natural_share",),
    "follows detail": ("detail",),
}
# What is claimed to be lower than what, each a row and what stands in it
WHOLE, FEW = ("error", "1"), ("error", "0.4")
CLAIMS = {
    "learned boundaries are better than as many random ones": (("dc-dit", WHOLE), ("dc-dit", ("random",))),
    "several budgets in training are better under 0.4": (("dc-dit", FEW), ("one budget", FEW)),
    "several budgets in training are better under the whole one": (("dc-dit", WHOLE), ("one budget", WHOLE)),
    "the router of predictability is better than that of cosines": (("dc-dit", WHOLE), ("cosine router", WHOLE)),
    "smoothing is better than none": (("dc-dit", WHOLE), ("no smoothing", WHOLE)),
    "*decided here:* the residual by Xavier is better than at zero": (("dc-dit", WHOLE), ("residual at zero", WHOLE)),
    "*decided here:* adaLN at zero is better than by Xavier": (("dc-dit", WHOLE), ("adaLN by Xavier", WHOLE)),
    "there are fewer tokens at noise (t = 950) than near the image (t = 50)": (
        ("dc-dit", ("natural_share", -1)),
        ("dc-dit", ("natural_share", 0)),
    ),
    "tokens lie where the latents have detail": (None, ("dc-dit", ("detail",))),
}


def measures_table(head: str, rows: dict[str, list[dict]], columns: dict[str, tuple]) -> str:
    """As Markdown: of the runs of each row mean and deviation of what stands under the keys of each column."""
    lines = [[head, *columns]]
    digits = {column: 3 if keys[0] in ("natural_share", "detail") else 4 for column, keys in columns.items()}
    for name, runs in rows.items():
        lines.append([name, *(spread(found(runs, keys), digits[column]) for column, keys in columns.items())])
    return markdown_table(*lines)


def table(rows: dict[str, dict[str, list[dict]]], steps: int) -> str:
    """Each arm after so many updates."""
    return measures_table(f"after {steps} updates", {arm: runs[str(steps)] for arm, runs in rows.items()}, COLUMNS)


def shares_table(rows: dict[str, dict[str, list[dict]]]) -> str:
    """The natural share of the first arm by timestep, after each length of its training."""
    (name, lengths), *_ = rows.items()
    columns = {f"t = {t}": ("natural_share", place) for place, t in enumerate(TIMESTEPS)}
    after = {f"after {steps} updates": runs for steps, runs in lengths.items()}
    return measures_table(f"natural share of {name}", after, columns)


def claims_table(rows: dict[str, dict[str, list[dict]]]) -> str:
    """As Markdown: each claim about the arms that are there, after each length of training."""
    lengths = next(iter(rows.values()))
    lines = [["claim", *(f"after {steps} updates" for steps in lengths)]]
    for text, sides in CLAIMS.items():
        if any(side is not None and side[0] not in rows for side in sides):
            continue
        cells = []
        for steps in lengths:
            high = found(rows[sides[1][0]][steps], sides[1][1])
            low = [0.0] * len(high) if sides[0] is None else found(rows[sides[0][0]][steps], sides[0][1])
            difference = statistics.mean(high) - statistics.mean(low)
            cells.append(f"{SEEN[verdict(low, high)]} ({difference:+.4f})")
        lines.append([text, *cells])
    return markdown_table(*lines)


def found(runs: list[dict], keys: tuple) -> list[float]:
    """Of each run what stands under these keys; of several timesteps the mean."""
    values = []
    for run in runs:
        value = run
        for key in keys:
            value = value[key]
        values.append(statistics.mean(value) if isinstance(value, list) else value)
    return values


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    with lock(args.work_dir):
        caches = {split: cache_of(args.data, split, args.work_dir) for split in ("train", "validation")}
        latents, labels = validation(caches["validation"], args.num_images)
        runs = [(name, seed) for seed in args.seeds for name in args.arms]
        with ThreadPoolExecutor(args.jobs) as pool:  # of threads that wait for processes
            models = list(pool.map(lambda run: train(*run, args, caches["train"]), runs))
        rows = {name: {str(steps): [] for steps in sorted(args.steps)} for name in args.arms}
        for (name, _), of_run in zip(runs, models):
            for steps, folder in of_run.items():
                rows[name][str(steps)].append(measure(folder, latents, labels))
    print(*(table(rows, steps) for steps in sorted(args.steps)), shares_table(rows), claims_table(rows), sep="\n")
    protocol = {"config": CONFIG, "training": TRAINING, "timesteps": TIMESTEPS, "budgets": BUDGETS}
    protocol |= {"seeds": args.seeds, "num_images": args.num_images, "data": Path(args.data).name}
    write_json(args.output_dir / "dcdit-small.json", {"protocol": protocol, "arms": rows})


if __name__ == "__main__":
    main()
