# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a step of the second stage learns from: the autoencoder, labels, grain maps.

Shapes:
    B batch, h w sides of the grain map in regions
"""

import os
from typing import Any

import torch

from ..data.images import check_resolution
from ..data.latent_cache import LatentCache, describe_vae
from ..data.loaders import ImageDataset, ImageStream
from ..files.folders import digest
from ..grains import grain_map_from_entropy
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL


def load_autoencoder(vae: str, resolution: int) -> DynamicAutoencoderKL:
    """The autoencoder of a folder or a name of the Hub, frozen.

    Raises:
        ValueError: there is none, or `resolution`, the side of the images in pixels, does not suit its regions.
    """
    try:
        loaded = DynamicAutoencoderKL.from_pretrained(vae).requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        inside = os.path.join(vae, "vae")
        hint = f" It is a pipeline: did you mean {inside}?" if os.path.isfile(f"{vae}/model_index.json") else ""
        raise ValueError(f"`vae` {vae}: {error}{hint}") from error
    check_resolution(resolution, loaded.region_size)
    return loaded


def identity_of(
    data: LatentCache | ImageDataset | ImageStream, vae: DynamicAutoencoderKL | None = None
) -> dict[str, Any]:
    """What a run must find again when it is resumed: the same data; in the second stage the same codes and thresholds.

    Args:
        data: what it learns from.
        vae: the autoencoder of the second stage.
    """
    num_images = None if isinstance(data, ImageStream) else len(data)
    identity = {"data": {"num_images": num_images, "fingerprint": data.fingerprint}}
    if vae is None:
        return identity
    thresholds = [vae.config.calibration, vae.config.grain_ratios]
    return identity | {"autoencoder": digest({**describe_vae(vae), "thresholds": thresholds})}


def draw_fine_ratio(ratios: list[float] | None, generator: torch.Generator) -> float | None:
    """The fine ratio of a batch: None for the autoencoder's own, the one given, or uniform between two.

    A model that has seen many ratios serves many budgets: the same weights sample at any of them.
    """
    if ratios is None:
        return None
    if len(ratios) == 1:
        return ratios[0]
    low, high = ratios
    return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()


def draw_grain_map(
    vae: DynamicAutoencoderKL, entropy: torch.Tensor, ratios: list[float] | None, generator: torch.Generator
) -> tuple[torch.Tensor, float | None]:
    """The grain map (B, h, w) of a batch by its entropy (B, h, w), and its fine ratio, of `draw_fine_ratio`."""
    ratio = draw_fine_ratio(ratios, generator)
    return grain_map_from_entropy(entropy, vae.thresholds(ratio)), ratio


def drop_labels(
    class_labels: torch.Tensor, num_classes: int | None, share: float, generator: torch.Generator
) -> torch.Tensor | None:
    """Replace a random share of the labels by "no class", index `num_classes`; None for an unconditional model."""
    if num_classes is None:
        return None
    dropped = torch.rand(class_labels.shape, generator=generator, device=class_labels.device) < share
    return class_labels.masked_fill(dropped, num_classes)
