# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A training step of DC-DiT against one of DiT/2 of the same width, heads and blocks, by the multiply-add.

    python benchmarks/chunk_training.py                    # dcdit-s, two images, fp32
    python benchmarks/chunk_training.py --device cuda      # dcdit-xl, 64 images, bf16

A step is forward, loss and backward; the optimizer, which takes models of as many weights as long, is left out. A
quarter of the cells is natural, and the budget is 1: N = 4, as many tokens as DiT/2 has. Multiply-adds are those of
forward and backward.
"""

from collections.abc import Callable

import torch
from chunk_forward import prepared
from common import Bench, Flag, main
from forward_mfu import count_operations
from original_dit import DiTShape, OriginalDiT
from peers import ORIGINAL, cast
from torch import nn

from diffusers_d2it.losses import mse_loss, ratio_loss


def step_of(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        loss().backward()

    return step


def measure(bench: Bench, preset: str, batch_size: int) -> str:
    torch.manual_seed(0)
    with torch.no_grad():
        model, inputs = prepared(bench, preset, batch_size)
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "num_classes")
    dit = OriginalDiT(DiTShape(*(model.config[name] for name in names)))
    dit = cast(dit, bench.device, inputs[0].dtype)
    noise = torch.randn_like(inputs[0])

    def chunked_loss() -> torch.Tensor:
        output = model(*inputs)
        return mse_loss(output.sample, noise) + 0.03 * ratio_loss(output.boundary_probability, 4.0)

    sides = {
        "DC-DiT": step_of(model.train(), chunked_loss),
        ORIGINAL: step_of(dit.train(), lambda: mse_loss(dit(*inputs), noise)),
    }
    macs = {name: count_operations(step) / 2 for name, step in sides.items()}
    median = bench.time(sides)
    with torch.no_grad():
        bench.note("tokens an image", model(*inputs).kept.sum().item() / batch_size)
    bench.note(f"multiply-adds / {ORIGINAL}'s", macs["DC-DiT"] / macs[ORIGINAL])
    bench.note(f"time / {ORIGINAL}'s", median["DC-DiT"] / median[ORIGINAL])
    ratio = median["DC-DiT"] / median[ORIGINAL] * macs[ORIGINAL] / macs["DC-DiT"]
    bench.claim(f"time of a training step a multiply-add, DC-DiT / {ORIGINAL}", ratio, 1.25, goal=17)
    return f"Training step of {preset}, {batch_size} images"


if __name__ == "__main__":
    main(
        measure,
        preset=Flag({"cpu": "dcdit-s", "cuda": "dcdit-xl"}, "preset of DC-DiT"),
        batch_size=Flag({"cpu": 2, "cuda": 64}, "images"),
    )
