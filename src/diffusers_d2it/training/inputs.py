# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a step of the second stage learns from: the autoencoder, labels, grain maps.

Shapes:
    B batch, h w sides of the grain map in regions
"""

import os
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..data.images import check_resolution
from ..data.latent_cache import LatentCache
from ..data.loaders import ImageDataset, ImageStream
from ..draws import draw_uniform
from ..files.folders import digest, read_json
from ..files.source import find_model
from ..grains import grain_map_from_entropy
from ..models.autoencoder_kl import load_autoencoder_kl
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.latent_codec import LatentCodec
from ..models.strict import CONFIG
from ..words import shown


def load_autoencoder(vae: str, resolution: int, *, with_grains: bool = False) -> DynamicAutoencoderKL | AutoencoderKL:
    """The autoencoder of a folder or a name of the Hub, frozen: D2iT's or an `AutoencoderKL`, as its config.json says.

    Args:
        vae: the folder or the name.
        resolution: side of the images in pixels.
        with_grains: D2iT's alone will do.

    Raises:
        ValueError: there is none, it is of another class, or `resolution` is no multiple of its region or cell.
    """
    loaders = {"DynamicAutoencoderKL": DynamicAutoencoderKL.from_pretrained}
    if not with_grains:
        loaders["AutoencoderKL"] = load_autoencoder_kl
    try:
        folder = find_model(vae, None, None, {})
        name = read_json(folder / CONFIG).get("_class_name")
        if name not in loaders:
            raise ValueError(f"`_class_name` in {CONFIG} must be {' or '.join(loaders)}, got {shown(name)}.")
        loaded = loaders[name](folder).requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        inside = os.path.join(vae, "vae")
        hint = f" It is a pipeline: did you mean {inside}?" if os.path.isfile(f"{vae}/model_index.json") else ""
        raise ValueError(f"`vae` {vae}: {error}{hint}") from error
    loaded.register_to_config(_name_or_path=vae)
    check_resolution(resolution, LatentCodec(loaded).unit)
    return loaded


def identity_of(
    data: LatentCache | ImageDataset | ImageStream,
    vae: DynamicAutoencoderKL | AutoencoderKL | LatentCodec | None = None,
) -> dict[str, Any]:
    """What a run must find again when it is resumed: the same data; in the second stage the same codes and thresholds.

    Args:
        data: what it learns from.
        vae: the autoencoder of the second stage, or its codec.
    """
    num_images = None if isinstance(data, ImageStream) else len(data)
    identity = {"data": {"num_images": num_images, "fingerprint": data.fingerprint}}
    if vae is None:
        return identity
    codec = LatentCodec(vae)
    config = codec.vae.config
    thresholds = [config.calibration, config.grain_ratios] if codec.has_grains else None
    return identity | {"autoencoder": digest({**codec.describe(), "thresholds": thresholds})}


def draw_fine_ratio(ratios: list[float] | None, seed: int, step: int) -> float | None:
    """The fine ratio of an update: None for the autoencoder's own, the one given, or uniform between two.

    It follows from the seed and the number of the update, and is the same in all its forward passes and processes. A
    model that has seen many ratios serves many budgets: the same weights sample at any of them.
    """
    if ratios is None:
        return None
    if len(ratios) == 1:
        return ratios[0]
    return np.random.default_rng((seed, step)).uniform(*ratios)


def draw_grain_map(
    vae: DynamicAutoencoderKL, entropy: torch.Tensor, ratios: list[float] | None, seed: int, step: int
) -> tuple[torch.Tensor, float | None]:
    """The grain map (B, h, w) of a batch by its entropy (B, h, w), and its fine ratio, of `draw_fine_ratio`."""
    ratio = draw_fine_ratio(ratios, seed, step)
    return grain_map_from_entropy(entropy, vae.thresholds(ratio)), ratio


def draw_budget(budgets: list[float], warmup_steps: int, seed: int, step: int) -> float:
    """The budget of an update of DC-DiT: 1 for the first of them, then one of these, the same in all processes.

    It follows from the seed and the number of the update, so a resumed run draws what it would have drawn.
    """
    if step < warmup_steps:
        return 1.0
    return budgets[np.random.default_rng((seed, step)).integers(len(budgets))]


def drop_labels(
    class_labels: torch.Tensor, num_classes: int | None, share: float, generators: list[torch.Generator]
) -> torch.Tensor | None:
    """Replace a random share of the labels by "no class", index `num_classes`; None for an unconditional model."""
    if num_classes is None:
        return None
    return class_labels.masked_fill(draw_uniform(generators) < share, num_classes)
