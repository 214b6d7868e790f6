# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Attention inside windows against the same attention over all tokens of an image with the windows as a mask.

    python benchmarks/window_attention.py

All 1024 tokens of one image are fine. The goal is about the attention itself: both sides start from the same query,
key and value. With the four projections around it, which no attention can save, the layer is timed as well.
"""

import torch
from common import Bench, Flag, main
from dense_refine import global_window_mask, masked_global_attention
from peers import relative_error
from torch import nn

from diffusers_d2it import load_preset
from diffusers_d2it.models.refine_net import WindowAttention, pack_levels


NUM_GRAINS = 2
WINDOW_SIZE = 4
REGIONS = 16  # along a side of the map: 1024 tokens


@torch.no_grad()
def measure(bench: Bench, preset: str) -> str:
    torch.manual_seed(0)
    config = load_preset(preset)
    heads, dim = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
    layer = WindowAttention(dim, heads, WINDOW_SIZE).to(bench.device)
    nn.init.normal_(layer.relative_position_bias)
    all_fine = torch.ones(1, REGIONS, REGIONS, dtype=torch.int64, device=bench.device)
    (layout,) = pack_levels(all_fine, NUM_GRAINS, WINDOW_SIZE, rounded=False)

    tokens = torch.randn(1, 4 * REGIONS**2, dim, device=bench.device)  # raster order
    packed_tokens = tokens[0, layout.tokens].unflatten(0, (-1, 4))  # (N / 4, 4, D)
    mask = global_window_mask(layer, 2 * REGIONS, 2 * REGIONS, WINDOW_SIZE)  # built once: in favour of the dense side
    query, key, value = layer.project(tokens)
    attention = without_projections(layer, [x[0, layout.tokens].unflatten(0, (-1, 4)) for x in (query, key, value)])

    def dense_layer() -> torch.Tensor:
        attended = masked_global_attention(*layer.project(tokens), mask)
        return layer.to_out[0](attended.flatten(-2))

    error = relative_error(layer(packed_tokens, layout), dense_layer()[0, layout.tokens].view_as(packed_tokens))
    sides = {
        "window attention": lambda: attention(packed_tokens, layout),
        "masked dense attention": lambda: masked_global_attention(query, key, value, mask),
        "window attention, projections included": lambda: layer(packed_tokens, layout),
        "masked dense attention, projections included": dense_layer,
    }
    window, dense, window_layer, dense_layer_time = bench.time(sides).values()
    bench.claim("window / masked dense attention", window / dense, 0.25, goal=5)
    bench.claim("difference of outputs, relative", error, 1e-5, goal=5)
    bench.note("the same ratio, projections included", window_layer / dense_layer_time)
    return f"attention of {tokens.shape[1]} tokens in windows of {WINDOW_SIZE}x{WINDOW_SIZE}, {preset}"


def without_projections(layer: WindowAttention, projected: list[torch.Tensor]) -> WindowAttention:
    """The layer with its bias, but with given query, key and value and nothing after the attention."""
    attention = WindowAttention(layer.to_q.in_features, layer.heads, side=1)
    attention.relative_position_bias = layer.relative_position_bias
    attention.project = lambda hidden_states: projected
    attention.to_out = nn.ModuleList([nn.Identity()])
    return attention


if __name__ == "__main__":
    main(measure, preset=Flag("content-b", "preset of the content model, for its width and heads"))
