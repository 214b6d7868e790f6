# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The AutoencoderKL of latent diffusion to DynamicAutoencoderKL: one more level, one more head."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..presets import load_preset
from .files import check_config, read_folder
from .transfer import ConversionReport, Transfer


# What diffusers called these layers until 2023, and many public files still do
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
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
    one more level. Its downsampler starts as the mean of 2x2 features, its residual blocks as the identity, its head
    as a copy of the fine head: at the start a coarse code is the fine head applied to the source's deepest features,
    averaged over 2x2. Training makes a useful code of it.

    The scaling and shift factors of the source are kept; they were measured on fine codes only.

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
    widths = list(config["block_out_channels"])
    _check_config(config, len(widths), source)
    transfer = Transfer(weights, source)
    notes = transfer.report.notes
    factor = 2 ** (len(widths) - 1)
    if calibration is None and 2 * factor == 16:
        calibration = load_preset("dvae-f8f16")["calibration"]
        notes.append(f"calibration of the preset dvae-f8f16, counted on {calibration['source']}")
    elif calibration is None:
        notes.append("no calibration: run examples/calibrate_dvae.py")

    model = DynamicAutoencoderKL(
        **{option: config[option] for option in _KEPT_OPTIONS},
        downsample_factors=[factor, 2 * factor],
        block_out_channels=[*widths, widths[-1]],
        decoder_block_out_channels=widths,
        calibration=calibration,
    )
    transfer.into(model)
    heads = (f"f{factor}", f"f{2 * factor}")
    for key, value in weights.items():
        for target in _targets(key, heads):
            if target in transfer.target:  # if not, it stays unaccounted for and `finish` names it
                transfer.put(target, value, key)
    _put_moments(transfer, heads, config["use_quant_conv"])

    level = len(widths)
    _start_as_mean(model.encoder.downsamplers[heads[0]].conv)
    for resnet in model.encoder.down_blocks[level].resnets:
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
    notes.append(
        f"the coarse head {heads[1]} starts as the fine head {heads[0]} on features averaged over 2x2; scaling_factor"
        f" {model.config.scaling_factor} and shift_factor {model.config.shift_factor} were measured on fine codes"
    )
    return model, transfer.finish(fresh=(f"encoder.downsamplers.{heads[0]}.", f"encoder.down_blocks.{level}."))


def _check_config(config: dict, num_levels: int, source: str) -> None:
    check_config(
        config,
        source,
        in_channels=3,
        down_block_types=["DownEncoderBlock2D"] * num_levels,
        up_block_types=["UpDecoderBlock2D"] * num_levels,
        act_fn="silu",
        latents_mean=None,
        latents_std=None,
    )
    if not isinstance(config["sample_size"], int):
        raise ValueError(f"`sample_size` of {source} must be one number, got {config['sample_size']}.")


def _targets(key: str, heads: tuple[str, str]) -> list[str]:
    """Where a weight goes as it is: that of a head goes to both."""
    layers = "|".join(_OLD_ATTENTION)
    name = re.sub(rf"(?<=attentions\.0\.)({layers})(?=\.)", lambda match: _OLD_ATTENTION[match[1]], key)
    for module in ("mid_block", "conv_norm_out"):
        prefix = f"encoder.{module}."
        if name.startswith(prefix):
            return [f"encoder.{module}s.{head}.{name.removeprefix(prefix)}" for head in heads]
    return [name]


def _put_moments(transfer: Transfer, heads: tuple[str, str], use_quant_conv: bool) -> None:
    """The last convolution of the encoder and the one after it are one: both linear, and 1x1 reads no neighbours."""
    weights, biases = ["encoder.conv_out.weight"], ["encoder.conv_out.bias"]
    weight, bias = transfer.take(weights[0], ndim=4), transfer.take(biases[0], ndim=1)
    if use_quant_conv:
        weights, biases = [*weights, "quant_conv.weight"], [*biases, "quant_conv.weight", "quant_conv.bias"]
        mix = transfer.take("quant_conv.weight", ndim=4)
        if mix.shape != (len(weight), len(weight), 1, 1) or len(weight) != len(bias):
            raise ValueError(
                f"`quant_conv.weight` of {transfer.source} must have shape {(len(bias), len(bias), 1, 1)}, as"
                f" `encoder.conv_out` has {len(weight)} channels, got {tuple(mix.shape)}."
            )
        mix = mix[..., 0, 0].double()
        weight = torch.einsum("om, mixy -> oixy", mix, weight.double())
        bias = mix @ bias.double() + transfer.take("quant_conv.bias", ndim=1).double()
    for head in heads:
        transfer.put(f"encoder.conv_outs.{head}.weight", weight, *weights)
        transfer.put(f"encoder.conv_outs.{head}.bias", bias, *biases)


def _start_as_mean(conv: nn.Conv2d) -> None:
    """Let a 3x3 convolution of stride 2, padded on the right and below, compute the mean of 2x2 cells."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        conv.weight[:, :, :2, :2] = torch.eye(conv.in_channels)[:, :, None, None] / 4
