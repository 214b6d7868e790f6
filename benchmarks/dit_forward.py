# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The coarse path, itself a DiT, against the original DiT and diffusers' DiT at a size where operators cost the time.

    python benchmarks/dit_forward.py

Width 64, 28 layers, 16 tokens, batch 1: the time of a forward is that of its operators, as it is at any width for a
small batch on an accelerator. The coarse path is the content model with its RefineNets taken away (`peers.backbone`);
all three sides have the same weights and compute the same function, which is checked. The content model with one layer
of RefineNet on a map without fine regions, where that layer has no token, is timed too.

A compute operator is a call that reaches torch's dispatcher and returns new memory, writes to memory, or hands a value
to Python. One whose outputs all share storage with an input (views, a reshape that need not copy) is none. The
operators of a block are the difference between two depths: what happens once for all blocks counts for none of them.
The operators of the whole forward stand beside it.
"""

import argparse
import dataclasses
from collections.abc import Callable
from contextlib import ExitStack

import torch
from common import Claim, parse_args, report, time_sides
from peers import (
    CHANNELS,
    DiTShape,
    all_fine_layout,
    backbone,
    check_equal,
    content_model,
    diffusers_dit_of,
    original_dit_of,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_d2it.grains import tie


SHAPE = DiTShape(num_layers=28, heads=4, head_dim=16, sample_size=8)  # width 64, 16 tokens
BATCH_SIZE = 1
SIDES = ("coarse path", "original DiT", "diffusers' DiT")
EMPTY = "coarse path and a RefineNet without tokens"


class OperatorCount(TorchDispatchMode):
    """Counts the compute operators that run under it, in `count`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        inputs = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        tensors = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        moves_nothing = bool(tensors) and all(_memory(x) in inputs for x in tensors)
        self.count += func._schema.is_mutable or not moves_nothing
        return outputs


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def count_operators(function: Callable[[], object]) -> int:
    """Compute operators of one call."""
    function()  # what is built once and cached is not counted
    with OperatorCount() as counter:
        function()
    return counter.count


def sides_of(shape: DiTShape, device: str, context: ExitStack) -> dict[str, Callable[[], torch.Tensor]]:
    """Forwards of the three models of one shape, with the same weights and inputs."""
    ours = backbone(shape).to(device)
    original, diffusers_dit = original_dit_of(ours).to(device), diffusers_dit_of(ours).to(device)
    latents, timestep, labels = inputs_on(device)
    layout = all_fine_layout(ours, BATCH_SIZE, device)
    context.enter_context(ours.fused_blocks())  # as a sampling call does, once for all its steps
    forwards = (
        lambda: ours(latents, timestep, layout, labels, return_dict=False)[0],
        lambda: original(latents, timestep, labels),
        lambda: diffusers_dit(latents, timestep=timestep, class_labels=labels, return_dict=False)[0],
    )
    return dict(zip(SIDES, forwards))


def side_without_fine_tokens(device: str, context: ExitStack) -> Callable[[], torch.Tensor]:
    """Forward of the content model with one block of RefineNet more, on a map that leaves it no token."""
    model = content_model(dataclasses.replace(SHAPE, num_layers=SHAPE.num_layers + 1), num_refine_layers=1).to(device)
    latents, timestep, labels = inputs_on(device)
    grain_map = torch.zeros(BATCH_SIZE, SHAPE.side, SHAPE.side, dtype=torch.int64, device=device)
    layout = model.prepare_grain_map(grain_map)
    latents = tie(latents, grain_map)
    context.enter_context(model.fused_blocks())
    return lambda: model(latents, timestep, layout, labels, return_dict=False)[0]


def inputs_on(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and labels."""
    latents = torch.randn(BATCH_SIZE, CHANNELS, SHAPE.sample_size, SHAPE.sample_size, device=device)
    timestep = torch.randint(1000, (BATCH_SIZE,), device=device)
    labels = torch.randint(SHAPE.num_classes, (BATCH_SIZE,), device=device)
    return latents, timestep, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_args(parser, "dit_forward")

    torch.manual_seed(0)
    shallow = dataclasses.replace(SHAPE, num_layers=SHAPE.num_layers // 2)
    with torch.no_grad(), ExitStack() as context:
        sides = sides_of(SHAPE, args.device, context)
        error = check_equal({name: forward() for name, forward in sides.items()}, 1e-5)
        operators = {name: count_operators(forward) for name, forward in sides.items()}
        at_half = {name: count_operators(forward) for name, forward in sides_of(shallow, args.device, context).items()}
        timings = time_sides(sides | {EMPTY: side_without_fine_tokens(args.device, context)}, args)

    notes, per_block = {"largest relative difference of the sides": error}, {}
    for name in SIDES:
        per_block[name] = (operators[name] - at_half[name]) / (SHAPE.num_layers - shallow.num_layers)
        notes[f"operators of the forward, {name}"] = operators[name]
        notes[f"operators a block, {name}"] = per_block[name]
    ours, original, diffusers_dit = (timings[name].median for name in SIDES)
    notes[f"{EMPTY} / original DiT"] = timings[EMPTY].median / original
    notes[f"{EMPTY} / diffusers' DiT"] = timings[EMPTY].median / diffusers_dit
    promised = (
        ("compute operators a block of the coarse path", per_block[SIDES[0]], 15),
        ("time of the coarse path / original DiT", ours / original, 0.70),
        ("time of the coarse path / diffusers' DiT", ours / diffusers_dit, 0.45),
    )
    if args.device == "cpu":
        claims = [Claim(text, measured, limit, goal=1) for text, measured, limit in promised]
    else:
        claims = []
        notes |= {text: measured for text, measured, _ in promised}
    title = f"DiT: width {SHAPE.width}, {SHAPE.num_layers} blocks, {SHAPE.side**2} tokens, batch {BATCH_SIZE}"
    report(args, title, timings, claims, notes)


if __name__ == "__main__":
    main()
