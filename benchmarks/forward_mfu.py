# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Share of the machine's matrix product peak that a compiled forward reaches.

    python benchmarks/forward_mfu.py --device cuda     # content-xl, batch 64, bf16
    python benchmarks/forward_mfu.py                   # a small shape, batch 4, fp32

Counted are the multiply-adds of matrix products, convolutions and attention, each as two operations, by
`FlopCounterMode`: on the plain model with the tokens that the grain map asks for. What a faster form computes beyond
that is not counted, and what is elementwise never is. The peak is measured in the same process (`matmul_peak.py`),
before and after the timings; the higher of the two counts. Besides D2iT: its backbone alone, with all blocks, and the
original DiT, which compute the same function of equally many operations.
"""

import argparse
from collections.abc import Callable

import torch
from common import Claim, load_photographs, parse_args, real_grain_maps, report, time_sides
from matmul_peak import matmul_peak
from peers import CHANNELS, XL, DiTShape, all_fine_layout, backbone, cast, compiled, content_model, original_dit_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_d2it.grains import fine_share, tie


FINE_RATIO = 0.5
SMALL = DiTShape(num_layers=6, heads=6, head_dim=64, sample_size=32)


def count_operations(forward: Callable[[], object]) -> int:
    """Floating-point operations of one call, a multiply-add as two."""
    # Attention as two matrix products: a fused kernel that the counter does not know would count as nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def repeated_to(maps: torch.Tensor, batch_size: int) -> torch.Tensor:
    """(N, h, w) -> (batch_size, h, w): the maps of the photographs over and over."""
    return maps.repeat(-(-batch_size // len(maps)), 1, 1)[:batch_size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of photographs; default: four that come with scikit-image")
    args = parse_args(parser, "forward_mfu")
    cuda = args.device == "cuda"
    shape, num_refine_layers, dtype = (XL, 5, torch.bfloat16) if cuda else (SMALL, 1, torch.float32)
    batch_size = 64 if cuda else 4

    torch.manual_seed(0)
    photographs = load_photographs(args.images, limit=batch_size, size=16 * shape.side).to(args.device)
    grain_map = repeated_to(real_grain_maps(photographs, FINE_RATIO), batch_size)
    d2it, plain = content_model(shape, num_refine_layers), backbone(shape)
    original = original_dit_of(plain)
    latents = torch.randn(batch_size, CHANNELS, shape.sample_size, shape.sample_size, device=args.device)
    latents = tie(latents, grain_map).to(dtype)
    timestep = torch.randint(1000, (batch_size,), device=args.device)
    labels = torch.randint(shape.num_classes, (batch_size,), device=args.device)
    all_fine = all_fine_layout(plain, batch_size, args.device)

    def d2it_forward(model: nn.Module) -> Callable[[], torch.Tensor]:
        layout = model.prepare_grain_map(grain_map)
        return lambda: model(latents, timestep, layout, labels, return_dict=False)[0]

    forwards = {
        "D2iT": (d2it, d2it_forward),
        "backbone alone": (plain, lambda model: lambda: model(latents, timestep, all_fine, labels).sample),
        "original DiT": (original, lambda model: lambda: model(latents, timestep, labels)),
    }
    operations, sides = {}, {}
    with torch.no_grad():
        for name, (model, forward_of) in forwards.items():
            operations[name] = count_operations(forward_of(cast(model, args.device, dtype)))
            sides[name] = forward_of(compiled(model))
        peak = matmul_peak(args.device, dtype)
        timings = time_sides(sides, args)
        peak = max(peak, matmul_peak(args.device, dtype))

    notes = {
        "matrix product peak, TFLOP/s": peak / 1e12,
        "share of fine regions": fine_share(grain_map, 2).mean().item(),
    }
    shares = {}
    for name, timing in timings.items():
        shares[name] = operations[name] / (1e-3 * timing.median) / peak
        notes[f"billion multiply-adds an image, {name}"] = operations[name] / 2e9 / batch_size
        notes[f"images a second, {name}"] = batch_size / (1e-3 * timing.median)
    share = shares.pop("D2iT")
    notes |= {f"share of the peak, {name}": value for name, value in shares.items()}
    claims = []
    if cuda:
        claims.append(Claim("share of the matrix product peak, D2iT", share, 0.55, at_least=True, goal=3))
    else:
        notes["share of the peak, D2iT, small shape"] = share
    title = f"Compiled forward: width {shape.width}, {shape.num_layers} blocks, batch {batch_size}, {dtype}"
    report(args, title, timings, claims, notes)


if __name__ == "__main__":
    main()
