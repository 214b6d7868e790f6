# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pictures and masks as people hand them over, at the size of a call."""

import os

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from ..data.images import ImageInput, decode_image, fitted
from ..pixels import UnusableImageError, from_uint8, to_uint8, upright_rgb
from ..words import printable


_COLOURED = 48  # levels between the channels of a pixel, beyond what compression does to grey

MaskInput = str | os.PathLike | PIL.Image.Image | np.ndarray | torch.Tensor | list


def open_image(path: str | os.PathLike, argument: str) -> PIL.Image.Image:
    """The picture of a file, RGB and upright; "~" is the user's home.

    Raises:
        ValueError: the file cannot be used; `argument` is what it was passed for.
    """
    try:
        return decode_image({"path": os.path.expanduser(path)})
    except UnusableImageError as error:
        raise ValueError(f"`{argument}` {printable(path)}: {error}") from None


def read_images(image: ImageInput) -> list[torch.Tensor]:
    """Pictures as training would read them, each (3, H, W) in [-1, 1] at its own size.

    Args:
        image: a path, a PIL image, an array ([B,] H, W[, 3]) or a tensor ([B,] 3, H, W), or a list of these. Floating-
            point values lie in [0, 1], others have 8 or 16 bits.

    Raises:
        ValueError: it is none of these, values lie outside, or a file cannot be used.
    """
    if isinstance(image, (list, tuple)) and image:
        return [pixels for one in image for pixels in read_images(one)]
    if isinstance(image, (str, os.PathLike)):
        image = open_image(image, "image")
    if isinstance(image, torch.Tensor) and image.ndim in (3, 4) and image.shape[-3] in (1, 3, 4):
        image = (image.float() if image.is_floating_point() else image).movedim(-3, -1).numpy(force=True)
    if isinstance(image, np.ndarray) and image.dtype in (np.uint8, np.uint16) and image.ndim > 1:
        if image.ndim == 4:
            return read_images(list(image))
        if image.ndim == 3 and image.dtype == np.uint16:  # Pillow knows 16 bits of grey alone
            image = ((image.astype(np.int64) + 128) // 257).astype(np.uint8)
        image = PIL.Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    if isinstance(image, PIL.Image.Image):
        try:
            return [from_uint8(torch.from_numpy(np.array(upright_rgb(image)))).movedim(-1, 0)]
        except UnusableImageError as error:
            raise ValueError(f"`image`: {error}") from None
    is_array = isinstance(image, np.ndarray) and image.dtype.kind == "f"
    if not is_array or image.ndim not in (3, 4) or image.shape[-1] != 3:
        raise ValueError(
            "`image` must be paths, PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W), floating-point in"
            f" [0, 1] or of 8 or 16 bits, got {type(image).__name__} {getattr(image, 'dtype', '')}"
            f" {tuple(getattr(image, 'shape', ()))}."
        )
    if not (image.min() >= 0 and image.max() <= 1):  # written so that NaN fails it
        raise ValueError(f"`image` must lie in [0, 1], got {image.min():.4g} to {image.max():.4g}.")
    pixels = torch.from_numpy(2 * image.astype(np.float32) - 1).movedim(-1, -3)
    return list(pixels) if pixels.ndim == 4 else [pixels]


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
        mask = open_image(mask, name)
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
