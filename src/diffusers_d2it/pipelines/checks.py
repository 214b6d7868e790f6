# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What pipelines check before they begin: do the components fit, do the arguments fit them and one another?"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging

from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.latent_codec import LatentCodec
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_d2it_grain import D2iTGrainModel
from ..words import shown
from .batches import Batch
from .grain_maps import DRAWN
from .schedulers import check_scheduler, is_flow


logger = logging.get_logger(__name__)


def check_components(
    vae: ModelMixin | None, transformer: ModelMixin | None, scheduler: KarrasDiffusionSchedulers, labels: dict | None
) -> None:
    """Raise a ValueError that names the two components that do not fit one another.

    Args:
        vae, transformer, scheduler: what every pipeline has.
        labels: names of the classes by id.
    """
    if transformer is None:
        return
    config = transformer.config
    if vae is not None:
        check_equal({"transformer.in_channels": config.in_channels, "vae.latent_channels": vae.config.latent_channels})
    check_scheduler(scheduler, transformer, is_flow(scheduler))
    if scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"):
        logger.warning(
            "`scheduler` limits samples to [-1, 1], which is meant for pixels and spoils latents: make it with"
            " clip_sample=False and thresholding=False."
        )
    num_classes = config.num_classes
    beyond = [id for id in labels or {} if id not in range(num_classes or 0)]
    if beyond:
        raise ValueError(f"components do not fit: `id2label` names {beyond}, the model has {num_classes} classes.")


def check_grain_components(
    vae: DynamicAutoencoderKL | None,
    grain_model: D2iTGrainModel | None,
    transformer: D2iTContentModel | None,
    grain_scheduler: KarrasDiffusionSchedulers | None,
) -> None:
    """As `check_components`, of what D2iT has beside."""
    if transformer is None:
        return
    config = transformer.config
    if vae is not None:
        check_equal({"transformer.num_grains": config.num_grains, "vae.num_grains": vae.num_grains})
    for name in ("num_grains", "num_classes") if grain_model is not None else ():
        check_equal({f"grain_model.{name}": grain_model.config[name], f"transformer.{name}": config[name]})
    if (grain_model is None) != (grain_scheduler is None):
        raise ValueError("components do not fit: `grain_model` and `grain_scheduler` go together, one is None.")
    if grain_scheduler is None:
        return
    prediction_type = grain_scheduler.config.get("prediction_type")  # which schedulers of flow matching do not have
    if prediction_type != "sample" or is_flow(grain_scheduler):
        raise ValueError(
            "components do not fit: `grain_scheduler` must be one of diffusion with prediction_type 'sample', got"
            f" {type(grain_scheduler).__name__} with {prediction_type!r}."
        )


def check_equal(values: Mapping[str, Any]) -> None:
    """Raise a ValueError unless two values, each by the name "component.key", are equal."""
    (left, left_value), (right, right_value) = values.items()
    if left_value != right_value:
        raise ValueError(f"components do not fit: {left} is {left_value}, {right} is {right_value}.")


def check_noise(batch: Batch, latents: torch.Tensor | None, transformer: ModelMixin) -> None:
    """Raise a ValueError unless there is a generator for each image, or one for all, and noise that the model reads.

    Starting noise is finite, floating-point, of B images, or of one where all have the same.
    """
    generators = batch.generator if isinstance(batch.generator, list) else [batch.generator] * batch.size
    if len(generators) != batch.size or not all(isinstance(g, torch.Generator | None) for g in generators):
        raise ValueError(
            f"`generator` must be a torch.Generator, or a list of one for each of {batch.size} images, got"
            f" {shown(batch.generator)}."
        )
    if latents is not None:
        channels, cells = transformer.config.in_channels, transformer.patch_size
        if not latents.is_floating_point():
            raise ValueError(f"`latents` must be floating-point, got {latents.dtype}.")
        fitting = (batch.size, channels, *(side - side % cells for side in latents.shape[2:]))
        same_noise = latents.ndim == 4 and len(latents) == 1 and isinstance(batch.generator, list)
        if latents.ndim != 4 or latents.shape[1:] != fitting[1:] or not (same_noise or len(latents) == batch.size):
            raise ValueError(
                f"`latents` must have shape ({batch.size}, {channels}, h, w) with h and w multiples of {cells}, got"
                f" {tuple(latents.shape)}."
            )
        if not latents.isfinite().all():
            raise ValueError("`latents` hold values that are not finite.")


