# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""DiT (Peebles and Xie, arXiv:2212.09748), the original's files and diffusers' folders, to D2iTContentModel."""

import math
import re
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from ..models.layers import sincos_positions
from ..models.transformer_d2it_content import D2iTContentModel
from .files import check_config, read_checkpoint, read_folder
from .transfer import ConversionReport, Transfer


_HEAD_WIDTHS = {384: 64, 768: 64, 1024: 64, 1152: 72}  # DiT-S, B, L, XL: the width of a head is not in the weights
_LARGEST_NORM_EPS = 1e-5  # of diffusers' DiT; ours is the 1e-6 of the original
_FRESH = ("grain_embed.", "refine_nets.")

# Name in the source -> name in D2iTContentModel; modules with a weight and a bias
_ORIGINAL_MODULES = {
    "t_embedder.mlp.0": "time_embed.mlp.linear_1",
    "t_embedder.mlp.2": "time_embed.mlp.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.adaln",
    "final_layer.linear": "norm_out.proj_out",
}
_ORIGINAL_BLOCK = {
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.linear_1",
    "mlp.fc2": "ff.linear_2",
    "adaLN_modulation.1": "adaln",
}
_DIFFUSERS_MODULES = {"proj_out_1": "norm_out.adaln", "proj_out_2": "norm_out.proj_out"}
_DIFFUSERS_BLOCK = {
    "norm1.linear": "adaln",
    "attn1.to_q": "attn.to_q",
    "attn1.to_k": "attn.to_k",
    "attn1.to_v": "attn.to_v",
    "attn1.to_out.0": "attn.to_out.0",
    "ff.net.0.proj": "ff.linear_1",
    "ff.net.2": "ff.linear_2",
}
_DIFFUSERS_EMBEDDERS = {  # weights below norm1.emb of every block
    "timestep_embedder.linear_1.weight": "time_embed.mlp.linear_1.weight",
    "timestep_embedder.linear_1.bias": "time_embed.mlp.linear_1.bias",
    "timestep_embedder.linear_2.weight": "time_embed.mlp.linear_2.weight",
    "timestep_embedder.linear_2.bias": "time_embed.mlp.linear_2.bias",
    "class_embedder.embedding_table.weight": "label_embed.weight",
}


def convert_dit_checkpoint(
    path: str | Path,
    *,
    num_attention_heads: int | None = None,
    num_refine_layers: int | None = None,
    num_grains: int = 2,
    window_size: int = 4,
) -> tuple[D2iTContentModel, ConversionReport]:
    """Make a content model of a checkpoint of the original DiT.

    All layers of the DiT become the Multi-grained Net, and the RefineNet is new: with an all-fine map the model
    computes what the DiT computes. Sizes are read off the shapes; the last row of the label table is taken as "no
    class", which every DiT has that was trained with label dropout. Learned variance stays: `out_channels` is 2C then.

    Args:
        path: a file with the weights alone, or with "model", "ema", "opt" and "args" as training writes it, of which
            the averaged weights "ema" are taken. Read by torch's restricted unpickler: no code in it is run.
        num_attention_heads: None for the widths of the published sizes S, B, L and XL.
        num_refine_layers: blocks of each RefineNet; None for a sixth of the DiT's layers, the share of the presets.
        num_grains: k; the patch size of the DiT must be 2 ** (k - 1).
        window_size: side of RefineNet's attention windows in tokens.

    Returns:
        The model, in float32, and the account of all weights.

    Raises:
        ValueError: the file holds other things than tensors and plain values; weights are missing, foreign or of a
            wrong shape; the positions are not DiT's; the patch size does not fit `num_grains`; the number of heads is
            not known.
    """
    weights, source = read_checkpoint(Path(path))
    transfer = Transfer(weights, source)
    dim, in_channels, patch_size, _ = transfer.take("x_embedder.proj.weight", ndim=4).shape
    _check_patch_size(patch_size, num_grains, source)
    num_attention_heads = _count_heads(num_attention_heads, dim, source)
    num_layers = len({match[1] for match in (re.match(r"blocks\.(\d+)\.", key) for key in weights) if match})
    side = _check_positions("pos_embed", transfer.take("pos_embed", ndim=3), dim, source)

    model = D2iTContentModel(
        sample_size=side * patch_size,
        in_channels=in_channels,
        out_channels=len(transfer.take("final_layer.linear.weight", ndim=2)) // patch_size**2,
        num_grains=num_grains,
        num_layers=num_layers,
        num_refine_layers=_count_refine_layers(num_refine_layers, num_layers),
        num_attention_heads=num_attention_heads,
        attention_head_dim=dim // num_attention_heads,
        mlp_ratio=len(transfer.take("blocks.0.mlp.fc1.weight", ndim=2)) / dim,
        num_classes=len(transfer.take("y_embedder.embedding_table.weight", ndim=2)) - 1,
        window_size=window_size,
    )
    transfer.into(model)
    _put_patch_embed(transfer, "x_embedder.proj")
    labels = "y_embedder.embedding_table.weight"
    transfer.put("label_embed.weight", transfer.take(labels), labels)
    transfer.put_modules(_ORIGINAL_MODULES)
    for i in range(num_layers):
        transfer.put_modules(_ORIGINAL_BLOCK, f"blocks.{i}.", f"transformer_blocks.{i}.")
        for part in ("weight", "bias"):
            key = f"blocks.{i}.attn.qkv.{part}"
            for name, value in zip(("to_q", "to_k", "to_v"), transfer.take(key).chunk(3)):
                transfer.put(f"transformer_blocks.{i}.attn.{name}.{part}", value, key)
    transfer.skip("pos_embed", "recomputed; equal to the model's own positions")
    _describe(transfer.report, model)
    return model, transfer.finish(fresh=_FRESH)


