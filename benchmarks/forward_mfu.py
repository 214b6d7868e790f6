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

from collections.abc import Callable

import torch
from common import Bench, main
from matmul_peak import matmul_peak
from peers import XL, DiTShape, Inputs, backbone, cast, compiled, content_model, forward_of, original_dit_of
from photo_maps import load_photographs, real_grain_maps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_d2it.grains import fine_share


FINE_RATIO = 0.5
SMALL = DiTShape(num_layers=6, heads=6, head_dim=64, sample_size=32)


def count_operations(forward: Callable[[], object]) -> int:
    """Floating-point operations of one call, a multiply-add as two."""
    # Attention as two matrix products: a fused kernel that the counter does not know would count as nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


@torch.no_grad()
def measure(bench: Bench) -> str:
    shape, num_refine_layers, dtype = (XL, 5, torch.bfloat16) if bench.cuda else (SMALL, 1, torch.float32)
    batch_size = 64 if bench.cuda else 4

    torch.manual_seed(0)
    photographs = load_photographs(batch_size, size=16 * shape.side).to(bench.device)
    inputs = Inputs.random(real_grain_maps(photographs, FINE_RATIO, batch_size)).to(dtype)
    bench.note("share of fine regions", fine_share(inputs.grain_map, 2).mean().item())
    models = {"D2iT": content_model(shape, num_refine_layers), "backbone alone": backbone(shape)}
    models["original DiT"] = original_dit_of(models["backbone alone"])
    operations, sides = {}, {}
    for name, model in models.items():
        of_model = inputs if name == "D2iT" else inputs.all_fine()
        operations[name] = count_operations(forward_of(cast(model, bench.device, dtype), of_model))
        sides[name] = forward_of(compiled(model), of_model)
    peak = matmul_peak(bench, dtype)
    median = bench.time(sides)
    peak = max(peak, matmul_peak(bench, dtype))

    bench.note("matrix product peak, TFLOP/s", peak / 1e12)
    for name, milliseconds in median.items():
        share = operations[name] / (1e-3 * milliseconds) / peak
        if name == "D2iT":
            bench.claim("share of the matrix product peak, D2iT", share, 0.55, at_least=True, goal=3)
        else:
            bench.note(f"share of the peak, {name}", share)
        bench.note(f"billion multiply-adds an image, {name}", operations[name] / 2e9 / batch_size)
        bench.note(f"images a second, {name}", batch_size / (1e-3 * milliseconds))
    return f"Compiled forward: width {shape.width}, {shape.num_layers} blocks, batch {batch_size}, {dtype}"


if __name__ == "__main__":
    main(measure)
