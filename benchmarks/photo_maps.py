# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Photographs, and grain maps of as many crops of them as a benchmark asks for, of any size and number of grains.

The photographs are the colour ones that come with scikit-image, nothing is downloaded. The largest has 1411 pixels a
side, most have about 500: a crop of 1024 pixels is mostly an enlarged one, smoother than a photograph of that size.
Grains go by rank of entropy, so their shares are what was asked for all the same.

Shapes:
    N images, h w sides of the grain map in regions, k grains
"""

import numpy as np
import torch
from PIL import Image, ImageOps

from diffusers_d2it.entropy import region_entropy
from diffusers_d2it.pixels import from_uint8


CELL_SIZE = 8  # pixels along a side of the finest cell of latents
PHOTOGRAPHS = ["astronaut", "chelsea", "coffee", "rocket", "retina"]
PHOTOGRAPHS += ["hubble_deep_field", "immunohistochemistry", "stereo_motorcycle"]


def load_photographs(limit: int = 4, size: int = 256) -> torch.Tensor:
    """Photographs as (N, 3, size, size) in [-1, 1], N at most `limit`, cut to their central square and scaled."""
    images = [ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS) for image in _photographs(limit)]
    return torch.stack([_pixels(image) for image in images])


def photograph_entropies(count: int, size: int, region_size: int) -> torch.Tensor:
    """Entropy of the regions of `count` random crops, (N, h, w): photographs in turn, 0.6 to 1 of their shorter side.

    A crop is scaled to `size` pixels a side; a region has `region_size`, which divides it.
    """
    draw, photographs, entropies = np.random.default_rng(0), _photographs(count), []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        side = int(min(photograph.size) * draw.uniform(0.6, 1))
        left, top = (int(draw.integers(extent - side + 1)) for extent in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        entropies.append(region_entropy(_pixels(crop)[None], region_size))
    return torch.cat(entropies)


def maps_of_shares(entropy: torch.Tensor, shares: tuple[float, ...]) -> torch.Tensor:
    """Grain maps (N, h, w) in which each grain, coarsest first, has its share of all regions of all images."""
    rank = entropy.flatten().argsort().argsort()
    bounds = (torch.tensor(shares, device=rank.device).cumsum(0)[:-1] * len(rank)).round()
    return torch.bucketize(rank.float(), bounds, right=True).view(entropy.shape)


def real_grain_maps(pixels: torch.Tensor, fine_ratio: float, count: int | None = None) -> torch.Tensor:
    """Maps (N, h, w) of images, two grains, with this share of fine regions over all; over and over, up to `count`."""
    maps = maps_of_shares(region_entropy(pixels), (1 - fine_ratio, fine_ratio))
    return maps if count is None else maps.repeat(-(-count // len(maps)), 1, 1)[:count]


def _photographs(limit: int) -> list[Image.Image]:
    from skimage import data

    arrays = (getattr(data, name)() for name in PHOTOGRAPHS[:limit])
    return [Image.fromarray(array[0] if isinstance(array, tuple) else array).convert("RGB") for array in arrays]


def _pixels(image: Image.Image) -> torch.Tensor:
    """(3, height, width) in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1).contiguous()
