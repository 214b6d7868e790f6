# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What D2iTPipeline checks before it begins: do the components fit, do the arguments fit them and one another?"""

import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging

from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_d2it_grain import D2iTGrainModel
from ..words import shown
from .batches import Batch
from .grain_maps import DRAWN
from .schedulers import check_scheduler, is_flow


logger = logging.get_logger(__name__)


def check_components(
    vae: DynamicAutoencoderKL | None,
    grain_model: D2iTGrainModel | None,
    transformer: D2iTContentModel | None,
    scheduler: KarrasDiffusionSchedulers,
    grain_scheduler: KarrasDiffusionSchedulers | None,
    id2label: dict[int, str] | None,
) -> None:
    """Raise a ValueError that names the two components that do not fit one another."""
    if transformer is None:
        return
    content, pairs = transformer.config, []
    if vae is not None:
        pairs += [
            ("transformer.in_channels", content.in_channels, "vae.latent_channels", vae.config.latent_channels),
            ("transformer.num_grains", content.num_grains, "the grains of the vae", vae.num_grains),
        ]
    if grain_model is not None:
        grain = grain_model.config
        pairs += [
            ("grain_model.num_grains", grain.num_grains, "transformer.num_grains", content.num_grains),
            ("grain_model.num_classes", grain.num_classes, "transformer.num_classes", content.num_classes),
        ]
    for left, left_value, right, right_value in pairs:
        if left_value != right_value:
            raise ValueError(f"components do not fit: {left} is {left_value}, {right} is {right_value}.")
    if (grain_model is None) != (grain_scheduler is None):
        raise ValueError("components do not fit: `grain_model` and `grain_scheduler` go together, one is None.")
    if grain_scheduler is not None and grain_scheduler.config.prediction_type != "sample":
        raise ValueError(
            "components do not fit: `grain_scheduler` needs prediction_type 'sample', got"
            f" {grain_scheduler.config.prediction_type!r}."
        )
    check_scheduler(scheduler, transformer, is_flow(scheduler))
    if scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"):
        logger.warning(
            "`scheduler` limits samples to [-1, 1], which is meant for pixels and spoils latents: make it with"
            " clip_sample=False and thresholding=False."
        )
    beyond = [id for id in id2label or {} if id not in range(content.num_classes or 0)]
    if beyond:
        raise ValueError(
            f"components do not fit: `id2label` names {beyond}, the model has {content.num_classes} classes."
        )


SAMPLING_LIMITS = {
    "num_images_per_prompt": (1, 10_000),
    "num_inference_steps": (1, 1_000_000),
    "guidance_scale": (-1e6, 1e6),
    "guidance_interval": (0, 1),
    "guidance_power": (1e-6, 1e6),
    "fine_ratio": (0, 1),
    "grain_num_inference_steps": (1, 1_000_000),
    "grain_guidance_scale": (-1e6, 1e6),
    "height": (1, 16_384),
    "width": (1, 16_384),
    "timesteps": (0, 1_000_000),
    "sigmas": (0, 1e6),
    "eta": (0, 1),
}


def check_inputs(
    batch: Batch,
    fine_ratio: float | list[float | None] | None,
    latents: torch.Tensor | None,
    transformer: D2iTContentModel,
    can_draw: bool,
) -> None:
    """Raise a ValueError that names the first argument of `__call__` that contradicts another or the model.

    Maps are drawn where the pipeline `can_draw` them. Starting noise is finite, floating-point, and of a shape that
    the model reads.
    """
    generators = batch.generator if isinstance(batch.generator, list) else [batch.generator] * batch.size
    if len(generators) != batch.size or not all(isinstance(g, torch.Generator | None) for g in generators):
        raise ValueError(
            f"`generator` must be a torch.Generator, or a list of one for each of {batch.size} images, got"
            f" {shown(batch.generator)}."
        )
    drawn = [
        bool((one == DRAWN).any()) if isinstance(one, torch.Tensor) else one is None or one == "draw"
        for one in batch.maps
    ]
    if any(drawn) and not can_draw:
        raise ValueError("`grain_map` is required, for every region: this pipeline has no grain model.")
    if (
        fine_ratio is not None
        and not any(drawn)
        and not any(isinstance(one, str) and one in ("random", "image", "draw") for one in batch.maps)
    ):
        raise ValueError("`fine_ratio` and a given `grain_map`, other than 'random', are mutually exclusive.")
    for i, one in enumerate(batch.maps if isinstance(fine_ratio, list) else []):
        decided = not drawn[i] and not (isinstance(one, str) and one in ("random", "image", "draw"))
        if decided and batch.fine_ratios[i] is not None:
            raise ValueError(f"`fine_ratio` must be None for image {i}, whose `grain_map` is given, got {fine_ratio}.")
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


def map_size(
    maps: list,
    latents: torch.Tensor | None,
    height: int | None,
    width: int | None,
    vae: DynamicAutoencoderKL | None,
    transformer: D2iTContentModel,
) -> tuple[int, int]:
    """Sides (h, w) of the grain maps: from maps in regions, the latents, the size asked for, or that of training.

    Raises:
        ValueError: they contradict one another, or the size is no multiple of a region.
    """
    cells = transformer.patch_size
    if vae is None and (height, width) != (None, None):
        raise ValueError(
            "`height` and `width` need a `vae`, which makes pixels of cells: pass `latents` or a `grain_map`."
        )
    region = 0 if vae is None else vae.region_size
    sizes = {("grain_map", tuple(one.shape)) for one in maps if isinstance(one, torch.Tensor)}
    if latents is not None:
        sizes.add(("latents", tuple(side // cells for side in latents.shape[-2:])))
    if height is not None or width is not None:
        default = transformer.config.sample_size * vae.downsample_factor
        sides = (default if height is None else height, default if width is None else width)
        if any(side % region for side in sides):
            raise ValueError(
                f"`height` and `width` must be multiples of the region size {region}, got {sides[0]} and {sides[1]}."
            )
        sizes.add(("height and width", tuple(side // region for side in sides)))
    trained = (transformer.config.sample_size // cells,) * 2
    if len({size for _, size in sizes}) > 1:
        described = ", ".join(f"{name} {size[0]}x{size[1]}" for name, size in sorted(sizes))
        raise ValueError(
            f"arguments ask for maps of different sizes: {described} regions. `grain_map_size` says the size of an"
            " image's, and a mask, of bool or a picture, may have any."
        )
    name, size = min(sizes, default=("", trained))
    if size != trained and "height and width" not in dict(sizes):
        pixels = "" if vae is None else f", an image of {size[0] * region}x{size[1] * region} pixels"
        logger.warning(
            "`%s` of %dx%d, a cell for each region%s; the model was trained on %dx%d regions.",
            *(name, *size, pixels, *trained),
        )
    return size
