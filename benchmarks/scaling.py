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

import argparse
from collections.abc import Callable

import numpy as np
import torch
from common import Claim, Timing, parse_args, peak_memory, report, time_sides
from original_dit import CHANNELS, PATCH_SIZE, DiTShape, OriginalDiT
from peers import XL, cast, randomized
from photo_maps import CELL_SIZE, maps_of_shares, photograph_entropies

from diffusers_d2it import D2iTContentModel
from diffusers_d2it.grains import tie


SIDES = (32, 64, 128)  # cells
BATCHES = (1, 2, 4, 8)
FINE_RATIOS = (0.0, 0.3, 0.5, 0.7, 1.0)
SHARES = {2: (0.5, 0.5), 3: (1 / 3, 1 / 3, 1 / 3)}  # of each grain, coarsest first
SMALL = DiTShape(num_layers=3, heads=2, head_dim=32, sample_size=32)


class Scaling:
    """Makes the forwards of a shape, and measures them.

    Args:
        args: from `parse_args`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        cuda = args.device == "cuda"
        self.shape, self.num_refine_layers = (XL, 5) if cuda else (SMALL, 1)
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.models = {num_grains: self._content_model(num_grains) for num_grains in SHARES}

    def _content_model(self, num_grains: int) -> D2iTContentModel:
        model = D2iTContentModel(
            in_channels=CHANNELS,
            num_grains=num_grains,
            num_layers=self.shape.num_layers - self.num_refine_layers,
            num_refine_layers=self.num_refine_layers,
            num_attention_heads=self.shape.heads,
            attention_head_dim=self.shape.head_dim,
            num_classes=self.shape.num_classes,
        )
        return cast(randomized(model), self.args.device, self.dtype)

    def _conditioning(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        timestep = torch.full((batch_size,), 500, device=self.args.device)
        return timestep, torch.zeros(batch_size, dtype=torch.int64, device=self.args.device)

    def d2it(self, side: int, batch_size: int = 1, shares: tuple[float, ...] = SHARES[2]) -> Callable[[], object]:
        """A forward of the content model of as many grains as there are shares."""
        region_size = CELL_SIZE << (len(shares) - 1)
        entropy = photograph_entropies(batch_size, CELL_SIZE * side, region_size)
        grain_map = maps_of_shares(entropy, shares).to(self.args.device)
        latents = torch.randn(batch_size, CHANNELS, side, side, device=self.args.device, dtype=self.dtype)
        latents, (timestep, labels) = tie(latents, grain_map), self._conditioning(batch_size)
        model = self.models[len(shares)]
        layout = model.prepare_grain_map(grain_map)
        return lambda: model(latents, timestep, layout, labels, return_dict=False)[0]

    def refine_net(self, side: int, fine_ratio: float) -> tuple[Callable[[], object], int]:
        """A forward of RefineNet alone, and its number of fine tokens."""
        forward, refine_net, inputs = (
            self.d2it(side, 1, (1 - fine_ratio, fine_ratio)),
            self.models[2].refine_nets[0],
            [],
        )
        handle = refine_net.register_forward_pre_hook(lambda module, arguments: inputs.extend(arguments))
        forward()
        handle.remove()
        return lambda: refine_net(*inputs), len(inputs[-1].tokens)

    def dit(self, side: int) -> Callable[[], object]:
        """A forward of the DiT with a token for every cell.

        The plain statement has patches of 2. On latents of twice the side it has the tokens of patches of 1, and but
        for the values of a patch it does the same.
        """
        shape = DiTShape(
            self.shape.num_layers, self.shape.heads, self.shape.head_dim, PATCH_SIZE * side, self.shape.num_classes
        )
        model = cast(OriginalDiT(shape), self.args.device, self.dtype).eval()
        latents = torch.randn(1, CHANNELS, PATCH_SIZE * side, PATCH_SIZE * side, device=self.args.device)
        latents, (timestep, labels) = latents.to(self.dtype), self._conditioning(1)
        return lambda: model(latents, timestep, labels)

    def measure(self, forwards: dict[str, Callable[[], object]]) -> tuple[dict[str, Timing], dict[str, float]]:
        """Times in turns, and peaks in MiB."""
        timings = time_sides(forwards, self.args, warmup=1)
        return timings, {name: peak_memory(forward, self.args.device) for name, forward in forwards.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Fits
# ---------------------------------------------------------------------------------------------------------------------


def exponent(sizes: list[float], values: list[float]) -> float:
    """p of values ~ sizes ** p."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def line(sizes: list[float], values: list[float]) -> tuple[float, float, float]:
    """Slope and intercept of the line through the values, and the share of their variance that it explains."""
    slope, intercept = np.polyfit(sizes, values, 1)
    residuals = np.asarray(values) - (slope * np.asarray(sizes) + intercept)
    return float(slope), float(intercept), float(1 - residuals.var() / np.var(values))


