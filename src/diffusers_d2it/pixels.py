# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The one place where pixels of models, in [-1, 1], and those of files, 0 to 255, become one another."""

import torch


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1], of any shape, as uint8: the nearest level; what lies outside goes to the ends."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels of any shape as float32 in [-1, 1], the inverse of `to_uint8`."""
    return pixels.float() / 127.5 - 1


def unit_to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], as a pipeline returns them, as uint8: the nearest level."""
    return (images * 255).round().to(torch.uint8)


def check_uint8(images: torch.Tensor) -> None:
    """Raise a ValueError unless `images` are uint8 (N, 3, H, W), one at least."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"`images` must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
