# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pictures of grain maps, in the colours of the paper's figures: red is fine, blue is coarse."""

import numpy as np
import PIL.Image
import torch


_FINE = np.array([214, 39, 40], dtype=np.float32)
_COARSE = np.array([31, 119, 180], dtype=np.float32)
_OPACITY = 0.5


def visualize_grain_map(
    image: PIL.Image.Image, grain_map: torch.Tensor | np.ndarray, num_grains: int | None = None
) -> PIL.Image.Image:
    """Lay a grain map over its image: red regions are fine, blue ones coarse, as in Fig. 3 of arXiv:2504.09454.

    Args:
        image: the picture, H x W pixels.
        grain_map: (h, w), or (1, h, w), integers, 0 = coarsest; H and W are multiples of h and w.
        num_grains: k; with three or more the colours between blue and red follow the grain. None: as many as the map
            shows, at least two.

    Returns:
        An RGB picture of the size of `image`.

    Raises:
        ValueError: the map has another number of dimensions, holds no integers or other grains than 0 ... k - 1, or
            does not divide the picture.
    """
    grains = np.asarray(grain_map.cpu() if isinstance(grain_map, torch.Tensor) else grain_map)
    if grains.ndim == 3 and len(grains) == 1:
        grains = grains[0]
    if grains.ndim != 2 or not np.issubdtype(grains.dtype, np.integer):
        raise ValueError(f"`grain_map` must be integers of shape (h, w), got {grains.dtype} of shape {grains.shape}.")
    rows, columns = grains.shape
    if image.height % rows or image.width % columns:
        raise ValueError(
            f"`grain_map` of {rows}x{columns} regions does not divide an image of {image.height}x{image.width} pixels."
        )
    if num_grains is None:
        num_grains = max(2, int(grains.max()) + 1)
    if grains.min() < 0 or grains.max() >= num_grains:
        raise ValueError(f"`grain_map` must hold grains 0 to {num_grains - 1}, got {grains.min()} to {grains.max()}.")
    fineness = grains / (num_grains - 1)
    colours = _COARSE + (_FINE - _COARSE) * fineness[..., None]
    colours = colours.repeat(image.height // rows, axis=0).repeat(image.width // columns, axis=1)
    blended = (1 - _OPACITY) * np.asarray(image.convert("RGB"), dtype=np.float32) + _OPACITY * colours
    return PIL.Image.fromarray(blended.round().astype(np.uint8))
