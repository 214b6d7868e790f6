# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The AutoencoderKL of latent diffusion to DynamicAutoencoderKL: one more level, one more head."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from ..limits import check_values
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.configs import LIMITS
from ..presets import load_preset
from .transfer import ConversionReport, check_config, read_folder, transfer


# What diffusers called these layers until 2023, and many public files still do
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_KEPT_OPTIONS = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "mid_block_add_attention",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "use_post_quant_conv",
)


def convert_autoencoder_kl(
    folder: str | Path, *, calibration: dict | None = None
) -> tuple[DynamicAutoencoderKL, ConversionReport]:
    """Make a dynamic autoencoder of factors (f, 2f) of a folder of diffusers' `AutoencoderKL` of factor f.

    The fine path is the source: `encode(x, fine_ratio=1)` gives its moments, `decode` its images. The coarse path is
    one more level that training must make useful. Its downsampler starts as the mean of 2x2 features, its residual
    blocks as the identity, its head as a copy of the fine head: a coarse code is at the start the fine head applied to
    the source's deepest features, averaged over 2x2. Scale and shift of the source, measured on fine codes, are kept.

    Args:
        folder: a local folder with config.json and the weights, or that of a pipeline, whose `vae` is taken.
        calibration: from `EntropyCalibration.to_config`, for regions of 2f pixels. None takes that of the preset
            "dvae-f8f16" if 2f is 16 (entropy depends on the images alone, not on the weights), else leaves it out.

    Returns:
        The model, in float32, and the account of all weights.

    Raises:
        ValueError: the folder holds no AutoencoderKL, or one that the model cannot represent: other blocks or
            activations, latents normalised by channel, images that are not RGB; weights are missing, foreign or of a
            wrong shape; the calibration was counted on regions of another size.
    """
    config, weights, source = read_folder(Path(folder), "vae", ("AutoencoderKL",), AutoencoderKL)
    check_values(config, {"block_out_channels": tuple[int, ...], "sample_size": int}, LIMITS)
    widths = list(config["block_out_channels"])
    check_config(
        config,
        source,
        in_channels=3,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        act_fn="silu",
        latents_mean=None,
        latents_std=None,
    )
    report = ConversionReport(source)
    factor = 2 ** (len(widths) - 1)
    if calibration is None and factor == 8:
        calibration = load_preset("dvae-f8f16")["calibration"]
        report.notes.append(f"calibration of the preset dvae-f8f16, counted on {calibration['source']}")
    elif calibration is None:
        report.notes.append("no calibration: run examples/calibrate_dvae.py")

    model = DynamicAutoencoderKL(
        **{option: config[option] for option in _KEPT_OPTIONS},
        downsample_factors=[factor, 2 * factor],
        block_out_channels=[*widths, widths[-1]],
        decoder_block_out_channels=widths,
        calibration=calibration,
    )
    _transfer(weights, model, config["use_quant_conv"], report)
    _start_as_mean(model.encoder.downsamplers[f"f{factor}"].conv)
    for resnet in model.encoder.down_blocks[len(widths)].resnets:
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
    report.notes.append(
        f"the coarse head f{2 * factor} starts as the fine head f{factor} on features averaged over 2x2;"
        f" scaling_factor {model.config.scaling_factor} and shift_factor {model.config.shift_factor} were measured on"
        " fine codes"
    )
    return model, report


def _transfer(
    weights: dict[str, torch.Tensor], model: DynamicAutoencoderKL, use_quant_conv: bool, report: ConversionReport
) -> None:
    """Fill a model: both heads from the one of the source, the last level not at all."""
    level = len(model.config.block_out_channels) - 1
    fresh = (f"encoder.downsamplers.f{model.config.downsample_factors[0]}.", f"encoder.down_blocks.{level}.")

    def origin(target: str) -> tuple[list[str], Callable | None]:
        if target.startswith(fresh):
            return [], None
        key = re.sub(r"^(encoder\.(?:mid_block|conv_norm_out|conv_out))s\.f\d+\.", r"\1.", target)
        if use_quant_conv and key == "encoder.conv_out.weight":
            return [key, "quant_conv.weight"], partial(_fold_weight, source=report.source)
        if use_quant_conv and key == "encoder.conv_out.bias":
            return [key, "quant_conv.weight", "quant_conv.bias"], _fold_bias
        if key not in weights:
            layer = re.search(r"(?<=attentions\.0\.)(to_[qkv]|to_out\.0)(?=\.)", key)
            old = key.replace(layer[0], _OLD_ATTENTION[layer[0]]) if layer else key
            key = old if old in weights else key
        return [key], None

    transfer(weights, model, origin, report)


def _fold_weight(weight: torch.Tensor, mix: torch.Tensor, source: str) -> torch.Tensor:
    """The last convolution of the encoder and the one after it are one: both linear, and 1x1 reads no neighbours."""
    if weight.ndim != 4 or mix.shape != (len(weight), len(weight), 1, 1):
        raise ValueError(
            f"`quant_conv.weight` of {source} must have shape {(len(weight), len(weight), 1, 1)}, as"
            f" `encoder.conv_out.weight` has shape {tuple(weight.shape)}, got {tuple(mix.shape)}."
        )
    return torch.einsum("om, mixy -> oixy", mix[..., 0, 0].double(), weight.double())


def _fold_bias(bias: torch.Tensor, mix: torch.Tensor, mix_bias: torch.Tensor) -> torch.Tensor:
    return mix[..., 0, 0].double() @ bias.double() + mix_bias.double()


def _start_as_mean(conv: nn.Conv2d) -> None:
    """Let a 3x3 convolution of stride 2, padded on the right and below, compute the mean of 2x2 cells."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        conv.weight[:, :, :2, :2] = torch.eye(conv.in_channels)[:, :, None, None] / 4
