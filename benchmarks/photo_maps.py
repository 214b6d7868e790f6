# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Grain maps of as many crops of photographs as a benchmark asks for, of any size and number of grains.

The photographs are the colour ones that come with scikit-image, nothing is downloaded. The largest has 1411 pixels a
side, most have about 500: a crop of 1024 pixels is mostly an enlarged one, smoother than a photograph of that size.
Grains go by rank of entropy, so their shares are what was asked for all the same.

Shapes:
    N images, h w sides of the grain map in regions, k grains
"""

import numpy as np
import torch
from PIL import Image

from diffusers_d2it.entropy import region_entropy


CELL_SIZE = 8  # pixels along a side of the finest cell of latents
PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "rocket",
    "stereo_motorcycle",
)


def photograph_entropies(count: int, size: int, region_size: int, seed: int = 0) -> torch.Tensor:
    """Entropy of the regions of random crops, (N, h, w): each photograph in turn, 0.6 to 1 of its shorter side.

    Args:
        count: N.
        size: side of a crop in pixels after scaling.
        region_size: side of a region in pixels; divides `size`.
        seed: fixes the crops.
    """
    from skimage import data

    draw = np.random.default_rng(seed)
    arrays = (getattr(data, name)() for name in PHOTOGRAPHS[:count])
    photographs = [Image.fromarray(array[0] if isinstance(array, tuple) else array) for array in arrays]
    entropies = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        side = int(min(photograph.size) * draw.uniform(0.6, 1))
        left, top = (int(draw.integers(extent - side + 1)) for extent in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        entropies.append(region_entropy(pixels, region_size))
    return torch.cat(entropies)


def maps_of_shares(entropy: torch.Tensor, shares: tuple[float, ...]) -> torch.Tensor:
    """Grain maps (N, h, w) in which each grain has its share of the regions of all images together, not of each.

    Args:
        entropy: of the regions, (N, h, w).
        shares: of each grain, coarsest first; they sum to 1.
    """
    rank = entropy.flatten().argsort().argsort()
    bounds = (torch.tensor(shares).cumsum(0)[:-1] * len(rank)).round()
    return torch.bucketize(rank.float(), bounds, right=True).view(entropy.shape)
