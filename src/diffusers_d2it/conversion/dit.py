# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""DiT (Peebles and Xie, arXiv:2212.09748), the original's files and diffusers' folders, to D2iTContentModel."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from diffusers import DiTTransformer2DModel

from ..limits import check_values
from ..models.configs import LIMITS
from ..models.layers import sincos_positions
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_dcdit import DCDiTModel
from .transfer import ConversionReport, check_config, read_checkpoint, read_folder, take, transfer


_HEAD_WIDTHS = {384: 64, 768: 64, 1024: 64, 1152: 72}  # DiT-S, B, L, XL: the width of a head is not in the weights
# Of diffusers' DiT; ours is the 1e-6 of the original
_LIMITS = LIMITS | {"patch_size": (1, 128), "norm_eps": (0, 1e-5)}
_FRESH = ("grain_embed.", "refine_nets.")

# Parts of the names in our models -> in the original DiT and what was built on it; what is not here is called the same
DIT_NAMES = {
    "time_embed.mlp.linear_1": "t_embedder.mlp.0",
    "time_embed.mlp.linear_2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
    "attn.to_out.0": "attn.proj",
    "attn.to_q": "attn.qkv",  # a third each of one Linear
    "attn.to_k": "attn.qkv",
    "attn.to_v": "attn.qkv",
    "ff.linear_": "mlp.fc",
    "adaln": "adaLN_modulation.1",
    "norm_out.proj_out": "final_layer.linear",
    "norm_out": "final_layer",
}
_ORIGINAL = DIT_NAMES | {"patch_embed": "x_embedder.proj", "transformer_blocks": "blocks"}
_DIFFUSERS = {
    "patch_embed": "pos_embed.proj",
    "time_embed.mlp": "transformer_blocks.0.norm1.emb.timestep_embedder",
    "label_embed": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table",
    ".attn.": ".attn1.",
    "ff.linear_1": "ff.net.0.proj",
    "ff.linear_2": "ff.net.2",
    "norm_out.adaln": "proj_out_1",
    "norm_out.proj_out": "proj_out_2",
    ".adaln": ".norm1.linear",
}


@dataclass(frozen=True)
class DiTSource:
    """A DiT as it was read."""

    weights: dict[str, torch.Tensor]
    names: dict[str, str]  # parts of the names in our models -> in these weights
    patch_size: int
    sizes: dict[str, Any]  # by the keys that the configurations of our models have for them
    report: ConversionReport


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
    return _convert(read_dit_checkpoint(path, num_attention_heads), num_grains, num_refine_layers, window_size)


def convert_diffusers_dit(
    folder: str | Path,
    *,
    num_refine_layers: int | None = None,
    num_grains: int = 2,
    window_size: int = 4,
    frequency_shift: float = 1.0,
) -> tuple[D2iTContentModel, ConversionReport]:
    """Make a content model of a folder of diffusers' `DiTTransformer2DModel`.

    As `convert_dit_checkpoint`, with the arguments that it has too: with an all-fine map the model computes what the
    source computes, at the source's `sample_size`. (At other sizes diffusers rescales the positions.)

    Args:
        folder: a local folder with config.json and the weights, or that of a `DiTPipeline`, whose `transformer` is
            taken. The older class name `Transformer2DModel` is understood.
        num_refine_layers, num_grains, window_size: as there.
        frequency_shift: 1 is what diffusers computes. 0 is what the original DiT computes: what weights were trained
            with that come from there, like those of facebook/DiT-XL-2-256.

    Raises:
        ValueError: the folder holds no DiT, or one that the model cannot represent: other norms or activations,
            embedders that differ between blocks, a patch size that does not fit `num_grains`; weights are missing,
            foreign or of a wrong shape.
    """
    return _convert(read_diffusers_dit(folder, frequency_shift), num_grains, num_refine_layers, window_size)


def read_dit_checkpoint(path: str | Path, num_attention_heads: int | None) -> DiTSource:
    """A checkpoint of the original DiT, its sizes read off the shapes. Arguments and errors as of the conversion."""
    weights, source, _ = read_checkpoint(Path(path), plain_classes=["argparse.Namespace"])  # the flags of its training
    report = ConversionReport(source)
    dim, in_channels, patch_size, _ = take(weights, "x_embedder.proj.weight", source, ndim=4).shape
    sizes = {
        "in_channels": in_channels,
        "out_channels": len(take(weights, "final_layer.linear.weight", source, ndim=2)) // patch_size**2,
        "num_layers": len({match[1] for match in (re.match(r"blocks\.(\d+)\.", key) for key in weights) if match}),
        "num_attention_heads": count_heads(num_attention_heads, dim, source),
        "mlp_ratio": len(take(weights, "blocks.0.mlp.fc1.weight", source, ndim=2)) / dim,
        "num_classes": len(take(weights, "y_embedder.embedding_table.weight", source, ndim=2)) - 1,
        "sample_size": check_positions("pos_embed", weights, dim, report) * patch_size,
    }
    sizes["attention_head_dim"] = dim // sizes["num_attention_heads"]
    return DiTSource(weights, _ORIGINAL, patch_size, sizes, report)


