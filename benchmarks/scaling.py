# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How time and memory of a forward grow with resolution, batch, fine ratio and number of grains.

    python benchmarks/scaling.py --device cuda     # content-xl, bf16
    python benchmarks/scaling.py                   # a few narrow layers, fp32

Latents of 32, 64 and 128 cells a side, as images of 256, 512 and 1024 pixels have. The reference is a DiT of the same
width and depth with a token for every cell, the original DiT in patches of 1: it spends everywhere what D2iT spends
where a region is fine, and more. Exponents are those of the power law that fits the measurements best, by least
squares on logarithms. In narrow layers attention over all tokens, which grows with their square, weighs more than in
wide ones.

Maps are those of crops of photographs, and prepared beforehand, as sampling does. With three grains a region has twice
the side, so the Multi-grained Net has a quarter of the tokens. Memory is the peak beyond weights and inputs.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from common import Bench, main
from original_dit import PATCH_SIZE, DiTShape, OriginalDiT
from peers import XL, Forward, Inputs, cast, content_model, forward_of
from photo_maps import CELL_SIZE, maps_of_shares, photograph_entropies


SIDES = (32, 64, 128)  # cells
BATCHES = (1, 2, 4, 8)
FINE_RATIOS = (0.0, 0.3, 0.5, 0.7, 1.0)
SHARES = {2: (0.5, 0.5), 3: (1 / 3, 1 / 3, 1 / 3)}  # of each grain, coarsest first
SMALL = DiTShape(num_layers=3, heads=2, head_dim=32, sample_size=32)


class Scaling:
    """Makes the forwards of a shape, and measures them."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.shape, self.num_refine_layers = (XL, 5) if bench.cuda else (SMALL, 1)
        self.dtype = torch.bfloat16 if bench.cuda else torch.float32
        models = {num_grains: content_model(self.shape, self.num_refine_layers, num_grains) for num_grains in SHARES}
        self.models = {num_grains: cast(model, bench.device, self.dtype) for num_grains, model in models.items()}

    def d2it(self, side: int, batch_size: int = 1, shares: tuple[float, ...] = SHARES[2]) -> Forward:
        """A forward of the content model of as many grains as there are shares."""
        cells = 1 << (len(shares) - 1)  # along a side of a region
        entropy = photograph_entropies(batch_size, CELL_SIZE * side, CELL_SIZE * cells)
        grain_map = maps_of_shares(entropy, shares).to(self.bench.device)
        return forward_of(self.models[len(shares)], Inputs.random(grain_map, cells=cells).to(self.dtype))

    def refine_net(self, side: int, fine_ratio: float) -> tuple[Callable[[], object], int]:
        """A forward of RefineNet alone, and its number of fine tokens."""
        forward, inputs = self.d2it(side, 1, (1 - fine_ratio, fine_ratio)), []
        refine_net = self.models[2].refine_nets[0]
        handle = refine_net.register_forward_pre_hook(lambda module, arguments: inputs.extend(arguments))
        forward()
        handle.remove()
        return lambda: refine_net(*inputs), len(inputs[-1].tokens)

    def dit(self, side: int) -> Forward:
        """A forward of the DiT with a token for every cell.

        The plain statement has patches of 2. On latents of twice the side it has the tokens of patches of 1, and but
        for the values of a patch it does the same.
        """
        shape = dataclasses.replace(self.shape, sample_size=PATCH_SIZE * side)
        fine = torch.ones(1, side, side, dtype=torch.int64, device=self.bench.device)
        model = cast(OriginalDiT(shape), self.bench.device, self.dtype).eval()
        return forward_of(model, Inputs.random(fine).to(self.dtype))

    def measure(self, forwards: dict[str, Forward]) -> tuple[dict[str, float], dict[str, float]]:
        """Medians of times in turns, and peaks in MiB, which are noted."""
        memory = {name: self.bench.peak_memory(forward) for name, forward in forwards.items()}
        for name, peak in memory.items():
            self.bench.note(f"MiB, {name}", peak)
        return self.bench.time(forwards, warmup=1), memory


def exponent(sizes: list[float], values: list[float]) -> float:
    """p of values ~ sizes ** p."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def line(sizes: list[float], values: list[float]) -> tuple[float, float, float]:
    """Slope and intercept of the line through the values, and the share of their variance that it explains."""
    slope, intercept = np.polyfit(sizes, values, 1)
    residuals = np.asarray(values) - (slope * np.asarray(sizes) + intercept)
    return float(slope), float(intercept), float(1 - residuals.var() / np.var(values))


