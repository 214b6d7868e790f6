# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""RefineNet on packed fine tokens against RefineNet on the whole grid, on grain maps of photographs.

    python benchmarks/refine_net.py --fine_ratio 0.5 0.3 0.7

Both sides have the same weights, all of them random, and compute the same function (`dense_refine.py`). What depends
on the map alone is prepared beforehand on both sides, as sampling prepares it once for all its steps; that time is
reported by itself. The backward pass, to weights and inputs, is timed at the first fine ratio.
"""

import argparse
from collections.abc import Callable

import torch
from common import Claim, load_photographs, parse_args, real_grain_maps, report, time_sides
from dense_refine import DenseLayout, dense_refine
from torch import nn

from diffusers_d2it.grain_layout import GrainLayout
from diffusers_d2it.grains import fine_share, grain_map_to_cells, tie
from diffusers_d2it.models.transformer_d2it_content import RefineNet
from diffusers_d2it.presets import load_preset


NUM_GRAINS = 2
WINDOW_SIZE = 4
CHANNELS = 4


def build_refine_net(preset: dict) -> RefineNet:
    """RefineNet of a content preset with weights none of which is zero, so that every path is compared."""
    heads = preset["num_attention_heads"]
    refine_net = RefineNet(
        CHANNELS,
        CHANNELS,
        patch_size=1,
        dim=heads * preset["attention_head_dim"],
        num_layers=preset["num_refine_layers"],
        heads=heads,
        mlp_ratio=4.0,
        side=WINDOW_SIZE,
        frequency_shift=0.0,
    )
    for name, parameter in refine_net.named_parameters():
        nn.init.normal_(parameter, std=1.0 if name.endswith("relative_position_bias") else 0.03)
    return refine_net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fine_ratio", type=float, nargs="+", default=[0.5, 0.3, 0.7], help="shares of fine regions")
    parser.add_argument("--preset", default="content-b", help="preset of the content model")
    parser.add_argument("--batch_size", type=int, default=4, help="photographs")
    parser.add_argument("--images", help="folder of photographs; default: four that come with scikit-image")
    args = parse_args(parser, "refine_net")
    if not all(0 < fine_ratio <= 1 for fine_ratio in args.fine_ratio):
        parser.error("--fine_ratio: shares lie above 0, without fine regions there is nothing to time, and up to 1.")

    torch.manual_seed(0)
    refine_net = build_refine_net(load_preset(args.preset)).to(args.device)
    dim = refine_net.up_proj.in_features
    photographs = load_photographs(args.images, args.batch_size).to(args.device)
    batch = len(photographs)

    goal = 4 if args.device == "cpu" else None
    timings, claims, notes = {}, [], {}
    for fine_ratio in args.fine_ratio:
        grain_map = real_grain_maps(photographs, fine_ratio)
        rows, columns = grain_map.shape[1:]
        share = fine_share(grain_map, NUM_GRAINS).mean().item()
        latents = torch.randn(batch, CHANNELS, 2 * rows, 2 * columns, device=args.device)
        inputs = [
            torch.randn(batch * rows * columns, dim, device=args.device),  # tokens of the Multi-grained Net
            tie(latents, grain_map),
            torch.randn_like(latents),  # the rough noise
            torch.randint(0, 1000, (batch,), device=args.device),
            torch.randn(batch, dim, device=args.device),
        ]

        preparation = {
            f"packed, layout, r = {share:.2f}": lambda m=grain_map: GrainLayout.from_grain_map(
                m, NUM_GRAINS, WINDOW_SIZE
            ),
            f"dense, layout, r = {share:.2f}": lambda m=grain_map: DenseLayout.from_grain_map(m, WINDOW_SIZE),
        }
        packed_layout, dense_layout = (function() for function in preparation.values())
        timings |= time_sides(preparation, args)

        def packed(inputs: list = inputs, layout: GrainLayout = packed_layout) -> torch.Tensor:
            return refine_net(*inputs, layout.levels[0])[0]

        def dense(inputs: list = inputs, layout: DenseLayout = dense_layout) -> torch.Tensor:
            return dense_refine(refine_net, *inputs, layout)

        with torch.no_grad():
            expected = dense()
            fine = grain_map_to_cells(grain_map, 2)[:, None].bool().expand_as(expected)
            error = ((packed() - expected)[fine].abs().max() / expected[fine].abs().max()).item()
            packed_name, dense_name = f"packed, r = {share:.2f}", f"dense, r = {share:.2f}"
            timings |= time_sides({packed_name: packed, dense_name: dense}, args)
        ratio = timings[packed_name].median / timings[dense_name].median
        claims.append(Claim(f"packed / dense at fine share {share:.2f}", ratio, share + 0.05, goal=goal))
        claims.append(Claim(f"difference on fine cells at {share:.2f}, relative", error, 1e-5, goal=goal))

        if fine_ratio == args.fine_ratio[0]:
            inputs[0].requires_grad_()
            inputs[2].requires_grad_()
            weights = torch.randn_like(expected)
            packed_name += ", backward included"
            dense_name += ", backward included"
            timings |= time_sides(
                {
                    packed_name: lambda f=packed, w=weights: _train_step(f, w, refine_net),
                    dense_name: lambda f=dense, w=weights: _train_step(f, w, refine_net),
                },
                args,
            )
            ratio = timings[packed_name].median / timings[dense_name].median
            notes[f"packed / dense at {share:.2f}, backward included"] = ratio

    title = f"RefineNet of {args.preset}, {batch} images, {2 * rows}x{2 * columns} latents"
    report(args, title, timings, claims, notes)


def _train_step(forward: Callable[[], torch.Tensor], weights: torch.Tensor, refine_net: RefineNet) -> None:
    refine_net.zero_grad(set_to_none=True)
    (forward() * weights).sum().backward()


if __name__ == "__main__":
    main()
