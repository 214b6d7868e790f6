# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The one place where pictures become RGB, and pixels of models, in [-1, 1], and of files, 0 to 255, one another."""

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch


class UnusableImageError(ValueError):
    """An image cannot be used; the message is the reason, without the name of the image."""


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1], of any shape, as uint8: the nearest level; what lies outside goes to the ends."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels of any shape as float32 in [-1, 1], the inverse of `to_uint8`."""
    return pixels.to(torch.float32, copy=True).div_(127.5).sub_(1)


def unit_to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], as a pipeline returns them, as uint8: the nearest level."""
    return (images * 255).round().to(torch.uint8)


def check_uint8(images: torch.Tensor) -> None:
    """Raise a ValueError unless `images` are uint8 (N, 3, H, W), one at least."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"`images` must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}.")


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB of an open image as `decode_image` makes it of its file: upright, transparency on white, 16 bits scaled.

    Raises:
        UnusableImageError: its values have no defined range.
    """
    return to_rgb(PIL.ImageOps.exif_transpose(image), image.format)


def to_rgb(image: PIL.Image.Image, format: str | None) -> PIL.Image.Image:
    """RGB of any image, transparency on white; the image itself if it is plain RGB."""
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        # These formats end at 16 bits. Pillow's own conversion clips: all but the darkest would be white.
        values = np.asarray(image).astype(np.int64)
        grey = ((values + 128) // 257).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        image = PIL.Image.fromarray(grey)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise UnusableImageError(f"its values have no defined range (mode {image.mode!r}): 8 or 16 bits are expected")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image
