# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""examples/train_d2it.py, with what an ablation takes away, or train_dcdit.py.

    python reproduction/train_arm.py --without_refine_net --latent_cache runs/cache ...
    python reproduction/train_arm.py --dcdit --every_cell --latent_cache runs/cache ...

All other flags are those of the script.

Nothing of the scripts is repeated here: names that they look up are replaced in them.
"""

import argparse
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from cell_dit import CellDiT

from diffusers_d2it import D2iTContentModel
from diffusers_d2it.grains import GrainLayout


sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import train_d2it  # noqa: E402
import train_dcdit  # noqa: E402


def no_correction(parents: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, *rest) -> tuple:
    """RefineNet's forward, left out: no residual, and no time spent."""
    return torch.zeros_like(noise), parents[:0]


def without_refine_net(model: D2iTContentModel) -> D2iTContentModel:
    """Leave RefineNet out.

    Its residual starts at zero, and is never trained here: loaded as any other, the model still corrects nothing.
    """
    for net in model.refine_nets:
        net.requires_grad_(False)
        net.forward = no_correction
    return model


@contextmanager
def independent_cells():
    """Every cell of a coarse code has noise and a prediction of its own, and may have a value of its own."""

    def as_it_is(layout: GrainLayout, latents: torch.Tensor, grain: int = 0) -> torch.Tensor:
        return latents

    with patch.multiple(GrainLayout, tie=as_it_is, average=as_it_is, check_tied=as_it_is):
        yield


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without_refine_net", action="store_true", help="the rough noise is the prediction")
    parser.add_argument("--independent_noise", action="store_true", help="noise and a prediction for each cell")
    parser.add_argument("--dcdit", action="store_true", help="train_dcdit.py")
    parser.add_argument("--every_cell", action="store_true", help="of it, a DiT that keeps every cell")
    args, args.flags = parser.parse_known_args()
    return args


def main(args: argparse.Namespace) -> None:
    script = train_dcdit if args.dcdit else train_d2it
    make_model = script.make_model
    # It neither validates nor publishes: samples are drawn from its checkpoints
    replaced = dict.fromkeys(("validate", "publish_result"), lambda *arguments, **options: None)
    if args.without_refine_net:
        replaced["make_model"] = lambda *arguments, **options: without_refine_net(make_model(*arguments, **options))
    if args.every_cell:
        replaced["DCDiTModel"] = CellDiT
    cells = independent_cells() if args.independent_noise else nullcontext()
    with patch.multiple(script, **replaced), cells:
        script.main(script.parse_args(args.flags))


if __name__ == "__main__":
    main(parse_args())
