# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""examples/train_d2it.py, with what an ablation takes away.

    python benchmarks/reproduction/train_arm.py --without_refine_net --latent_cache runs/cache ...

All other flags are those of train_d2it.py.

Nothing of the script is repeated here: names that it looks up are replaced in it.
"""

import argparse
import importlib.util
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch

from diffusers_d2it import D2iTContentModel
from diffusers_d2it.models import transformer_d2it_content


SCRIPT = Path(__file__).parents[2] / "examples" / "train_d2it.py"


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


def untied(tensor: torch.Tensor, grain_map: torch.Tensor) -> torch.Tensor:
    """`grains.tie`, left out."""
    return tensor


def load_script() -> ModuleType:
    """examples/train_d2it.py as a module."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without_refine_net", action="store_true", help="the rough noise is the prediction")
    parser.add_argument("--independent_noise", action="store_true", help="a draw of noise for each cell")
    args, args.flags = parser.parse_known_args()
    return args


def main(args: argparse.Namespace) -> None:
    script = load_script()
    script.validate = script.publish = lambda *arguments, **options: None  # samples are drawn from the checkpoints
    if args.without_refine_net:
        make_model = script.make_model
        script.make_model = lambda *arguments: without_refine_net(make_model(*arguments))
    with ExitStack() as stack:
        if args.independent_noise:
            script.tie = untied
            stack.enter_context(patch.object(transformer_d2it_content, "check_tied", lambda *arguments: None))
        script.main(script.parse_args(args.flags))


if __name__ == "__main__":
    main(parse_args())