def check_maps(batch: Batch, fine_ratio: float | list[float | None] | None, can_draw: bool) -> None:
    """Raise a ValueError that names the first of `grain_map` and `fine_ratio` that contradicts the other or the model.

    Maps are drawn where the pipeline `can_draw` them.
    """
    maps, fine_ratios = batch.each["grain_map"], batch.each["fine_ratio"]
    drawn = [
        bool((one == DRAWN).any()) if isinstance(one, torch.Tensor) else one is None or one == "draw" for one in maps
    ]
    decided = [
        not is_drawn and not (isinstance(one, str) and one in ("random", "image", "draw"))
        for one, is_drawn in zip(maps, drawn)
    ]
    if any(drawn) and not can_draw:
        raise ValueError("`grain_map` is required, for every region: this pipeline has no grain model.")
    if fine_ratio is not None and all(decided):
        raise ValueError("`fine_ratio` and a given `grain_map`, other than 'random', are mutually exclusive.")
    for i, is_decided in enumerate(decided if isinstance(fine_ratio, list) else []):
        if is_decided and fine_ratios[i] is not None:
            raise ValueError(f"`fine_ratio` must be None for image {i}, whose `grain_map` is given, got {fine_ratio}.")


def changed_by(returned: dict[str, torch.Tensor] | None, latents: torch.Tensor) -> torch.Tensor:
    """The latents after a callback, which returns them in a dictionary, or nothing if it only looks.

    Raises:
        ValueError: it returned something else.
    """
    if returned is None:
        return latents
    if not isinstance(returned, dict):
        raise ValueError(
            f"`callback_on_step_end` must return a dictionary such as {{'latents': tensor}}, or nothing, got"
            f" {type(returned).__name__}."
        )
    latents = returned.get("latents", latents)
    if not isinstance(latents, torch.Tensor):
        raise ValueError(f"`callback_on_step_end` must return a tensor as 'latents', got {type(latents).__name__}.")
    return latents


def size_of_call(
    call: Mapping[str, Any],
    transformer: ModelMixin,
    vae: ModelMixin | None,
    grain_map: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Sides (h, w) of what a call draws, in units of the model: regions or cells.

    Args:
        call: its latents, height and width are read; without them it is the size of training.
        transformer: of which `patch_size` cells are the side of a unit.
        vae: tells how many pixels a cell has.
        grain_map: sides of the maps that are given in regions.

    Raises:
        ValueError: they contradict one another, or the size in pixels is no multiple of a unit.
    """
    trained = transformer.config.sample_size // transformer.patch_size
    height, width, latents = call["height"], call["width"], call["latents"]
    factor = None if vae is None else LatentCodec(vae).factor  # pixels along a side of a cell
    asked = {} if grain_map is None else {"grain_map": grain_map}
    if latents is not None:
        asked["latents"] = tuple(side // transformer.patch_size for side in latents.shape[-2:])
    if (height, width) != (None, None):
        if factor is None:
            named = " or a `grain_map`" if hasattr(transformer, "prepare_grain_map") else ""
            raise ValueError(f"`height` and `width` need a `vae`, which makes pixels of cells: pass `latents`{named}.")
        side = factor * transformer.patch_size
        sides = [trained * side if one is None else one for one in (height, width)]
        if sides[0] % side or sides[1] % side:
            raise ValueError(f"`height` and `width` must be multiples of {side}, got {sides[0]} and {sides[1]}.")
        asked["height and width"] = (sides[0] // side, sides[1] // side)
    if len({*asked.values()}) > 1:
        described = ", ".join(f"{name} {size[0]}x{size[1]}" for name, size in sorted(asked.items()))
        of_mask = "; a mask, of bool or a picture, may have any" if "grain_map" in asked else ""
        raise ValueError(f"arguments ask for different sizes, in units of the model: {described}{of_mask}.")
    name, size = min(asked.items(), default=("", (trained, trained)))
    if size != (trained, trained) and "height and width" not in asked:
        unit, side = "cells" if transformer.patch_size == 1 else "regions", transformer.patch_size * (factor or 0)
        pixels = "" if factor is None else f", {size[0] * side}x{size[1] * side} pixels"
        message = "`%s` of %dx%d %s%s; the model was trained on %dx%d %s."
        logger.warning(message, name, *size, unit, pixels, trained, trained, unit)
    return size
