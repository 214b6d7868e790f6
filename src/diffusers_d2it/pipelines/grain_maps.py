# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every way to a grain map that a person says: painted, boxed, around a point, of an image, by name, or in part.

All return int64, 0 = coarsest, which `grain_map=` of the pipelines takes, and combine by `torch.where`:

    size = pipe.grain_map_size()
    face = foveated_grain_map((64, 40), size, image_size=(128, 128), fine_ratio=0.3)
    rest = grain_map_from_boxes([(0, 96, 128, 128)], size, image_size=(128, 128))
    pipe(class_labels=[207], grain_map=torch.maximum(face, rest))

Shapes:
    h w sides of the map in regions, H W of the image in pixels, k grains
"""

import os
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import logging

from ..data.images import ImageInput
from ..grains import grain_map_from_entropy
from ..limits import check_values, plain
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..words import shown
from .pictures import MaskInput, fit_image, fit_mask, read_images, read_masks


logger = logging.get_logger(__name__)

DRAWN = -1  # in a map: the grain model draws this region

NAMES = ("coarse", "fine", "random")
MapInput = MaskInput | None  # of numbers a map, of strings a name or a path

_PIXELS = 16  # along a side of a region in which masks are counted


def grain_map_from_mask(mask: MaskInput, size: tuple[int, int], num_grains: int = 2) -> torch.Tensor:
    """The map that a painted mask means: white is fine, black is coarse.

    A region takes the grain of most of its pixels, the finer one of two with equally many. For more than two grains
    the grey levels are split evenly: of three, those below 1/3 are coarsest, those from 2/3 on finest.

    Args:
        mask: a picture of any size, as of `pictures.read_masks`; its centre of the map's form is taken.
        size: (h, w).
        num_grains: k.

    Returns:
        (h, w), or (B, h, w) of several masks.

    Raises:
        ValueError: it is no such mask.
    """
    maps = []
    for one in read_masks(mask, "grain_map"):
        if one.width * size[0] != one.height * size[1]:
            logger.warning("`grain_map` of %dx%d pixels: its centre is cut to the form of the image.", *one.size)
        grey = fit_mask(one, (size[0] * _PIXELS, size[1] * _PIXELS))
        grains = (grey * num_grains).long().clamp_max(num_grains - 1)
        votes = F.avg_pool2d(F.one_hot(grains, num_grains).movedim(-1, 0).float(), _PIXELS)  # (k, h, w)
        maps.append(num_grains - 1 - votes.flip(0).argmax(dim=0))
    return maps[0] if len(maps) == 1 else torch.stack(maps)


def grain_map_from_boxes(
    boxes: Sequence[Sequence[float]], size: tuple[int, int], image_size: tuple[int, int], num_grains: int = 2
) -> torch.Tensor:
    """A map that is finest in every region that a box touches, and coarsest elsewhere.

    Args:
        boxes: one, or several, (left, top, right, bottom) in pixels of the image, right and bottom outside.
        size: (h, w).
        image_size: (H, W).
        num_grains: k.

    Raises:
        ValueError: a box is empty or lies outside the image.
    """
    grain_map, boxes = torch.zeros(size, dtype=torch.int64), plain(boxes)
    if len(boxes) and not isinstance(boxes[0], Sequence | np.ndarray | torch.Tensor):
        boxes = [boxes]
    for box in boxes:
        if len(box) != 4 or not (0 <= box[0] < box[2] <= image_size[1] and 0 <= box[1] < box[3] <= image_size[0]):
            raise ValueError(
                f"`boxes` must be (left, top, right, bottom) inside an image of {image_size[1]}x{image_size[0]}, got"
                f" {shown(box)}."
            )
        x, y = size[1] / image_size[1], size[0] / image_size[0]  # regions a pixel
        left, top, right, bottom = box[0] * x, box[1] * y, box[2] * x, box[3] * y
        grain_map[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = num_grains - 1
    return grain_map


def foveated_grain_map(
    center: tuple[float, float],
    size: tuple[int, int],
    image_size: tuple[int, int],
    fine_ratio: float = 0.25,
    num_grains: int = 2,
) -> torch.Tensor:
    """A map that is fine around a point, as an eye sees: the nearest regions finest, then rings of the coarser grains.

    Args:
        center: (x, y) in pixels of the image.
        size: (h, w).
        image_size: (H, W).
        fine_ratio: share of finest regions, met to the nearest region; the coarser grains share the rest evenly.
        num_grains: k.

    Raises:
        ValueError: the point lies outside the image, or the share outside [0, 1].
    """
    height, width = size
    if not (0 <= center[0] <= image_size[1] and 0 <= center[1] <= image_size[0]):
        raise ValueError(
            f"`center` must be (x, y) inside {image_size[1]}x{image_size[0]} pixels, got {shown(center)}."
        )
    fine_ratio = plain(fine_ratio)
    check_values({"fine_ratio": fine_ratio}, {"fine_ratio": float}, {"fine_ratio": (0, 1)}, exact=False)
    rows = (torch.arange(height) + 0.5) * (image_size[0] / height) - center[1]
    columns = (torch.arange(width) + 0.5) * (image_size[1] / width) - center[0]
    nearest = (rows[:, None] ** 2 + columns**2).flatten().argsort(stable=True)
    num_fine = round(fine_ratio * height * width)
    coarser = torch.arange(height * width - num_fine) * (num_grains - 1) // max(height * width - num_fine, 1)
    grains = torch.cat([torch.full((num_fine,), num_grains - 1), num_grains - 2 - coarser])
    return torch.empty(height * width, dtype=torch.int64).scatter_(0, nearest, grains).view(height, width)


@torch.no_grad()
def grain_map_from_image(
    vae: DynamicAutoencoderKL,
    image: ImageInput,
    image_size: tuple[int, int],
    fine_ratio: float | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The grain maps of pictures by their entropy, (B, h, w), as in training.

    Args:
        vae: its thresholds decide.
        image: one or several, as of `pipelines.pictures.read_images`; each is fitted to the size.
        image_size: (H, W), multiples of a region.
        fine_ratio: share of fine regions over the calibration set; None for the autoencoder's default.
        device: where to count; default: the autoencoder's.
    """
    pixels = torch.stack([fit_image(one, image_size) for one in read_images(image)]).to(device or vae.device)
    return grain_map_from_entropy(vae.region_entropy(pixels), vae.thresholds(fine_ratio))


