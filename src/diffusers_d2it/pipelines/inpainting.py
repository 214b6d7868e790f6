# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What is new in a picture, in pixels, cells and codes; and pixels that are put back.

Shapes as in `grained`.
"""

import math

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from ..grains import GrainLayout
from .pictures import MaskInput, fit_mask, read_masks, to_pil


def masks_of(mask_image: MaskInput | None, pictures: list[torch.Tensor]) -> list[PIL.Image.Image]:
    """A mask for each picture (3, H, W), black or white, of its size.

    Raises:
        ValueError: there is none, another number, or one of another size.
    """
    if mask_image is None:
        raise ValueError("`mask_image` is required: white where the picture is to be new, got None.")
    masks = read_masks(mask_image, "mask_image")
    if len(masks) not in (1, len(pictures)):
        raise ValueError(f"`mask_image` must be one, or one for each of {len(pictures)} images, got {len(masks)}.")
    masks = masks * (len(pictures) // len(masks))
    for mask, picture in zip(masks, pictures):
        if mask.size[::-1] != picture.shape[1:]:
            raise ValueError(
                f"`mask_image` must have the size of its image, {picture.shape[2]}x{picture.shape[1]}, got"
                f" {mask.width}x{mask.height}."
            )
    return [mask.point(lambda grey: 255 * (grey > 127)) for mask in masks]


def is_new(masks: list[PIL.Image.Image], size: tuple[int, int]) -> torch.Tensor:
    """The pixels in which masks show anything white, of pictures fitted to (H, W): (P, H, W) bool."""
    return torch.stack([fit_mask(mask, size) > 0 for mask in masks])


def touched(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Which squares of `side` pixels hold one that is True: (B, H, W) bool -> (B, H / side, W / side)."""
    return F.max_pool2d(pixels.float(), side) > 0


def whole_codes(cells: torch.Tensor, layout: GrainLayout) -> torch.Tensor:
    """Every cell of the codes that have a cell which is True: (B, h * R, w * R) bool -> (B, 1, h * R, w * R)."""
    share = cells[:, None].float()
    for grain in range(layout.num_grains - 1):
        share = layout.average(share, grain)
    return share > 0


def pasted_back(decoded: torch.Tensor, pixels: torch.Tensor, new: torch.Tensor, reach: int) -> torch.Tensor:
    """Decoded images (B, 3, H, W) in [0, 1] with the pixels of the pictures, in [-1, 1], where they are not `new`.

    What is new is moved towards the picture at the edge, where the decoder renders the picture otherwise than it is:
    by the mean of the differences along the edge, each weighed by the fourth power of its nearness, fading out over a
    length of `reach` pixels. No pixel outside is touched.
    """
    pictures, new = (pixels + 1) / 2, new[:, None].to(decoded.dtype)
    edge = F.max_pool2d(new, 3, stride=1, padding=1) - new  # outside, beside what is new
    near = _nearness(new.shape[-2:], decoded)
    weight = _convolved(edge, near)
    correction = _convolved(edge * (pictures - decoded), near) / (weight + math.pi / 2 / reach**3)
    return torch.where(new > 0, (decoded + correction).clamp(0, 1), pictures)


def _nearness(size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """1 / distance ** 4 between any two places of an image, and one at the place itself: the spectrum of it."""
    rows, columns = (torch.arange(-side + 1, side + 1, device=like.device).roll(side + 1) for side in size)
    squared = (rows[:, None] ** 2 + columns**2).clamp_min(1).to(like.dtype)
    return torch.fft.rfft2(squared**-2)


def _convolved(images: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[-2:]
    return torch.fft.irfft2(torch.fft.rfft2(images, (2 * height, 2 * width)) * spectrum)[..., :height, :width]


def crop_around(
    picture: torch.Tensor, mask: PIL.Image.Image, size: tuple[int, int], padding: int
) -> tuple[tuple[int, int, int, int], PIL.Image.Image, PIL.Image.Image]:
    """The part of a picture around its mask that has the form of `size`, and its mask, both resized to it.

    The part has at least half the sides of `size`, so that it is enlarged twice at most.

    Returns:
        (left, top, right, bottom) in the picture, the part, its mask.

    Raises:
        ValueError: the mask is black, or no such part of the picture holds it.
    """
    if mask.getbbox() is None:
        raise ValueError("`mask_image` must show something white for `padding_mask_crop`, got a black one.")
    height, width = size
    left, top, right, bottom = mask.getbbox()
    least = max((right - left) / width, (bottom - top) / height, 0.5)
    padded = max((right - left + 2 * padding) / width, (bottom - top + 2 * padding) / height, 0.5)
    most = min(mask.width / width, mask.height / height)
    if least > most:
        raise ValueError(
            f"`padding_mask_crop`: no part of an image of {mask.width}x{mask.height} has the form {width}x{height} and"
            f" holds its mask of {right - left}x{bottom - top}: ask for another `height` and `width`, or no crop."
        )
    sides = [round(min(padded, most) * side) for side in (width, height)]
    middle = (left + right) / 2, (top + bottom) / 2
    start = [min(max(round(at - side / 2), 0), whole - side) for at, side, whole in zip(middle, sides, mask.size)]
    box = (*start, start[0] + sides[0], start[1] + sides[1])
    part = to_pil(picture).crop(box).resize((width, height), PIL.Image.Resampling.BICUBIC)
    share = mask.crop(box).convert("F").resize((width, height), PIL.Image.Resampling.BOX)  # 8 bits would round to 0
    return box, part, PIL.Image.fromarray(np.asarray(share) > 0).convert("L")  # anything white is white


def paste_part(
    picture: torch.Tensor, mask: PIL.Image.Image, box: tuple[int, int, int, int], part: PIL.Image.Image
) -> PIL.Image.Image:
    """A picture with a part at its place, where the mask is white."""
    whole = to_pil(picture)
    part = part.resize((box[2] - box[0], box[3] - box[1]), PIL.Image.Resampling.BICUBIC)
    whole.paste(part, box[:2], mask.crop(box))
    return whole
