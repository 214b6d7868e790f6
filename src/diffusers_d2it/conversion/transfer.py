# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Copies weights from a source to a model, and accounts for every one of both."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from ..files.folders import save_folder
from ..words import listed


@dataclass
class ConversionReport:
    """What became of every weight of a source, and where every weight of the model came from.

    Args:
        source: what was read.
        mapped: weight of the source -> the weights of the model that it went to. Several weights of the source may
            share one of the model (a folded convolution), and one may go to several (a fused projection, two heads).
        unused: weight of the source -> why the model does not need it.
        fresh: weights of the model that the source does not determine.
        notes: decisions that concern no single weight.
    """

    source: str
    mapped: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """For reading: a line for a module, and for modules that differ only in the number of their layer."""
        lines = [f"source: {self.source}"]
        for title, words in {
            "weights of the source mapped": [f"{_modules([k])} -> {_modules(t)}" for k, t in self.mapped.items()],
            "weights of the source unused": [f"{_modules([key])}: {reason}" for key, reason in self.unused.items()],
            "weights of the model initialised anew": [_modules([key]) for key in self.fresh],
        }.items():
            lines.append(f"{len(words)} {title}")
            counts = Counter(words).items()
            lines += [f"  {line}" + (f" ({count} weights)" if count > 1 else "") for line, count in counts]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        """All of it, weight by weight, as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


def _modules(keys: Iterable[str]) -> str:
    names = (re.sub(r"\.(weight|bias)$", "", key) for key in keys)
    return ", ".join(dict.fromkeys(re.sub(r"s\.\d+(?=\.)", "s.*", name) for name in names))  # but not to_out.0


def take(weights: dict[str, torch.Tensor], key: str, source: str, ndim: int | None = None) -> torch.Tensor:
    """A weight of the source. Raises a ValueError if there is none, or one with other than `ndim` dimensions."""
    if key not in weights:
        raise ValueError(f"{source} has no weight `{key}`.")
    value = weights[key]
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"`{key}` of {source} must have {ndim} dimensions, got shape {tuple(value.shape)}.")
    return value


def transfer(
    weights: dict[str, torch.Tensor],
    model: nn.Module,
    origin: Callable[[str], tuple[list[str], Callable[..., torch.Tensor] | None]],
    report: ConversionReport,
) -> None:
    """Fill a model from a source.

    Args:
        weights: of the source, by their names there.
        model: its values are overwritten, in its own precision.
        origin: for the name of a weight of the model, the weights of the source that it is made of, and the function
            of them that makes it; None takes the one as it is. A weight made of none keeps what it has.
        report: is filled; what stands in `unused` already needs no place in the model.

    Raises:
        ValueError: a weight of the source is missing, foreign, or gives a shape that the model does not have.
    """
    dtypes = sorted({str(value.dtype) for value in weights.values()} - {"torch.float32"})
    if dtypes:
        report.notes.append(f"weights in {', '.join(dtypes)} become torch.float32")
    for target, slot in model.state_dict().items():  # shares the memory of the model
        keys, make = origin(target)
        if not keys:
            report.fresh.append(target)
            continue
        values = [take(weights, key, report.source) for key in keys]
        value = values[0] if make is None else make(*values)
        if value.shape != slot.shape:
            raise ValueError(
                f"`{keys[0]}` of {report.source} gives shape {tuple(value.shape)} for `{target}`, expected"
                f" {tuple(slot.shape)}."
            )
        slot.copy_(value)
        for key in keys:
            report.mapped.setdefault(key, []).append(target)
    foreign = [f"`{key}`" for key in weights if key not in report.mapped and key not in report.unused]
    if foreign:
        raise ValueError(f"{report.source} holds weights that have no place in the model: {listed(foreign)}.")


def save_converted(model: ModelMixin, report: ConversionReport, folder: Path) -> None:
    """Save a converted model with its report, conversion.json, in a folder that is not there before it is complete."""

    def save(staging: str) -> None:
        model.save_pretrained(staging)
        Path(staging, "conversion.json").write_text(report.to_json(), encoding="utf-8")

    save_folder(folder, save)
