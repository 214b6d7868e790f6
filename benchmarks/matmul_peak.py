# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The machine's matrix product peak, which achieved FLOP/s are divided by: measured, never taken from a data sheet."""

import torch
from common import Bench


SIDES = {"cpu": (512, 1024, 1536), "cuda": (4096, 8192, 16384)}  # of square matrices
TURNS = 10
TURN_SECONDS = {"cpu": 0.02, "cuda": 0.05}  # of products that follow one another without a pause


def matmul_peak(bench: Bench, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product, one multiply-add counted as two, as `FlopCounterMode` counts.

    The best of several sizes and the best turn of each: what the machine can do at all, so that no share of it is
    flattered by a slow turn. The entries are random: products of zeros run faster on some accelerators.
    """
    return max(2 * side**3 / _seconds(side, bench, dtype) for side in SIDES[bench.device])


def _seconds(side: int, bench: Bench, dtype: torch.dtype) -> float:
    """Seconds a product of two (side, side) matrices takes in the best turn."""
    left, right = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def turn(products: int) -> float:
        start = bench.clock()
        for _ in range(products):
            torch.mm(left, right, out=product)
        bench.synchronize()
        return (bench.clock() - start) / products

    turn(1)  # libraries are loaded and kernels chosen here
    products = max(1, round(TURN_SECONDS[bench.device] / turn(1)))
    return min(turn(products) for _ in range(TURNS))