def convert_diffusers_dit(
    folder: str | Path,
    *,
    num_refine_layers: int | None = None,
    num_grains: int = 2,
    window_size: int = 4,
    frequency_shift: float = 1.0,
) -> tuple[D2iTContentModel, ConversionReport]:
    """Make a content model of a folder of diffusers' `DiTTransformer2DModel`.

    As `convert_dit_checkpoint`: all layers are kept, the RefineNet is new, and with an all-fine map the model computes
    what the source computes, at the source's `sample_size`. (At other sizes diffusers rescales the positions.)

    Args:
        folder: a local folder with config.json and the weights, or that of a `DiTPipeline`, whose `transformer` is
            taken. The older class name `Transformer2DModel` is understood.
        num_refine_layers: blocks of each RefineNet; None for a sixth of the DiT's layers, the share of the presets.
        num_grains: k; the patch size of the DiT must be 2 ** (k - 1).
        window_size: side of RefineNet's attention windows in tokens.
        frequency_shift: 1 is what diffusers computes. 0 is what the original DiT computes: what weights were trained
            with that come from there, like those of facebook/DiT-XL-2-256.

    Returns:
        The model, in float32, and the account of all weights.

    Raises:
        ValueError: the folder holds no DiT, or one that the model cannot represent: other norms or activations,
            embedders that differ between blocks, a patch size that does not fit `num_grains`; weights are missing,
            foreign or of a wrong shape.
    """
    config, weights, source = read_folder(
        Path(folder), "transformer", ("DiTTransformer2DModel", "Transformer2DModel"), DiTTransformer2DModel
    )
    _check_diffusers_config(config, source)
    _check_patch_size(config["patch_size"], num_grains, source)
    transfer = Transfer(weights, source)
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    num_layers = config["num_layers"]
    model = D2iTContentModel(
        sample_size=config["sample_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        num_grains=num_grains,
        num_layers=num_layers,
        num_refine_layers=_count_refine_layers(num_refine_layers, num_layers),
        num_attention_heads=config["num_attention_heads"],
        attention_head_dim=config["attention_head_dim"],
        mlp_ratio=len(transfer.take("transformer_blocks.0.ff.net.0.proj.weight", ndim=2)) / dim,
        num_classes=config["num_embeds_ada_norm"],
        window_size=window_size,
        frequency_shift=frequency_shift,
    )
    transfer.into(model)
    _put_patch_embed(transfer, "pos_embed.proj")
    transfer.put_modules(_DIFFUSERS_MODULES)
    for i in range(num_layers):
        transfer.put_modules(_DIFFUSERS_BLOCK, f"transformer_blocks.{i}.", f"transformer_blocks.{i}.")
        for name, target in _DIFFUSERS_EMBEDDERS.items():
            _put_shared(transfer, target, f"transformer_blocks.{{}}.norm1.emb.{name}", i)
    positions = "pos_embed.pos_embed"
    if positions in weights:  # diffusers does not store it any more
        side = _check_positions(positions, transfer.take(positions, ndim=3), dim, source)
        if side * config["patch_size"] != config["sample_size"]:
            raise ValueError(f"`{positions}` of {source} has {side}x{side} tokens, another `sample_size`.")
        transfer.skip(positions, "recomputed; equal to the model's own positions")
    transfer.report.notes.append(
        f"frequency_shift is {frequency_shift}: 1 is what diffusers computes, 0 what the original DiT computes"
    )
    if config["norm_eps"] != 1e-6:
        transfer.report.notes.append(
            f"the norms before the feed-forward layers had eps {config['norm_eps']} and have 1e-6, as in the original"
            " DiT"
        )
    _describe(transfer.report, model)
    return model, transfer.finish(fresh=_FRESH)


def _put_patch_embed(transfer: Transfer, name: str) -> None:
    """A convolution over patches is a linear map of their values in the order of `patchify`."""
    transfer.put("patch_embed.weight", transfer.take(f"{name}.weight", ndim=4).flatten(1), f"{name}.weight")
    transfer.put("patch_embed.bias", transfer.take(f"{name}.bias"), f"{name}.bias")


def _put_shared(transfer: Transfer, target: str, template: str, block: int) -> None:
    """A weight that diffusers keeps once in every block, and a D2iTContentModel once."""
    first, key = template.format(0), template.format(block)
    if block == 0:
        transfer.put(target, transfer.take(key), key)
    elif torch.equal(transfer.take(key), transfer.take(first)):
        transfer.skip(key, "equal to that of block 0")
    else:
        raise ValueError(
            f"`{key}` of {transfer.source} differs from `{first}`: a D2iTContentModel has one timestep embedder and"
            " one class embedder for all blocks."
        )


def _count_heads(num_attention_heads: int | None, dim: int, source: str) -> int:
    if num_attention_heads is None:
        if dim not in _HEAD_WIDTHS:
            raise ValueError(
                f"{source} has width {dim}, none of the published sizes of DiT ({', '.join(map(str, _HEAD_WIDTHS))}):"
                " pass `num_attention_heads`."
            )
        return dim // _HEAD_WIDTHS[dim]
    if num_attention_heads < 1 or dim % num_attention_heads:
        raise ValueError(f"`num_attention_heads` must divide {dim}, the width of {source}, got {num_attention_heads}.")
    return num_attention_heads


def _count_refine_layers(num_refine_layers: int | None, num_layers: int) -> int:
    return max(1, round(num_layers / 6)) if num_refine_layers is None else num_refine_layers


def _check_diffusers_config(config: dict, source: str) -> None:
    check_config(
        config,
        source,
        activation_fn="gelu-approximate",
        attention_bias=True,
        dropout=0.0,
        norm_elementwise_affine=False,
        norm_type="ada_norm_zero",
        upcast_attention=False,
    )
    if config["norm_eps"] > _LARGEST_NORM_EPS:
        raise ValueError(f"`norm_eps` of {source} must be at most {_LARGEST_NORM_EPS}, got {config['norm_eps']}.")
    patch_size, sample_size = config["patch_size"], config["sample_size"]
    if not isinstance(sample_size, int) or sample_size % patch_size:
        raise ValueError(f"`sample_size` of {source} must be a multiple of {patch_size}, got {sample_size}.")


def _check_patch_size(patch_size: int, num_grains: int, source: str) -> None:
    if patch_size == 2 ** (num_grains - 1):
        return
    grains = patch_size.bit_length()
    fits = grains >= 2 and patch_size == 2 ** (grains - 1)
    hint = f"pass `num_grains` {grains}" if fits else "no number of grains has that patch size"
    raise ValueError(
        f"{source} has a patch size of {patch_size}, a D2iTContentModel with `num_grains` {num_grains} has"
        f" {2 ** (num_grains - 1)}: {hint}."
    )


def _check_positions(key: str, positions: torch.Tensor, dim: int, source: str) -> int:
    """Side of the grid in tokens, if these are the positions that our model computes for it."""
    side = math.isqrt(positions.shape[1])
    if positions.shape != (1, side * side, dim):
        raise ValueError(f"`{key}` of {source} must have shape (1, side ** 2, {dim}), got {tuple(positions.shape)}.")
    expected = sincos_positions((side, side), positions.float())
    difference = (positions[0].float() - expected).abs().max().item()
    if not difference <= max(1e-4, torch.finfo(positions.dtype).eps):  # NaN fails it
        raise ValueError(
            f"`{key}` of {source} is not the sine-cosine grid of {side}x{side} tokens that a D2iTContentModel computes"
            f" itself: they differ by up to {difference:.2g}."
        )
    return side


def _describe(report: ConversionReport, model: D2iTContentModel) -> None:
    config = model.config
    report.notes.append(
        f"all {config.num_layers} layers are kept, and {config.num_refine_layers} of RefineNet added for each finer"
        " grain, where the paper replaces some (Table 4)"
    )
    if model.out_channels != config.in_channels:
        report.notes.append(
            f"{model.out_channels} output channels, noise and variance: for schedulers with variance_type"
            ' "learned_range"'
        )
