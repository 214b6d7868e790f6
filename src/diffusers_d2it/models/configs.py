# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What each key of the three configurations may be, alone and together, and how large a model they may ask for.

Nothing here allocates: the constructors check first, and loading checks a config.json before any class is made.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..calibration import check_calibration
from ..grains import NUM_BINS
from ..limits import (
    Flag,
    Items,
    Number,
    Object,
    Optional,
    Text,
    Whole,
    check_keys,
    check_num_parameters,
    check_ranges,
    shown,
)


_WIDTH = Whole(1, 8192)
_RATIO = Number(0, 1)
_GRAINS = Whole(2, 8)
_LAYERS = Whole(1, 96)
_HEADS = Whole(1, 256)
_HEAD_DIM = Whole(1, 1024)
_MLP_RATIO = Number(0.01, 64)
_CLASSES = Optional(Whole(1, 1_000_000))
_MAX_WINDOW = 16
_ROUNDING = 1e-4  # quantiles are rounded up to it

AUTOENCODER = {
    "in_channels": Whole(1, 64),
    "out_channels": Whole(1, 64),
    "latent_channels": Whole(1, 512),
    "downsample_factors": Items(Whole(1, 1024), 1, 8),
    "block_out_channels": Items(_WIDTH, 1, 11),
    "decoder_block_out_channels": Items(_WIDTH, 1, 11),
    "layers_per_block": Whole(1, 32),
    "norm_num_groups": Whole(1, 1024),
    "mid_block_add_attention": Flag(),
    "sample_size": Whole(1, 65536),
    "scaling_factor": Number(1e-6, 1e6),
    "shift_factor": Optional(Number(-1e6, 1e6)),
    "grain_ratios": Optional(Items(_RATIO, 1, 8)),
    "calibration": Optional(Object()),
    "use_post_quant_conv": Flag(),
}
CALIBRATION = {
    "quantiles": Items(Number(0, math.inf), 2, 100_001),
    "region_size": Whole(1, 1024),
    "num_bins": Whole(2, 4096),
    "sigma": Number(1e-6, 10),
    "luma_weights": Items(_RATIO, 3, 3),
    "luma_range": Items(Number(-1e6, 1e6), 2, 2),
    "num_images": Whole(1, 10**15),
    "num_regions": Whole(1, 10**18),
    "tie_share": _RATIO,
    "source": Text(10_000),
}
GRAIN_MODEL = {
    "sample_size": Whole(1, 8192),
    "num_grains": _GRAINS,
    "num_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "attention_head_dim": _HEAD_DIM,
    "mlp_ratio": _MLP_RATIO,
    "num_classes": _CLASSES,
    "fine_ratio_condition": Flag(),
}
CONTENT_MODEL = {
    "sample_size": Whole(1, 8192),
    "in_channels": Whole(1, 512),
    "out_channels": Optional(Whole(1, 1024)),
    "num_grains": _GRAINS,
    "num_layers": _LAYERS,
    "num_refine_layers": Whole(1, 16),
    "num_attention_heads": _HEADS,
    "attention_head_dim": _HEAD_DIM,
    "mlp_ratio": _MLP_RATIO,
    "num_classes": _CLASSES,
    "window_size": Whole(1, 1024),
    "frequency_shift": _RATIO,
}


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic VAE
# ---------------------------------------------------------------------------------------------------------------------


def check_autoencoder(config: Mapping[str, Any]) -> None:
    """Check a whole configuration of `DynamicAutoencoderKL`.

    Raises:
        ValueError: a value is out of its range, or contradicts another; the key and its value are named.
    """
    check_ranges(config, AUTOENCODER)
    factors = list(config["downsample_factors"])
    if len(factors) < 2 or factors[0] & (factors[0] - 1):
        raise ValueError(f"`downsample_factors` must be two or more powers of two, got {factors}.")
    if any(coarse != 2 * fine for fine, coarse in zip(factors, factors[1:])):
        raise ValueError(f"each of `downsample_factors` must be twice the one before, got {factors}.")
    for key, factor, which in (
        ("block_out_channels", factors[-1], "coarsest"),
        ("decoder_block_out_channels", factors[0], "finest"),
    ):
        if 2 ** (len(config[key]) - 1) != factor:
            raise ValueError(
                f"`{key}` has {len(config[key])} levels, of `downsample_factors` {factors} the {which}, {factor} needs"
                f" {factor.bit_length()}, got {list(config[key])}."
            )
        if any(width % config["norm_num_groups"] for width in config[key]):
            raise ValueError(
                f"`{key}` must be multiples of `norm_num_groups` {config['norm_num_groups']}, got {list(config[key])}."
            )
    ratios = config["grain_ratios"]
    if ratios is not None and (len(ratios) != len(factors) or abs(sum(ratios) - 1) > 1e-6):
        raise ValueError(
            f"`grain_ratios` must be {len(factors)} shares that sum to 1, coarsest first, got {shown(ratios)}."
        )
    if config["calibration"] is not None:
        _check_calibration(config["calibration"], region_size=factors[-1])
    keys = ("block_out_channels", "decoder_block_out_channels", "layers_per_block")
    check_num_parameters(_autoencoder_parameters(config), config, keys)


