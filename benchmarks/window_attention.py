# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Attention inside windows against the same attention over all tokens of an image with the windows as a mask.

    python benchmarks/window_attention.py

All 1024 tokens of one image are fine. The goal is about the attention itself: both sides start from the same query,
key and value. With the four projections around it, which no attention can save, the layer is timed as well.
"""

import argparse

import torch
from common import Claim, parse_args, report, time_sides
from dense_refine import global_window_mask, masked_global_attention
from torch import nn

from diffusers_d2it.grain_layout import GrainLayout
from diffusers_d2it.models.window_attention import WindowAttention
from diffusers_d2it.presets import load_preset


NUM_GRAINS = 2
WINDOW_SIZE = 4
REGIONS = 16  # along a side of the map: 1024 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="content-b", help="preset of the content model, for its width and heads")
    args = parse_args(parser, "window_attention")

    torch.manual_seed(0)
    preset = load_preset(args.preset)
    heads, dim = preset["num_attention_heads"], preset["num_attention_heads"] * preset["attention_head_dim"]
    layer = WindowAttention(dim, heads, WINDOW_SIZE).to(args.device)
    nn.init.normal_(layer.relative_position_bias)
    all_fine = torch.ones(1, REGIONS, REGIONS, dtype=torch.int64, device=args.device)
    layout = GrainLayout.from_grain_map(all_fine, NUM_GRAINS, WINDOW_SIZE).levels[0]

    with torch.no_grad():
        tokens = torch.randn(1, 4 * REGIONS**2, dim, device=args.device)  # raster order
        packed_tokens = tokens[0, layout.tokens]
        mask = global_window_mask(
            layer, 2 * REGIONS, 2 * REGIONS, WINDOW_SIZE
        )  # built once: in favour of the dense side
        query, key, value = layer.project(tokens)
        attention = _without_projections(layer, [x[0, layout.tokens].contiguous() for x in (query, key, value)])

        def dense_layer() -> torch.Tensor:
            attended = masked_global_attention(*layer.project(tokens), mask)
            return layer.to_out[0](attended.flatten(-2))

        sides = {
            "window attention": lambda: attention(packed_tokens, layout),
            "masked dense attention": lambda: masked_global_attention(query, key, value, mask),
            "window attention, projections included": lambda: layer(packed_tokens, layout),
            "masked dense attention, projections included": dense_layer,
        }
        packed_output, dense_output = layer(packed_tokens, layout), dense_layer()[0, layout.tokens]
        error = (packed_output - dense_output).abs().max() / dense_output.abs().max()
        timings = time_sides(sides, args)

    window, dense, window_layer, dense_layer_time = (timing.median for timing in timings.values())
    goal = 5 if args.device == "cpu" else None
    report(
        args,
        f"attention of {tokens.shape[1]} tokens in windows of {WINDOW_SIZE}x{WINDOW_SIZE}, {args.preset}",
        timings,
        [
            Claim("window / masked dense attention", window / dense, 0.25, goal=goal),
            Claim("difference of outputs, relative", error.item(), 1e-5, goal=goal),
        ],
        notes={"the same ratio, projections included": window_layer / dense_layer_time},
    )


def _without_projections(layer: WindowAttention, projected: list[torch.Tensor]) -> WindowAttention:
    """The layer with its bias, but with given query, key and value and nothing after the attention."""
    attention = WindowAttention(layer.to_q.in_features, layer.heads, side=1)
    attention.relative_position_bias = layer.relative_position_bias
    attention.project = lambda hidden_states: projected
    attention.to_out = nn.ModuleList([nn.Identity()])
    return attention


if __name__ == "__main__":
    main()
