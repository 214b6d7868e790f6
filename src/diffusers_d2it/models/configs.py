# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the keys of the four configurations may be, and how large a model they may ask for.

The annotations of the constructors say what kind of value a key holds, `LIMITS` its range, and the functions below
what must hold between keys. Nothing here allocates: the constructors check first, and loading checks a config.json
before any class is made.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..entropy import LUMA_WEIGHTS, NUM_BINS
from ..limits import check_values
from ..words import shown


MAX_PARAMETERS = 20_000_000_000  # 80 GB in float32: thirty times the largest model of the paper
_MAX_WINDOW = 16
ROUTER_REDUCTION = 4  # width of DC-DiT over that of its router
ROUTER_GROUPS = 8  # of the norm in it
_ROUNDING = 1e-4  # quantiles are rounded up to it

LIMITS = {
    "in_channels": (1, 512),
    "out_channels": (1, 1024),
    "sample_size": (1, 65536),
    # DynamicAutoencoderKL
    "latent_channels": (1, 512),
    "downsample_factors": (1, 1024),
    "block_out_channels": (1, 8192),
    "decoder_block_out_channels": (1, 8192),
    "layers_per_block": (1, 32),
    "norm_num_groups": (1, 1024),
    "scaling_factor": (1e-6, 1e6),
    "shift_factor": (-1e6, 1e6),
    "latents_mean": (-1e6, 1e6),
    "latents_std": (1e-6, 1e6),
    "grain_ratios": (0, 1),
    # D2iTGrainModel and D2iTContentModel
    "num_grains": (2, 8),
    "num_layers": (1, 96),
    "num_refine_layers": (1, 16),
    "num_attention_heads": (1, 256),
    "attention_head_dim": (1, 1024),
    "mlp_ratio": (0.01, 64),
    "num_classes": (1, 1_000_000),
    "window_size": (1, _MAX_WINDOW),
    "frequency_shift": (0, 1),
    # DCDiTModel
    "num_conv_layers": (1, 16),
    "conv_reduction": (1, 64),
    "smoothing_sigma": (0.1, 100),
    "position_patch_size": (1, 128),
    # Calibration
    "quantiles": (0, math.inf),
    "region_size": (1, 1024),
    "num_bins": (2, 4096),
    "sigma": (1e-6, 10),
    "num_images": (1, 10**15),
    "num_regions": (1, 10**18),
    "tie_share": (0, 1),
    "source": (0, 10_000),
    # EMAModel of diffusers
    "decay": (0, 1),
    "min_decay": (0, 1),
    "optimization_step": (0, 10**15),
    "update_after_step": (0, 10**15),
    "inv_gamma": (0, 1e15),
    "power": (0, 1e3),
}
# Keys beside those of a constructor: what quantisation notes, and diffusers' EMAModel when it saves a model
FURTHER_KEYS = {
    "quantization_config": dict | None,
    "decay": float,
    "min_decay": float,
    "optimization_step": int,
    "update_after_step": int,
    "use_ema_warmup": bool,
    "inv_gamma": float,
    "power": float,
}
CALIBRATION = {
    "quantiles": tuple[float, ...],
    "region_size": int,
    "num_bins": int,
    "sigma": float,
    "luma_weights": tuple[float, float, float],
    "luma_range": tuple[float, float],
    "num_images": int,
    "num_regions": int,
    "tie_share": float,
    "source": str,
}


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic VAE
# ---------------------------------------------------------------------------------------------------------------------


