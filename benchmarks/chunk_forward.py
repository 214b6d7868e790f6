# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Forward passes of DC-DiT: over budgets, against DiT/2 by the multiply-add, and guided with a cheap half.

    python benchmarks/chunk_forward.py                    # dcdit-s, two images; guided dcdit-b; fp32
    python benchmarks/chunk_forward.py --device cuda      # dcdit-xl, 64 images, bf16

The weights are random. A new router keeps next to nothing, so the bias of its score is set to the quantile that makes
a quarter of the cells of these inputs natural, the share that training aims at; what it keeps lies anywhere, which
changes no time. The original DiT has the same width, heads and blocks. Tokens and multiply-adds are those of
`ForwardMeter`.
"""

from collections.abc import Callable

import torch
from common import Bench, Flag, main
from forward_mfu import count_operations
from original_dit import DiTShape, OriginalDiT
from peers import ORIGINAL, cast
from torch import nn

from diffusers_d2it import DCDiTModel, load_preset
from diffusers_d2it.evaluation import ForwardMeter


NATURAL_SHARE = 0.25
BUDGETS = [1.0, 0.8, 0.6, 0.5, 0.4, 0.2]
NULL_BUDGET = 0.1  # of the half without labels


def prepared(bench: Bench, preset: str, batch_size: int) -> tuple[DCDiTModel, tuple[torch.Tensor, ...]]:
    """A model whose every weight counts, and inputs of whose cells it finds a quarter natural."""
    model = cast(DCDiTModel(**load_preset(preset)).eval(), bench.device, torch.float32)
    side, device = model.config.sample_size, bench.device
    latents = torch.randn(batch_size, model.config.in_channels, side, side, device=device)
    timestep = torch.randint(1000, (batch_size,), device=device)
    inputs = latents, timestep, torch.randint(model.config.num_classes, (batch_size,), device=device)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.03)
    logits = model(*inputs).boundary_probability.flatten().logit()
    model.boundary_router.score.bias -= logits.quantile(1 - NATURAL_SHARE)
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    return cast(model, device, dtype), (latents.to(dtype), *inputs[1:])


def r_squared(x: list[float], y: list[float]) -> float:
    """Of a straight line through points: the square of their correlation."""
    return torch.corrcoef(torch.tensor([x, y], dtype=torch.float64))[0, 1].item() ** 2


def cost(model: DCDiTModel, forward: Callable[[], object]) -> tuple[float, float]:
    """(tokens, multiply-adds) of an image, mean over the batch."""
    with ForwardMeter(model, counts_macs=True) as meter:
        forward()
    return sum(meter.tokens.values()), meter.macs


@torch.no_grad()
def measure(bench: Bench, preset: str, guided_preset: str, batch_size: int) -> str:
    torch.manual_seed(0)
    measure_budgets(bench, preset, batch_size)
    measure_guided(bench, guided_preset, batch_size)
    return f"Forward of {preset} and guided forward of {guided_preset}, {batch_size} images"


def measure_budgets(bench: Bench, preset: str, batch_size: int) -> None:
    model, inputs = prepared(bench, preset, batch_size)
    config = model.config
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "num_classes")
    dit = cast(OriginalDiT(DiTShape(*(config[name] for name in names))).eval(), bench.device, inputs[0].dtype)
    sides = {f"budget {budget}": lambda budget=budget: model(*inputs, budget=budget) for budget in BUDGETS}
    costs = {name: cost(model, forward) for name, forward in sides.items()}
    tokens, macs = ({name: one[which] for name, one in costs.items()} for which in (0, 1))
    sides[ORIGINAL] = lambda: dit(*inputs)
    macs[ORIGINAL] = count_operations(sides[ORIGINAL]) / 2 / batch_size
    median = bench.time(sides)
    for budget in BUDGETS:
        name = f"budget {budget}"
        bench.note(f"tokens an image, {name}", tokens[name])
        bench.note(f"multiply-adds / {ORIGINAL}'s, {name}", macs[name] / macs[ORIGINAL])
        bench.note(f"time / {ORIGINAL}'s, {name}", median[name] / median[ORIGINAL])
    linear = r_squared(list(tokens.values()), [median[name] for name in tokens])
    bench.claim("seconds over tokens, R^2 of a line", linear, 0.99, at_least=True, goal=15)
    for budget in (1.0, 0.5):
        name = f"budget {budget}"
        ratio = median[name] / median[ORIGINAL] * macs[ORIGINAL] / macs[name]
        text = f"time a multiply-add, DC-DiT / {ORIGINAL}, {name}"
        if budget == 1:
            bench.claim(text, ratio, 1.2, goal=15)
        else:
            bench.note(text, ratio)


def measure_guided(bench: Bench, preset: str, batch_size: int) -> None:
    model, (latents, timestep, labels) = prepared(bench, preset, batch_size)
    no_class = torch.full_like(labels, model.config.num_classes)
    inputs = latents.repeat(2, 1, 1, 1), timestep.repeat(2), torch.cat([labels, no_class])
    budgets = {name: torch.ones(2 * batch_size, device=bench.device) for name in ("full guidance", "cheap guidance")}
    budgets["cheap guidance"][batch_size:] = NULL_BUDGET
    sides = {name: lambda budget=budget: model(*inputs, budget=budget) for name, budget in budgets.items()}
    (_, full), (_, cheap) = (cost(model, forward) for forward in sides.values())
    bench.note(f"multiply-adds, cheap / full guidance, null budget {NULL_BUDGET}", cheap / full)
    median = bench.time(sides)
    ratio = median["cheap guidance"] / median["full guidance"]
    bench.claim(f"guided step, null budget {NULL_BUDGET} / 1", ratio, 0.72, goal=16)


if __name__ == "__main__":
    main(
        measure,
        preset=Flag({"cpu": "dcdit-s", "cuda": "dcdit-xl"}, "preset of DC-DiT"),
        guided_preset=Flag({"cpu": "dcdit-b", "cuda": "dcdit-xl"}, "preset for the guided step"),
        batch_size=Flag({"cpu": 2, "cuda": 64}, "images, without guidance"),
    )
