# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pictures of where a model spends its work, in the colours of D2iT's figures: red is much, blue is little."""

import numpy as np
import PIL.Image
import torch
from scipy.ndimage import minimum_filter

from .limits import check_values, plain
from .pixels import unit_to_uint8, upright_rgb


_FINE = np.array([214, 39, 40], dtype=np.float32)
_COARSE = np.array([31, 119, 180], dtype=np.float32)
_OPACITY = 0.3
_SIDES = (1, 65536)  # pixels, of `min_side`


def visualize_grain_map(
    image: PIL.Image.Image | np.ndarray | torch.Tensor | list,
    grain_map: torch.Tensor | np.ndarray | list,
    num_grains: int | None = None,
    min_side: int = 256,
) -> PIL.Image.Image | list[PIL.Image.Image]:
    """Lay a grain map over its image: red regions are fine, blue ones coarse, as in Fig. 3 of arXiv:2504.09454.

    The tint is soft, so that the image is seen, and fine areas have an outline.

    Args:
        image: the picture, H x W pixels, of any `output_type` of a pipeline but latents: PIL, array (H, W, 3) or
            tensor (3, H, W), in [0, 1] or uint8. Or all those of an output, a list or a batch of B.
        grain_map: (h, w), or (1, h, w), whole numbers, 0 = coarsest, or bool; H and W are multiples of h and w. Of
            several pictures (B, h, w), or a list.
        num_grains: k; with three or more the colours between blue and red follow the grain. None: as many as the map
            shows, at least two.
        min_side: pixels; a smaller picture is enlarged by a whole number. 1 leaves every picture at its size.

    Returns:
        An RGB picture, or a list of them.

    Raises:
        ValueError: the image is none of these, the map has another number of dimensions, holds no integers or other
            grains than 0 ... k - 1, or does not divide the picture; `min_side` is no whole number from 1 on.
    """
    if isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4:
        number = len(grain_map) if hasattr(grain_map, "__len__") else 0
        if len(image) != number:
            raise ValueError(f"`grain_map` must be one for each of {len(image)} images, got {number}.")
        return [visualize_grain_map(*pair, num_grains, min_side) for pair in zip(image, grain_map)]
    grains = grain_map.cpu().float().numpy() if isinstance(grain_map, torch.Tensor) else np.asarray(grain_map)
    if grains.ndim == 3 and len(grains) == 1:
        grains = grains[0]
    if grains.ndim != 2 or grains.dtype.kind not in "biuf" or (grains % 1).any():
        raise ValueError(f"`grain_map` must be integers of shape (h, w), got {grains.dtype} of shape {grains.shape}.")
    grains = grains.astype(np.int64)
    num_grains = plain(num_grains)
    if not isinstance(num_grains, int | None) or num_grains in (0, 1):
        raise ValueError(f"`num_grains` must be a whole number, at least 2, got {num_grains!r}.")
    if num_grains is None:
        num_grains = max(2, int(grains.max()) + 1)
    if grains.min() < 0 or grains.max() >= num_grains:
        raise ValueError(f"`grain_map` must hold grains 0 to {num_grains - 1}, got {grains.min()} to {grains.max()}.")
    picture, shares = _laid_over(_picture(image), grains / (num_grains - 1), "grain_map", min_side)
    width = 1 + min(picture.size) // 256
    is_outline = shares > minimum_filter(shares, 2 * width + 1)  # pixels beside a coarser region
    return _tinted(picture, shares, np.where(is_outline, 1.0, _OPACITY)[..., None])


def visualize_boundary_map(
    image: PIL.Image.Image | np.ndarray | torch.Tensor | list,
    boundary_map: torch.Tensor | np.ndarray | list,
    min_side: int = 256,
) -> PIL.Image.Image | list[PIL.Image.Image]:
    """Lay over an image of DC-DiT which cells of its latents were tokens: these are red, the others blue.

    Args:
        image: as of `visualize_grain_map`.
        boundary_map: (h, w) of one step, bool, or the router's probability in [0, 1]; the sides of the picture are
            multiples of h and w. Of several pictures (B, h, w), or a list.
        min_side: pixels; a smaller picture is enlarged by a whole number. 1 leaves every picture at its size.

    Returns:
        An RGB picture, or a list of them.

    Raises:
        ValueError: the image is none, the map has another number of dimensions, values outside [0, 1], or does not
            divide the picture; `min_side` is no whole number from 1 on.
    """
    if isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4:
        number = len(boundary_map) if hasattr(boundary_map, "__len__") else 0
        if len(image) != number:
            raise ValueError(f"`boundary_map` must be one for each of {len(image)} images, got {number}.")
        return [visualize_boundary_map(*pair, min_side) for pair in zip(image, boundary_map)]
    shares = boundary_map.cpu().float().numpy() if isinstance(boundary_map, torch.Tensor) else np.asarray(boundary_map)
    if shares.ndim != 2 or shares.dtype.kind not in "biuf" or not (0 <= shares.min() and shares.max() <= 1):
        raise ValueError(
            f"`boundary_map` must be bool or in [0, 1], of shape (h, w), got {shares.dtype} of shape {shares.shape}."
        )
    picture, shares = _laid_over(_picture(image), shares.astype(np.float32), "boundary_map", min_side)
    return _tinted(picture, shares, _OPACITY)


def _laid_over(
    picture: PIL.Image.Image, values: np.ndarray, name: str, min_side: int
) -> tuple[PIL.Image.Image, np.ndarray]:
    """A picture of at least `min_side` pixels, and the value of each of them."""
    rows, columns = values.shape
    if picture.height % rows or picture.width % columns:
        raise ValueError(
            f"`{name}` of {rows}x{columns} does not divide an image of {picture.height}x{picture.width} pixels."
        )
    min_side = plain(min_side)
    check_values({"min_side": min_side}, {"min_side": int}, {"min_side": _SIDES}, exact=False)
    scale = max(1, -(-min_side // min(picture.size)))
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), PIL.Image.Resampling.BICUBIC)
    return picture, values.repeat(picture.height // rows, axis=0).repeat(picture.width // columns, axis=1)


def _tinted(picture: PIL.Image.Image, shares: np.ndarray, opacity: np.ndarray | float) -> PIL.Image.Image:
    """A picture under the colours from blue, 0, to red, 1."""
    colours = _COARSE + (_FINE - _COARSE) * shares[..., None]
    blended = (1 - opacity) * np.asarray(picture, dtype=np.float32) + opacity * colours
    return PIL.Image.fromarray(blended.round().astype(np.uint8))


def _picture(image: PIL.Image.Image | np.ndarray | torch.Tensor) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return upright_rgb(image)
    pixels = torch.tensor(image).movedim(-1, -3) if isinstance(image, np.ndarray) and image.ndim > 2 else image
    if not isinstance(pixels, torch.Tensor) or pixels.shape[:-2] != (3,):
        raise ValueError(
            "`image` must be a picture, PIL, array (H, W, 3) or tensor (3, H, W), got"
            f" {type(image).__name__} {tuple(getattr(image, 'shape', ()))}; latents are decoded by `decode_latents`."
        )
    if pixels.is_floating_point():
        pixels = unit_to_uint8(pixels.float().clamp(0, 1))
    if pixels.dtype != torch.uint8:
        raise ValueError(f"`image` must hold numbers in [0, 1] or uint8, got {image.dtype}.")
    return PIL.Image.fromarray(pixels.movedim(0, -1).numpy(force=True))
