# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pictures and masks as people hand them over, at the size of a call."""

import os

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from ..data.images import ImageInput, fitted, image_to_pixels, open_image
from ..pixels import UnusableImageError, from_uint8, to_uint8, upright_rgb
from ..words import printable


_COLOURED = 48  # levels between the channels of a pixel, beyond what compression does to grey

MaskInput = str | os.PathLike | PIL.Image.Image | np.ndarray | torch.Tensor | list


def read_images(image: ImageInput) -> list[torch.Tensor]:
    """Pictures as training would read them, each (3, H, W) in [-1, 1] at its own size; see `image_to_pixels`."""
    if isinstance(image, (list, tuple)) and image:
        return [pixels for one in image for pixels in read_images(one)]
    return list(image_to_pixels(image))


def fit_image(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A picture (3, H, W) at a size (H, W) in pixels, as in training: the centre that has its form, resized.

    One of that size stays what it is, bit for bit.

    Raises:
        ValueError: it is less than half as large.
    """
    if pixels.shape[1:] == size:
        return pixels
    try:
        picture = fitted(to_pil(pixels), size)
    except UnusableImageError as error:
        raise ValueError(f"`image`: {error}") from None
    return from_uint8(torch.from_numpy(np.array(picture))).movedim(-1, 0)


def to_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    """Pixels (3, H, W) in [-1, 1] as a picture of 8 bits."""
    return PIL.Image.fromarray(to_uint8(pixels).movedim(0, -1).numpy(force=True))


def read_masks(mask: MaskInput, name: str) -> list[PIL.Image.Image]:
    """Masks as grey pictures of 8 bits, white where they say yes.

    Args:
        mask: a path, a PIL image, uint8 (H, W, 3), or an array or tensor of bool, of floating point in [0, 1], or of
            whole numbers, 0 and 1 or 0 to 255: (H, W), (B, H, W) or (B, 1, H, W); or a list of these.
        name: of the argument, for errors.

    Raises:
        ValueError: it is none of these, values lie outside, or parts of it are transparent or coloured, which says
            neither.
    """
    if isinstance(mask, (str, os.PathLike)):
        try:
            mask = open_image(mask)
        except UnusableImageError as error:
            raise ValueError(f"`{name}` {printable(mask)}: {error}") from None
    if isinstance(mask, np.ndarray) and mask.dtype == np.uint8 and mask.ndim == 3 and mask.shape[-1] in (2, 3, 4):
        mask = PIL.Image.fromarray(mask)
    if isinstance(mask, PIL.Image.Image):
        return [_grey(mask, name)]
    if isinstance(mask, (list, tuple)) and len(mask) and not isinstance(mask[0], (int, float, list, tuple)):
        return [one for part in mask for one in read_masks(part, name)]
    if isinstance(mask, torch.Tensor):
        values = (mask.float() if mask.is_floating_point() else mask).numpy(force=True)
    else:
        values = np.asarray(mask)
    highest = 255 if values.dtype.kind in "iu" and values.size and values.max() > 1 else 1
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if isinstance(mask, np.ndarray) and values.ndim in (3, 4) and values.shape[-1] == 1:
        values = values[..., 0]
    if isinstance(mask, torch.Tensor) and values.ndim == 3 and len(values) == 3:
        raise ValueError(f"`{name}` may be three masks or the colours of one: pass (3, 1, H, W) or (1, H, W).")
    if isinstance(mask, np.ndarray) and values.ndim == 3 and values.shape[2] in (3, 4) and min(values.shape[:2]) > 4:
        raise ValueError(f"`{name}` of shape {values.shape} has colours, which are read of uint8 alone: pass (H, W).")
    if values.ndim not in (2, 3) or values.dtype.kind not in "biuf" or not values.size:
        raise ValueError(
            f"`{name}` must be paths, PIL images, or arrays (H, W) or (B, H, W), got {values.dtype} {values.shape}."
        )
    if not (values.min() >= 0 and values.max() <= highest):  # written so that NaN fails it
        raise ValueError(f"`{name}` must lie in [0, {highest}], got {values.min():.4g} to {values.max():.4g}.")
    grey = np.round(values.astype(np.float64) * (255 / highest)).astype(np.uint8)
    return [PIL.Image.fromarray(one) for one in (grey if grey.ndim == 3 else grey[None])]


def _grey(mask: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """A mask as 8 bits of grey, upright."""
    if mask.has_transparency_data and mask.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError(f"`{name}` has transparent parts: lay it on black (no) or white (yes) first.")
    try:
        picture = upright_rgb(mask)
    except UnusableImageError as error:
        raise ValueError(f"`{name}`: {error}") from None
    if np.ptp(np.asarray(picture).astype(int), axis=-1).max() > _COLOURED:
        raise ValueError(f"`{name}` has colours: it must be black (no), white (yes) or grey.")
    return picture.convert("L")


def fit_mask(mask: PIL.Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """The part of a mask that `fit_image` shows of a picture of its size: (H, W) in [0, 1]."""
    height, width = size
    if mask.size != (width, height):
        mask = PIL.ImageOps.fit(mask, (width, height), PIL.Image.Resampling.BOX)
    return torch.from_numpy(np.array(mask)).float() / 255
