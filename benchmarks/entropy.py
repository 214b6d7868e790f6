# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Entropy of the regions of one 256x256 image: `region_entropy` against Eqs. 2-3 of arXiv:2504.09454 as they stand.

    python benchmarks/entropy.py

The direct side takes one exponential for every pixel and every bin. Errors are against it in double precision.
"""

import torch
from common import Bench, main
from einops import rearrange
from photo_maps import load_photographs

from diffusers_d2it.entropy import LUMA_WEIGHTS, NUM_BINS, SIGMA, region_entropy


def direct_entropy(pixels: torch.Tensor, region_size: int = 16) -> torch.Tensor:
    """Eqs. 2-3 by broadcasting pixels against bins, the density divided by its sum: (B, 3, H, W) -> (B, h, w)."""
    luma_weights = torch.tensor(LUMA_WEIGHTS, dtype=pixels.dtype, device=pixels.device)
    luma = torch.einsum("bchw,c->bhw", pixels, luma_weights) * 0.5 + 0.5
    luma = rearrange(luma, "b (h p) (w q) -> b h w (p q) 1", p=region_size, q=region_size)
    bins = torch.linspace(0, 1, NUM_BINS, dtype=pixels.dtype, device=pixels.device)
    kernel = luma - bins  # (B, h, w, S * S, bins)
    density = kernel.square_().mul_(-0.5 / SIGMA**2).exp_().sum(dim=-2)
    density = density / density.sum(dim=-1, keepdim=True)
    return torch.special.entr(density).sum(dim=-1)


def max_error(images: torch.Tensor) -> float:
    """Largest error of `region_entropy` in nats, image by image against the direct sum in float64."""
    differences = (region_entropy(image) - direct_entropy(image.double()) for image in images.split(1))
    return max(difference.abs().max().item() for difference in differences)


def synthetic_images(device: str) -> dict[str, torch.Tensor]:
    """What photographs do not have: flat regions at any level, between bins too, white noise, and near-black."""
    generator = torch.Generator().manual_seed(0)
    level = torch.rand(4, 1, 16, 16, generator=generator) * 2 - 1
    flat = level.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat(1, 3, 1, 1)
    noise = torch.rand(1, 3, 256, 256, generator=generator)
    images = {"flat regions": flat, "white noise": noise * 2 - 1, "near black": noise * 0.05 - 1}
    return {name: image.to(device) for name, image in images.items()}


@torch.no_grad()
def measure(bench: Bench) -> str:
    photographs = load_photographs().to(bench.device)
    image = photographs[:1]
    sides = {"region_entropy": lambda: region_entropy(image), "direct broadcast": lambda: direct_entropy(image)}
    fast, direct = bench.time(sides).values()
    memory = {name: bench.peak_memory(function) for name, function in sides.items()}
    errors = {"photographs": max_error(photographs)}
    errors |= {name: max_error(images) for name, images in synthetic_images(bench.device).items()}
    bench.claim("ms an image", fast, 2.0, goal=10)
    bench.claim("direct broadcast / region_entropy", direct / fast, 100, at_least=True, goal=10)
    bench.claim("error in nats", max(errors.values()), 2e-5, goal=10)
    bench.claim("MiB an image", memory["region_entropy"], 8, goal=10)
    for name, error in errors.items():
        bench.note(f"error on {name} (nats)", error)
    bench.note("peak memory of direct broadcast (MiB)", memory["direct broadcast"])
    return "entropy of one 256x256 image"


if __name__ == "__main__":
    main(measure)
