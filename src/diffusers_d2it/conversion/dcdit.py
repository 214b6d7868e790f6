# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The release of DC-DiT (arXiv:2603.06351) to DCDiTModel."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from ..limits import check_values
from ..models.configs import LIMITS
from ..models.transformer_dcdit import DCDiTModel
from .dit import DIT_NAMES, check_positions, count_heads, origin_of
from .transfer import ConversionReport, read_checkpoint, take, transfer


# The settings of a training, which lie beside the weights: plain values in plain classes
_PARTS = ("", "Model", "HNet", "Training", "Data", "Diffusion", "Logging")
_SETTINGS = tuple(f"config.{part}Config" for part in _PARTS)
_WIDE_GRID = 4096  # cells from which on the release smooths with a sigma of 2

# Beyond those of every DiT
_NAMES = DIT_NAMES | {
    "conv_in": "x_embedder.proj",
    "encoder.blocks": "hnet.encoder.layers",
    "encoder.norm": "hnet.encoder.rmsnorm",
    "decoder.blocks": "hnet.decoder.layers",
    "decoder.norm": "hnet.decoder.rmsnorm",
    "time_emb_proj": "cond_proj.1",
    "conv_shortcut": "skip_proj",
    "boundary_router.proj": "hnet.routing_module.proj",
    "boundary_router.predictor": "hnet.routing_module.context_predictor",
    "boundary_router.conv": "hnet.routing_module.residual_scorer.0",
    "boundary_router.norm": "hnet.routing_module.residual_scorer.1",
    "boundary_router.score": "hnet.routing_module.residual_scorer.3",
    "residual_proj": "hnet.residual_proj",
    "transformer_blocks": "hnet.main_network.main_network.layers",
    "norm_backbone": "hnet.main_network.main_network.rmsnorm",
}


def convert_dcdit_checkpoint(
    path: str | Path, *, num_attention_heads: int | None = None
) -> tuple[DCDiTModel, ConversionReport]:
    """Make a DCDiTModel of a checkpoint of the release, which computes what the release computes.

    Sizes are read off the shapes; the last row of the label table is taken as "no class".

    Args:
        path: a file with the weights alone, or with "model", "ema", "opt" and "config" as training writes it, of which
            the averaged weights "ema" are taken. Read by torch's restricted unpickler: no code in it is run, and its
            settings are held as they are by classes that do nothing.
        num_attention_heads: None for that of the settings, and without any for the widths of the published sizes.

    Returns:
        The model, in float32, and the account of all weights.

    Raises:
        ValueError: the file holds other things than tensors, plain values and these settings; weights are missing,
            foreign or of a wrong shape; the positions are not ours; the number of heads is not known.
    """
    weights, source, others = read_checkpoint(Path(path), plain_classes=_SETTINGS)
    report = ConversionReport(source)
    width, in_channels, *_ = take(weights, "x_embedder.proj.weight", source, ndim=4).shape
    dim = len(take(weights, "hnet.residual_proj.weight", source, ndim=2))
    side = check_positions("pos_embed", weights, dim, report)
    settings = _settings(others.get("config"), source)
    blocks = "hnet.main_network.main_network.layers"
    if num_attention_heads is None:
        num_attention_heads = settings.get("num_attention_heads")
    heads = count_heads(num_attention_heads, dim, source)
    sizes = {
        "in_channels": in_channels,
        "out_channels": len(take(weights, "final_layer.linear.weight", source, ndim=2)),
        "num_layers": _count(rf"{re.escape(blocks)}\.(\d+)\.", weights),
        "num_conv_layers": _count(r"hnet\.encoder\.layers\.(\d+)\.", weights),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "mlp_ratio": len(take(weights, f"{blocks}.0.mlp.fc1.weight", source, ndim=2)) / dim,
        "num_classes": len(take(weights, "y_embedder.embedding_table.weight", source, ndim=2)) - 1,
        "sample_size": side,
        "conv_reduction": dim // width,
        "smoothing_sigma": settings.get("smoothing_sigma", usual_sigma(side)),
    }
    if not settings:
        report.notes.append(f"no settings beside the weights: {heads} heads and a sigma of {sizes['smoothing_sigma']}")
    model = DCDiTModel(**sizes)
    transfer(weights, model, partial(origin_of, names=_NAMES), report)
    return model, report


def usual_sigma(sample_size: int) -> float:
    """Of the smoothing, as the release has it for latents of this side."""
    return 2.0 if sample_size**2 >= _WIDE_GRID else 1.0


def _count(pattern: str, weights: dict) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, weights) if match})


def _settings(config: Any, source: str) -> dict[str, Any]:
    """What the weights do not tell, of the settings of a training; nothing where there are none."""
    if config is None:
        return {}
    try:
        network = vars(vars(vars(config)["model"])["hnet"])
        found = {"num_attention_heads": network["num_heads"][0], "smoothing_sigma": network["dechunk_kernel_sigma"]}
        check_values(found, {"num_attention_heads": int, "smoothing_sigma": float}, LIMITS)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f'"config" of {source} must hold the settings of a training, it lacks {error}.') from error
    return found