def _check_calibration(calibration: Mapping[str, Any], region_size: int) -> None:
    check_keys(calibration, set(CALIBRATION), inside="calibration.")
    check_ranges(calibration, CALIBRATION, inside="calibration.")
    if not {"quantiles", "region_size"} <= calibration.keys():
        raise ValueError(f"`calibration` must have `quantiles` and `region_size`, got {shown(dict(calibration))}.")
    check_calibration(calibration, region_size)
    highest = math.log(calibration.get("num_bins", NUM_BINS)) + _ROUNDING
    if calibration["quantiles"][-1] > highest:  # they ascend
        raise ValueError(
            f"`calibration.quantiles` must lie in [0, {highest:.4f}], the entropies of so many bins, got"
            f" {shown(calibration['quantiles'][-1])}."
        )


def _autoencoder_parameters(config: Mapping[str, Any]) -> int:
    """About how many parameters: the convolutions of 3x3, and what a head adds."""
    layers = config["layers_per_block"]
    total = 0
    for key, resnets in (("block_out_channels", layers), ("decoder_block_out_channels", layers + 1)):
        before = config[key][0]
        for width in config[key]:
            total += 9 * (before * width + width * width) + (resnets - 1) * 18 * width**2 + 9 * width**2
            before = width
    heads = [config["block_out_channels"][factor.bit_length() - 1] for factor in config["downsample_factors"]]
    return total + sum(40 * width**2 for width in [*heads, config["decoder_block_out_channels"][-1]])


# ---------------------------------------------------------------------------------------------------------------------
# Transformers
# ---------------------------------------------------------------------------------------------------------------------


def check_grain_model(config: Mapping[str, Any]) -> None:
    """Check a whole configuration of `D2iTGrainModel`.

    Raises:
        ValueError: a value is out of its range, or contradicts another; the key and its value are named.
    """
    check_ranges(config, GRAIN_MODEL)
    _check_width(config)
    _check_transformer_parameters(config, config["num_layers"])


def check_content_model(config: Mapping[str, Any]) -> None:
    """Check a whole configuration of `D2iTContentModel`.

    Raises:
        ValueError: a value is out of its range, or contradicts another; the key and its value are named.
    """
    check_ranges(config, CONTENT_MODEL)
    channels, outputs = config["in_channels"], config["out_channels"]
    if outputs not in (None, channels, 2 * channels):
        raise ValueError(
            f"`out_channels` must be None, {channels} (noise) or {2 * channels} (noise and variance), got {outputs}."
        )
    cells = 2 ** (config["num_grains"] - 1)
    window = config["window_size"]
    if window < cells or window % cells or window > _MAX_WINDOW:
        raise ValueError(
            f"`window_size` must be a multiple of {cells} tokens, the side of a region, up to {_MAX_WINDOW}, got"
            f" {window}."
        )
    if config["sample_size"] % cells:
        raise ValueError(
            f"`sample_size` must be a multiple of {cells} cells, the side of a region, got {config['sample_size']}."
        )
    _check_width(config)
    refine_nets = config["num_grains"] - 1
    _check_transformer_parameters(config, config["num_layers"] + refine_nets * config["num_refine_layers"])


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


def _check_transformer_parameters(config: Mapping[str, Any], num_blocks: int) -> None:
    """About how many parameters: attention, modulation and feed-forward of the blocks, and the table of labels."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    block = (10 + 2 * config["mlp_ratio"]) * dim**2
    keys = ("num_layers", "num_refine_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio", "num_classes")
    check_num_parameters(
        num_blocks * block + ((config["num_classes"] or 0) + 1) * dim,
        config,
        tuple(key for key in keys if key in config),
    )