def over_resolution(scaling: Scaling) -> None:
    """Images of 256, 512 and 1024 pixels, with a DiT of all cells beside."""
    bench, cells = scaling.bench, [side**2 for side in SIDES]
    names = {model: [f"{model}, {side} cells a side" for side in SIDES] for model in ("D2iT", "DiT of all cells")}
    forwards = dict(zip(names["D2iT"], map(scaling.d2it, SIDES)))
    forwards |= zip(names["DiT of all cells"], map(scaling.dit, SIDES))
    median, memory = scaling.measure(forwards)
    for model, of_model in names.items():
        bench.note(f"exponent of time in cells, {model}", exponent(cells, [median[name] for name in of_model]))
    theirs = names["DiT of all cells"]
    bench.note("exponent of memory in cells, DiT of all cells", exponent(cells, [memory[name] for name in theirs]))
    for name, other, side in zip(*names.values(), SIDES):
        bench.note(f"D2iT / DiT of all cells, {side} cells a side, time", median[name] / median[other])
        bench.note(f"D2iT / DiT of all cells, {side} cells a side, memory", memory[name] / memory[other])
    ours = exponent(cells, [memory[name] for name in names["D2iT"]])
    bench.claim("exponent of D2iT's memory in cells", ours, 1.1)


def over_batch(scaling: Scaling) -> None:
    """One to eight images."""
    names = [f"D2iT, {SIDES[0]} cells a side, batch {batch_size}" for batch_size in BATCHES]
    found = scaling.measure({name: scaling.d2it(SIDES[0], size) for name, size in zip(names, BATCHES)})
    for what, values in zip(("time", "memory"), found):
        scaling.bench.note(f"exponent of {what} in images", exponent(list(BATCHES), [values[name] for name in names]))


def over_fine_ratio(scaling: Scaling) -> None:
    """No fine region to all: the whole forward, and the memory of RefineNet at the highest resolution."""
    bench, side = scaling.bench, SIDES[-1]
    names = [f"D2iT, {SIDES[1]} cells a side, fine share {ratio}" for ratio in FINE_RATIOS]
    forwards = {name: scaling.d2it(SIDES[1], 1, (1 - ratio, ratio)) for name, ratio in zip(names, FINE_RATIOS)}
    median, _ = scaling.measure(forwards)
    slope, intercept, explained = line(FINE_RATIOS, [median[name] for name in names])
    bench.note("time, all regions fine / none, by the line", (slope + intercept) / intercept)
    bench.note("share of the times' variance on a line in the fine share", explained)

    packed = [scaling.refine_net(side, ratio) for ratio in FINE_RATIOS[1:]]
    peaks = [bench.peak_memory(forward) for forward, _ in packed]
    slope, intercept, explained = line([num_tokens for _, num_tokens in packed], peaks)
    bench.note(f"RefineNet, {side} cells a side: MiB for 1000 fine tokens", 1000 * slope)
    bench.note(f"RefineNet, {side} cells a side: MiB for any map", intercept)
    text = f"RefineNet, {side} cells a side: share of the peaks' variance on a line in fine tokens"
    bench.claim(text, explained, 0.99, at_least=True)


def over_grains(scaling: Scaling) -> None:
    """Two and three grains in equal shares, at the two higher resolutions."""
    names = {(side, k): f"D2iT, {side} cells a side, {k} grains" for side in SIDES[1:] for k in SHARES}
    found = scaling.measure({name: scaling.d2it(side, 1, SHARES[k]) for (side, k), name in names.items()})
    for side in SIDES[1:]:
        for what, values in zip(("time", "memory"), found):
            ratio = values[names[side, 3]] / values[names[side, 2]]
            scaling.bench.note(f"three grains / two, {side} cells a side, {what}", ratio)


@torch.no_grad()
def measure(bench: Bench) -> str:
    torch.manual_seed(0)
    scaling = Scaling(bench)
    for grow in (over_resolution, over_batch, over_fine_ratio, over_grains):
        grow(scaling)
    shape, refining = scaling.shape, scaling.num_refine_layers
    blocks = f"{shape.num_layers - refining} blocks and {refining} of each RefineNet, DiT of {shape.num_layers}"
    return f"Growth of a forward: width {shape.width}, {blocks}, {scaling.dtype}"


if __name__ == "__main__":
    main(measure)