def read_diffusers_dit(folder: str | Path, frequency_shift: float) -> DiTSource:
    """A folder of diffusers' DiT. Arguments and errors as of the conversion."""
    config, weights, source = read_folder(
        Path(folder), "transformer", ("DiTTransformer2DModel", "Transformer2DModel"), DiTTransformer2DModel
    )
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
    kept = ("sample_size", "in_channels", "out_channels", "num_layers", "num_attention_heads", "attention_head_dim")
    hints = get_type_hints(D2iTContentModel.__init__)
    check_values(config, {"patch_size": int, "norm_eps": float} | {option: hints[option] for option in kept}, _LIMITS)
    patch_size, sample_size = config["patch_size"], config["sample_size"]
    report = ConversionReport(source)
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    take(weights, "pos_embed.proj.weight", source, ndim=4)
    if "pos_embed.pos_embed" in weights:  # diffusers does not store it any more
        side = check_positions("pos_embed.pos_embed", weights, dim, report)
        if side * patch_size != sample_size:
            raise ValueError(f"`pos_embed.pos_embed` of {source} has {side}x{side} tokens, another `sample_size`.")
    _share_embedders(weights, config["num_layers"], report)
    report.notes.append(
        f"frequency_shift is {frequency_shift}: 1 is what diffusers computes, 0 what the original DiT computes"
    )
    if config["norm_eps"] != 1e-6:
        report.notes.append(
            f"the norms before the feed-forward layers had eps {config['norm_eps']}, and have 1e-6 as the original DiT"
        )
    sizes = {option: config[option] for option in kept} | {
        "mlp_ratio": len(take(weights, "transformer_blocks.0.ff.net.0.proj.weight", source, ndim=2)) / dim,
        "num_classes": config["num_embeds_ada_norm"],
        "frequency_shift": frequency_shift,
    }
    return DiTSource(weights, _DIFFUSERS, patch_size, sizes, report)


def _convert(
    dit: DiTSource, num_grains: int, num_refine_layers: int | None, window_size: int
) -> tuple[D2iTContentModel, ConversionReport]:
    """Make a content model of a DiT."""
    report, num_layers = dit.report, dit.sizes["num_layers"]
    if dit.patch_size != 2 ** (num_grains - 1):
        raise ValueError(
            f"{report.source} has a patch size of {dit.patch_size}: a D2iTContentModel has 2 ** (num_grains - 1), with"
            f" `num_grains` {num_grains} that is {2 ** (num_grains - 1)}."
        )
    if num_refine_layers is None:
        num_refine_layers = max(1, round(num_layers / 6))
    model = D2iTContentModel(
        num_grains=num_grains, num_refine_layers=num_refine_layers, window_size=window_size, **dit.sizes
    )

    def origin(target: str) -> tuple[list[str], Callable | None]:
        if target.startswith(_FRESH):
            return [], None
        [key], make = origin_of(target, dit.names)
        if target == "patch_embed.weight":  # a convolution over patches is linear in their values, as `patchify` has
            return [key], lambda weight: weight.flatten(1)
        return [key], make

    transfer(dit.weights, model, origin, report)
    report.notes.append(
        f"all {num_layers} layers are kept, and {num_refine_layers} of RefineNet added for each finer grain,"
        " where the paper replaces some (Table 4)"
    )
    note_variance(model, report)
    return model, report


def note_variance(model: D2iTContentModel | DCDiTModel, report: ConversionReport) -> None:
    """Say in the report which schedulers a model of learned variance is for."""
    if model.out_channels != model.config.in_channels:
        report.notes.append(
            f"{model.out_channels} output channels, noise and variance: for schedulers with variance_type"
            ' "learned_range"'
        )


def origin_of(target: str, names: dict[str, str]) -> tuple[list[str], Callable | None]:
    """For `transfer`: where a weight of ours is by a table of names, and which third of it where three are one."""
    key = target
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    if ".qkv." not in key:
        return [key], None
    third = "qkv".index(target[target.index(".to_") + 4])
    return [key], lambda fused: fused.tensor_split(3)[third]


def _share_embedders(weights: dict[str, torch.Tensor], num_layers: int, report: ConversionReport) -> None:
    """diffusers keeps the embedders once in every block, and a D2iTContentModel once: they must be the same."""
    prefix = "transformer_blocks.{}.norm1.emb."
    embedders = [key.removeprefix(prefix.format(0)) for key in weights if key.startswith(prefix.format(0))]
    for block in range(1, num_layers):
        for name in embedders:
            first, key = prefix.format(0) + name, prefix.format(block) + name
            if not torch.equal(take(weights, key, report.source), weights[first]):
                raise ValueError(f"`{key}` of {report.source} must equal `{first}`: all blocks share their embedders.")
            report.unused[key] = "equal to that of block 0"


def count_heads(num_attention_heads: int | None, dim: int, source: str) -> int:
    """That number, checked, or that of the published size of this width."""
    if num_attention_heads is None and dim not in _HEAD_WIDTHS:
        raise ValueError(
            f"{source} has width {dim}, none of the published sizes of DiT ({', '.join(map(str, _HEAD_WIDTHS))}):"
            " pass `num_attention_heads`."
        )
    if num_attention_heads is None:
        return dim // _HEAD_WIDTHS[dim]
    if num_attention_heads < 1 or dim % num_attention_heads:
        raise ValueError(f"`num_attention_heads` must divide {dim}, the width of {source}, got {num_attention_heads}.")
    return num_attention_heads


def check_positions(key: str, weights: dict[str, torch.Tensor], dim: int, report: ConversionReport) -> int:
    """Side of the grid in tokens, if these are the positions that our model computes for it."""
    positions = take(weights, key, report.source, ndim=3)
    side = math.isqrt(positions.shape[1])
    if positions.shape != (1, side * side, dim):
        raise ValueError(f"`{key}` of {report.source} must be (1, n * n, {dim}), got {tuple(positions.shape)}.")
    expected = sincos_positions((side, side), positions.float())
    difference = (positions[0].float() - expected).abs().max().item()
    if not difference <= max(1e-4, torch.finfo(positions.dtype).eps):  # NaN fails it
        raise ValueError(
            f"`{key}` of {report.source} must be the sine-cosine grid of {side}x{side} tokens that our models"
            f" have, and differs from it by up to {difference:.2g}."
        )
    report.unused[key] = "recomputed; equal to the model's own positions"
    return side
