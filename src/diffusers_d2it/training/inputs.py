# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a step of the second stage learns from: the autoencoder, labels, grain maps.

Shapes:
    B batch, h w sides of the grain map in regions
"""

from pathlib import Path

import torch

from ..data.images import check_resolution
from ..data.latent_cache import describe_vae
from ..files.folders import digest
from ..grains import grain_map_from_entropy
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL


def load_autoencoder(vae: str, resolution: int) -> DynamicAutoencoderKL:
    """The autoencoder of a folder or a name of the Hub, frozen.

    Raises:
        ValueError: there is none, or `resolution`, the side of the images in pixels, does not suit its regions.
    """
    folder = Path(vae)
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = f": did you mean {folder / 'vae'}?" if (folder / "vae" / "config.json").is_file() else "."
        raise ValueError(f"`vae` {vae} holds no config.json{hint}")
    if not folder.exists() and vae.count("/") != 1:
        raise ValueError(f"`vae` must be a folder or a name of the Hub, user/name, got {vae}.")
    loaded = DynamicAutoencoderKL.from_pretrained(vae).requires_grad_(False).eval()
    check_resolution(resolution, loaded.region_size)
    return loaded


def identity_of(data_fingerprint: str, vae: DynamicAutoencoderKL) -> dict[str, str]:
    """What a run of the second stage must find again when it is resumed: the same data, codes and thresholds."""
    autoencoder = {**describe_vae(vae), "thresholds": [vae.config.calibration, vae.config.grain_ratios]}
    return {"data": data_fingerprint, "autoencoder": digest(autoencoder)}


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
