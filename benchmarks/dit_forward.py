# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The coarse path, itself a DiT, against the original DiT and diffusers' DiT at a size where operators cost the time.

    python benchmarks/dit_forward.py

Width 64, 28 layers, 16 tokens, batch 1: the time of a forward is that of its operators, as it is at any width for a
small batch on an accelerator. The coarse path is the content model with its RefineNets taken away (`peers.backbone`);
all sides have the same weights and compute the same function, which is checked. The content model with one layer of
RefineNet on a map without fine regions, where that layer has no token, is timed too.

A compute operator is a call that reaches torch's dispatcher and returns new memory, writes to memory, or hands a value
to Python. One whose outputs all share storage with an input (views, a reshape that need not copy) is none. The
operators of a block are the difference between two depths: what happens once for all blocks counts for none of them.
"""

import copy
import dataclasses
from collections.abc import Callable

import peers
import torch
from common import Bench, Flag, main
from peers import DIFFUSERS, ORIGINAL, DiTShape, Forward, Inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


SHAPE = DiTShape(num_layers=28, heads=4, head_dim=16, sample_size=8)  # width 64, 16 tokens
OURS, FUSED, EMPTY = "coarse path", "coarse path, fused", "coarse path and a RefineNet without tokens"


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


def sides_of(shape: DiTShape, inputs: Inputs, compile: bool) -> dict[str, Forward]:
    """Forwards of the models of one shape, with the same weights and inputs."""
    ours = peers.backbone(shape)
    models = {OURS: ours, FUSED: copy.deepcopy(ours)} | peers.peers_of(ours)
    models[FUSED].fuse_qkv_projections()
    models = {name: model.to(inputs.latents.device) for name, model in models.items()}
    if compile:
        models |= {f"{name}, compiled": peers.compiled(model) for name, model in models.items()}
    return {name: peers.forward_of(model, inputs) for name, model in models.items()}


def side_without_fine_tokens(device: str) -> Forward:
    """Forward of the content model with one block of RefineNet more, on a map that leaves it no token."""
    model = peers.content_model(dataclasses.replace(SHAPE, num_layers=SHAPE.num_layers + 1), num_refine_layers=1)
    all_coarse = torch.zeros(1, SHAPE.side, SHAPE.side, dtype=torch.int64, device=device)
    return peers.forward_of(model.to(device), Inputs.random(all_coarse))


@torch.no_grad()
def measure(bench: Bench, compile: bool) -> str:
    torch.manual_seed(0)
    shallow = dataclasses.replace(SHAPE, num_layers=SHAPE.num_layers // 2)
    inputs = Inputs.random(torch.ones(1, SHAPE.side, SHAPE.side, dtype=torch.int64, device=bench.device))
    sides, at_half = sides_of(SHAPE, inputs, compile), sides_of(shallow, inputs, compile=False)
    error = peers.check_equal({name: forward() for name, forward in sides.items()}, 1e-5)
    bench.note("largest relative difference of the sides", error)
    per_block = {}
    for name, forward in at_half.items():
        operators = count_operators(sides[name])
        per_block[name] = (operators - count_operators(forward)) / (SHAPE.num_layers - shallow.num_layers)
        bench.note(f"operators of the forward, {name}", operators)
        bench.note(f"operators a block, {name}", per_block[name])
    median = bench.time(sides | {EMPTY: side_without_fine_tokens(bench.device)})
    for form in ("", ", compiled") if compile else ("",):
        for ours in (OURS, FUSED, EMPTY) if not form else (OURS, FUSED):
            for peer in (ORIGINAL, DIFFUSERS):
                bench.note(f"{ours}{form} / {peer}{form}", median[ours + form] / median[peer + form])
    bench.claim("compute operators a block, coarse path", per_block[OURS], 17, goal=1)
    bench.claim("compute operators a block, coarse path, fused", per_block[FUSED], 15, goal=1)
    return f"DiT: width {SHAPE.width}, {SHAPE.num_layers} blocks, {SHAPE.side**2} tokens, batch 1"


if __name__ == "__main__":
    main(measure, compile=Flag(True, "compiled forms too"))