def growth(what: str, sizes: list[float], names: list[str], timings: dict, memory: dict) -> dict[str, float]:
    """Exponents of the times and peaks of these sides."""
    return {
        f"exponent of time in {what}": exponent(sizes, [timings[name].median for name in names]),
        f"exponent of memory in {what}": exponent(sizes, [memory[name] for name in names]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What grows
# ---------------------------------------------------------------------------------------------------------------------


Result = tuple[dict[str, Timing], dict[str, float], list[Claim]]  # timings, notes, claims


def over_resolution(scaling: Scaling) -> Result:
    """Images of 256, 512 and 1024 pixels, with a DiT of all cells beside."""
    ours, theirs = ([f"{model}, {side} cells a side" for side in SIDES] for model in ("D2iT", "DiT of all cells"))
    forwards = {name: scaling.d2it(side) for name, side in zip(ours, SIDES)}
    forwards |= {name: scaling.dit(side) for name, side in zip(theirs, SIDES)}
    timings, memory = scaling.measure(forwards)
    cells = [side**2 for side in SIDES]
    notes = growth("cells, D2iT", cells, ours, timings, memory)
    notes |= growth("cells, DiT of all cells", cells, theirs, timings, memory)
    for name, other, side in zip(ours, theirs, SIDES):
        notes[f"D2iT / DiT of all cells, {side} cells a side, time"] = timings[name].median / timings[other].median
        notes[f"D2iT / DiT of all cells, {side} cells a side, memory"] = memory[name] / memory[other]
    claim = Claim("exponent of D2iT's memory in cells", notes.pop("exponent of memory in cells, D2iT"), 1.1)
    return timings, notes | {f"MiB, {name}": value for name, value in memory.items()}, [claim]


def over_batch(scaling: Scaling) -> Result:
    """One to eight images."""
    names = [f"D2iT, {SIDES[0]} cells a side, batch {batch_size}" for batch_size in BATCHES]
    forwards = {name: scaling.d2it(SIDES[0], batch_size) for name, batch_size in zip(names, BATCHES)}
    timings, memory = scaling.measure(forwards)
    notes = growth("images", list(BATCHES), names, timings, memory)
    return timings, notes | {f"MiB, {name}": value for name, value in memory.items()}, []


def over_fine_ratio(scaling: Scaling) -> Result:
    """No fine region to all: the whole forward, and the memory of RefineNet at the highest resolution."""
    names = [f"D2iT, {SIDES[1]} cells a side, fine share {ratio}" for ratio in FINE_RATIOS]
    shares = [(1 - ratio, ratio) for ratio in FINE_RATIOS]
    forwards = {name: scaling.d2it(SIDES[1], 1, share) for name, share in zip(names, shares)}
    timings, memory = scaling.measure(forwards)
    notes = {f"MiB, {name}": value for name, value in memory.items()}
    times = [timings[name].median for name in names]
    slope, intercept, explained = line(FINE_RATIOS, times)
    notes["time, all regions fine / none, by the line"] = (slope + intercept) / intercept
    notes["share of the times' variance on a line in the fine share"] = explained

    packed = [scaling.refine_net(SIDES[-1], ratio) for ratio in FINE_RATIOS[1:]]
    tokens = [num_tokens for _, num_tokens in packed]
    peaks = [peak_memory(forward, scaling.args.device) for forward, _ in packed]
    slope, intercept, explained = line(tokens, peaks)
    notes[f"RefineNet, {SIDES[-1]} cells a side: MiB for 1000 fine tokens"] = 1000 * slope
    notes[f"RefineNet, {SIDES[-1]} cells a side: MiB for any map"] = intercept
    text = f"RefineNet, {SIDES[-1]} cells a side: share of the peaks' variance on a line in fine tokens"
    return timings, notes, [Claim(text, explained, 0.99, at_least=True)]


def over_grains(scaling: Scaling) -> Result:
    """Two and three grains in equal shares, at the two higher resolutions."""
    forwards = {
        f"D2iT, {side} cells a side, {num_grains} grains": scaling.d2it(side, 1, shares)
        for side in SIDES[1:]
        for num_grains, shares in SHARES.items()
    }
    timings, memory = scaling.measure(forwards)
    notes = {f"MiB, {name}": value for name, value in memory.items()}
    for side in SIDES[1:]:
        two, three = (f"D2iT, {side} cells a side, {num_grains} grains" for num_grains in SHARES)
        notes[f"three grains / two, {side} cells a side, time"] = timings[three].median / timings[two].median
        notes[f"three grains / two, {side} cells a side, memory"] = memory[three] / memory[two]
    return timings, notes, []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_args(parser, "scaling")

    torch.manual_seed(0)
    scaling = Scaling(args)
    timings, notes, claims = {}, {}, []
    with torch.no_grad():
        for measure in (over_resolution, over_batch, over_fine_ratio, over_grains):
            more_timings, more_notes, more_claims = measure(scaling)
            timings |= more_timings
            notes |= more_notes
            claims += more_claims
    shape = scaling.shape
    title = (
        f"Growth of a forward: width {shape.width}, {shape.num_layers - scaling.num_refine_layers} blocks and"
        f" {scaling.num_refine_layers} of each RefineNet, DiT of {shape.num_layers}, {scaling.dtype}"
    )
    report(args, title, timings, claims, notes)


if __name__ == "__main__":
    main()
