# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The `AutoencoderKL` of diffusers, checked and loaded like the models of this package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL

from ..files.weights import check_finite, check_fits, check_floating, read_headers
from ..limits import check_values
from ..words import shown
from .configs import LIMITS
from .strict import CONFIG, check_loaded, checked_files, init_parameters, read_config


# Not the annotations of diffusers, which say one block or number where any number of them is meant
_AUTOENCODER_KL = {
    "in_channels": int,
    "out_channels": int,
    "down_block_types": tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...],
    "up_block_types": tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...],
    "block_out_channels": tuple[int, ...],
    "layers_per_block": int,
    "act_fn": str,
    "latent_channels": int,
    "norm_num_groups": int,
    "sample_size": int | tuple[int, ...],
    "scaling_factor": float,
    "shift_factor": float | None,
    "latents_mean": tuple[float, ...] | None,
    "latents_std": tuple[float, ...] | None,
    "force_upcast": bool,
    "use_quant_conv": bool,
    "use_post_quant_conv": bool,
    "mid_block_add_attention": bool,
}
_AUTOENCODER_KL_LIMITS = LIMITS | {"act_fn": (1, 100)}


def load_autoencoder_kl(folder: Path) -> AutoencoderKL:
    """Load an `AutoencoderKL` that is whole, from safetensors only.

    Raises:
        ValueError: as for `check_autoencoder_kl`.
    """
    check_autoencoder_kl(folder)
    model, info = AutoencoderKL.from_pretrained(str(folder), use_safetensors=True, output_loading_info=True)
    check_loaded(AutoencoderKL, folder, info)
    return model


def check_autoencoder_kl(folder: Path, variant: str | None = None) -> None:
    """Check the files of an `AutoencoderKL`, of which diffusers would replace silently what is not there.

    Args:
        folder: holds config.json and the weights.
        variant: of the weights, such as "fp16".

    Raises:
        ValueError: a file is missing, damaged, or not what a manifest lists; the configuration is of another class, or
            a value of it out of range; there are no safetensors; weights are missing, foreign to the model, of another
            shape or not finite. The file is named.
    """
    files = checked_files(folder, variant)
    config = read_config(AutoencoderKL, folder / CONFIG, {}, ["AutoencoderKL"], _check_autoencoder_kl)
    tensors = read_headers(files)
    check_floating(tensors)
    try:
        with torch.device("meta"):  # takes no memory
            model = AutoencoderKL(**{key: config[key] for key in init_parameters(AutoencoderKL)})
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    named = dict(tensors)
    if len(files) == 1:  # as diffusers does: until 2023 layers of attention had other names
        model._fix_state_dict_keys_on_load(named)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_fits(named, shapes, f"AutoencoderKL in {folder}")
    check_finite(tensors)


def _check_autoencoder_kl(config: Mapping[str, Any]) -> None:
    check_values(config, _AUTOENCODER_KL, _AUTOENCODER_KL_LIMITS)
    levels, channels = len(config["block_out_channels"]), config["latent_channels"]
    for key in ("down_block_types", "up_block_types"):
        if len(config[key]) != levels:
            raise ValueError(f"`{key}` must be {levels}, as `block_out_channels` are, got {shown(config[key])}.")
    scales = [config["latents_mean"], config["latents_std"]]
    if scales != [None, None] and not all(one is not None and len(one) == channels for one in scales):
        raise ValueError(
            f"`latents_mean` and `latents_std` must both be None or {channels} numbers, got {shown(scales)}."
        )
    if config.get("quantization_config") is not None:
        raise ValueError("`quantization_config` must not be in a file: weights are read as they are.")