def check_autoencoder(config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names keys of a configuration of `DynamicAutoencoderKL` that contradict one another."""
    factors = list(config["downsample_factors"])
    if not 2 <= len(factors) <= 8 or factors[0] & (factors[0] - 1):
        raise ValueError(f"`downsample_factors` must be two to eight powers of two, got {factors}.")
    if any(coarse != 2 * fine for fine, coarse in zip(factors, factors[1:])):
        raise ValueError(f"each of `downsample_factors` must be twice the one before, got {factors}.")
    for key, factor, which in (
        ("block_out_channels", factors[-1], "coarsest"),
        ("decoder_block_out_channels", factors[0], "finest"),
    ):
        widths, groups = list(config[key]), config["norm_num_groups"]
        if 2 ** (len(widths) - 1) != factor:
            raise ValueError(
                f"`{key}` must have {factor.bit_length()} levels for {factor}, the {which} of `downsample_factors`"
                f" {factors}, got {shown(widths)}."
            )
        if any(width % groups for width in widths):
            raise ValueError(f"`{key}` must be multiples of `norm_num_groups` {groups}, got {shown(widths)}.")
    ratios = config["grain_ratios"]
    if ratios is not None and (len(ratios) != len(factors) or abs(sum(ratios) - 1) > 1e-6):
        raise ValueError(
            f"`grain_ratios` must be {len(factors)} shares that sum to 1, coarsest first, got {shown(ratios)}."
        )
    if config["calibration"] is not None:
        _check_calibration(config["calibration"], region_size=factors[-1])
    keys = ("block_out_channels", "decoder_block_out_channels", "layers_per_block")
    _check_num_parameters(_autoencoder_parameters(config), config, keys)


def _check_calibration(calibration: Mapping[str, Any], region_size: int) -> None:
    for key in calibration:
        if key not in CALIBRATION:
            raise ValueError(
                f"{shown(f'calibration.{key}')} is no key of this configuration, got {shown(calibration[key])};"
                f" expected are {', '.join(sorted(CALIBRATION))}."
            )
    check_values(calibration, CALIBRATION, LIMITS, inside="calibration.")
    if not {"quantiles", "region_size"} <= calibration.keys():
        raise ValueError(f"`calibration` must have `quantiles` and `region_size`, got {shown(dict(calibration))}.")
    quantiles = calibration["quantiles"]
    highest = math.log(calibration.get("num_bins", NUM_BINS)) + _ROUNDING
    if len(quantiles) < 2 or list(quantiles) != sorted(quantiles) or quantiles[-1] > highest:
        raise ValueError(
            f"`calibration.quantiles` must be two or more ascending entropies in [0, {highest:.4f}], those of so many"
            f" bins, got {shown(quantiles)}."
        )
    for key, value in (("region_size", region_size), ("luma_weights", LUMA_WEIGHTS), ("luma_range", (0, 1))):
        found = calibration.get(key, value)
        if (tuple(found) if isinstance(found, list) else found) != value:
            raise ValueError(f"`calibration` was counted with {key} {shown(found)}, this model has {value}.")


def _autoencoder_parameters(config: Mapping[str, Any]) -> int:
    """About how many parameters: the convolutions of 3x3, and what a head adds."""
    layers, total = config["layers_per_block"], 0
    for key, resnets in (("block_out_channels", layers), ("decoder_block_out_channels", layers + 1)):
        for before, width in zip([config[key][0], *config[key]], config[key]):
            total += 9 * before * width + 18 * resnets * width**2
    heads = [config["block_out_channels"][factor.bit_length() - 1] for factor in config["downsample_factors"]]
    return total + sum(40 * width**2 for width in [*heads, config["decoder_block_out_channels"][-1]])


# ---------------------------------------------------------------------------------------------------------------------
# Transformers
# ---------------------------------------------------------------------------------------------------------------------


def check_grain_model(config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names keys of a configuration of `D2iTGrainModel` that contradict one another."""
    _check_width(config)
    _check_transformer_parameters(config, config["num_layers"])


def check_content_model(config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names keys of a configuration of `D2iTContentModel` that contradict one another."""
    _check_outputs(config)
    cells = 2 ** (config["num_grains"] - 1)  # the side of a region, in tokens
    for key in ("window_size", "sample_size"):
        if config[key] % cells:
            raise ValueError(f"`{key}` must be a multiple of {cells} cells, the side of a region, got {config[key]}.")
    _check_width(config)
    refine_nets = config["num_grains"] - 1
    _check_transformer_parameters(config, config["num_layers"] + refine_nets * config["num_refine_layers"])


def check_chunking_model(config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names keys of a configuration of `DCDiTModel` that contradict one another."""
    _check_outputs(config)
    _check_width(config)
    dim, groups = config["num_attention_heads"] * config["attention_head_dim"], config["norm_num_groups"]
    unit = ROUTER_REDUCTION * ROUTER_GROUPS
    if dim % unit or dim % config["conv_reduction"]:
        raise ValueError(
            f"`num_attention_heads` times `attention_head_dim` must be a multiple of {unit}, which the router needs,"
            f" and of `conv_reduction` {config['conv_reduction']}, got {dim}."
        )
    width = dim // config["conv_reduction"]
    if width % groups or width < 2 * groups:  # alone in its group a channel loses what conditions it
        raise ValueError(f"`norm_num_groups` must divide {width} channels into groups of two or more, got {groups}.")
    if config["sample_size"] % config["position_patch_size"]:
        raise ValueError(
            f"`sample_size` must be a multiple of `position_patch_size` {config['position_patch_size']}, got"
            f" {config['sample_size']}."
        )
    convolutions = 2 * config["num_conv_layers"] * 18 * width * dim
    _check_transformer_parameters(config, config["num_layers"], convolutions)


def _check_outputs(config: Mapping[str, Any]) -> None:
    channels, outputs = config["in_channels"], config["out_channels"]
    if outputs not in (None, channels, 2 * channels):
        raise ValueError(
            f"`out_channels` must be None, {channels} (noise) or {2 * channels} (noise and variance), got {outputs}."
        )


def _check_width(config: Mapping[str, Any]) -> None:
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    if heads * head_dim % 4:
        raise ValueError(
            "`num_attention_heads` times `attention_head_dim` must be a multiple of 4, which the positions need, got"
            f" {heads} * {head_dim}."
        )
    if int(heads * head_dim * config["mlp_ratio"]) < 1:
        raise ValueError(
            f"`mlp_ratio` must leave a width of at least 1, got {config['mlp_ratio']} of {heads * head_dim}."
        )


def _check_transformer_parameters(config: Mapping[str, Any], num_blocks: int, others: int = 0) -> None:
    """About how many parameters: attention, modulation and feed-forward of the blocks, the table of labels, others."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    block = (10 + 2 * config["mlp_ratio"]) * dim**2
    keys = ("num_layers", "num_refine_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio", "num_classes")
    _check_num_parameters(others + num_blocks * block + ((config["num_classes"] or 0) + 1) * dim, config, keys)


def _check_num_parameters(num_parameters: float, config: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raise a ValueError if a model would be larger than any that could be meant; `keys` decide its size."""
    if num_parameters > MAX_PARAMETERS:
        values = ", ".join(f"`{key}` {shown(config[key])}" for key in keys if key in config)
        raise ValueError(
            f"{values} ask for about {num_parameters:.2g} parameters, a model may have at most {MAX_PARAMETERS:.2g}."
        )
