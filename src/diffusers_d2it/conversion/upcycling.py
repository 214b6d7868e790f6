# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A DiT (arXiv:2212.09748) to a DCDiTModel that is trained on from its blocks, as DC-DiT's paper does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.transformer_dcdit import DCDiTModel
from .dcdit import usual_sigma
from .dit import DiTSource, note_variance, origin_of, read_diffusers_dit, read_dit_checkpoint
from .transfer import ConversionReport, take, transfer


_EMBEDDERS = ("time_embed", "label_embed")
_FROM_DIT = tuple(f"{part}." for part in (*_EMBEDDERS, "transformer_blocks"))


def upcycle_dit(
    path: str | Path, *, num_attention_heads: int | None = None, frequency_shift: float | None = None, **config: Any
) -> tuple[DCDiTModel, ConversionReport]:
    """Make a DCDiTModel that has the blocks of a DiT, to be trained on.

    The blocks of the transformer, all of them, and the embedders of timesteps and labels are the DiT's. All else is
    new: the convolutions around them, the router, the norm behind the blocks. The cells lie on the DiT's grid of
    patches (`position_patch_size`), so that a block finds a cell where it knew its patch. Learned variance stays:
    `out_channels` is 2C then. DiTs of any patch size are taken.

    The embedders are frozen, `requires_grad_(False)`, so that the blocks go on to read what they know; the
    convolutions read it through a norm that is trained (`conditioning_norm`). A model that is loaded again has nothing
    frozen: whoever trains it freezes `time_embed` and `label_embed` anew.

    Args:
        path: a checkpoint of the original DiT as in `convert_dit_checkpoint`, or a folder as in
            `convert_diffusers_dit`.
        num_attention_heads: of a checkpoint; None for the widths of the published sizes S, B, L and XL.
        frequency_shift: of a folder; None for 1, what diffusers computes. 0 for weights that were trained with the
            original DiT, like those of facebook/DiT-XL-2-256. A checkpoint of the original has 0.
        **config: of the DCDiTModel, where it is not to be as the DiT or as usual: `router`, `num_conv_layers`,
            `norm_num_groups` for widths that 32 groups do not fit. `smoothing_sigma` is 1, for a DiT of latents from
            64x64 cells on 2.

    Returns:
        The model, in float32, and the account of all weights.

    Raises:
        ValueError: as of the conversion that reads such a source; an argument is for the other kind of source; the
            DiT's width does not fit the convolutions or the router.
    """
    if Path(path).is_dir():
        if num_attention_heads is not None:
            raise ValueError(f"`num_attention_heads` {num_attention_heads} is read from the configuration of {path}.")
        dit = read_diffusers_dit(path, 1.0 if frequency_shift is None else frequency_shift)
    else:
        if frequency_shift is not None:
            raise ValueError(f"`frequency_shift` {frequency_shift} is for folders of diffusers, {path} is none.")
        dit = read_dit_checkpoint(path, num_attention_heads)
    sizes = {
        "conditioning_norm": True,
        "position_patch_size": dit.patch_size,
        "smoothing_sigma": usual_sigma(dit.sizes["sample_size"]),
    }
    _leave_out_patches(dit)
    model = DCDiTModel(**dit.sizes | sizes | config)

    def origin(target: str) -> tuple[list[str], Callable | None]:
        return origin_of(target, dit.names) if target.startswith(_FROM_DIT) else ([], None)

    transfer(dit.weights, model, origin, dit.report)
    for name in _EMBEDDERS:
        getattr(model, name).requires_grad_(False)
    dit.report.notes.append(f"{' and '.join(_EMBEDDERS)} are frozen in this model, not in one that is loaded again")
    note_variance(model, dit.report)
    return model, dit.report


def _leave_out_patches(dit: DiTSource) -> None:
    """Account for what turns patches into tokens and back, of which only the shapes are looked at."""
    sizes, report = dit.sizes, dit.report
    dim = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    outputs = (sizes["out_channels"] or sizes["in_channels"]) * dit.patch_size**2
    for module, shape, reason in (
        ("patch_embed", (dim, sizes["in_channels"], dit.patch_size, dit.patch_size), "convolutions read the cells"),
        ("norm_out.adaln", (2 * dim, dim), "it is for tokens, the model's is for cells, which are narrower"),
        ("norm_out.proj_out", (outputs, dim), "a token gives a patch, the model's last layer a cell"),
    ):
        for kind, expected in (("weight", shape), ("bias", shape[:1])):
            [key], _ = origin_of(f"{module}.{kind}", dit.names)
            if (found := take(dit.weights, key, report.source).shape) != expected:
                raise ValueError(f"`{key}` of {report.source} must have shape {expected}, got {tuple(found)}.")
            report.unused[key] = reason
    for key in report.unused:
        if key.endswith("pos_embed"):
            report.unused[key] = "recomputed, for cells on this grid of patches"