# ---------------------------------------------------------------------------------------------------------------------
# What `grain_map=` takes
# ---------------------------------------------------------------------------------------------------------------------


def read_maps(grain_map: MapInput | list[MapInput], num_grains: int, names: tuple[str, ...] = NAMES) -> list:
    """One entry for each map of an argument: a name, None, a map in regions (h, w) int64, or a mask to be fitted.

    Whole numbers are a map in regions, `DRAWN` where the grain model draws; bool, uint8, numbers with fractions,
    pictures and paths are masks of any size. A list holds a map an entry, unless it is one itself, in rows of numbers.

    Raises:
        ValueError: it is none of these, or its grains are not those of the model.
    """
    if isinstance(grain_map, str) and grain_map not in names and not os.path.exists(os.path.expanduser(grain_map)):
        raise ValueError(f"`grain_map` must be {', '.join(names)}, a map or a mask, got {shown(grain_map)}.")
    if grain_map is None or isinstance(grain_map, (str, os.PathLike, PIL.Image.Image)):
        return [grain_map]
    if isinstance(grain_map, (list, tuple)) and not _is_rows(grain_map):
        if not grain_map:
            raise ValueError("`grain_map` must hold a map at least, got an empty list.")
        return [one for part in grain_map for one in read_maps(part, num_grains, names)]
    try:
        values = grain_map if isinstance(grain_map, torch.Tensor) else torch.from_numpy(np.array(grain_map))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`grain_map` must be whole numbers of shape (h, w) or (B, h, w): {error}") from None
    if values.ndim not in (2, 3, 4) or 0 in values.shape or values.is_complex():
        raise ValueError(
            f"`grain_map` must have shape (h, w) or (B, h, w), got {values.dtype} of shape {tuple(values.shape)}."
        )
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):
        values = values.long()
    if values.dtype == torch.uint8 and 0 < values.max() < num_grains and num_grains > 2:
        raise ValueError(
            f"`grain_map` of uint8 up to {values.max().item()} may be a map or a mask: pass a map as int64, a mask as"
            " bool or with values up to 255."
        )
    if values.dtype in (torch.bool, torch.uint8) or values.is_floating_point():
        return read_masks(grain_map, "grain_map")
    low, high = torch.aminmax(values)
    if values.ndim == 4 or low < DRAWN or high >= num_grains:
        raise ValueError(
            f"`grain_map` must be (h, w) or (B, h, w) with grains 0 (coarsest) to {num_grains - 1} (finest),"
            f" {DRAWN} for regions to be drawn, got values from {low.item()} to {high.item()} of shape"
            f" {tuple(values.shape)}."
        )
    return list(values.long() if values.ndim == 3 else values.long()[None])


def as_regions(entry, size: tuple[int, int], num_grains: int) -> torch.Tensor:
    """An entry of `read_maps` but "random" as a map in regions, (h, w)."""
    if isinstance(entry, torch.Tensor):
        return entry
    if entry is None or isinstance(entry, str) and entry in ("coarse", "fine"):
        return torch.full(size, {None: DRAWN, "coarse": 0, "fine": num_grains - 1}[entry])
    return grain_map_from_mask(entry, size, num_grains)


def _is_rows(value: list | tuple) -> bool:
    """Whether a list is rows of numbers, or several such maps."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float, np.number)) or (
        isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim < 2
    )
