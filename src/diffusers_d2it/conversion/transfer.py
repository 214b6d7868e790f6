# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Copies weights from a source to a model, and accounts for every one of both."""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from ..files.folders import save_folder


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
        mapped = Counter(f"{_modules(key)} -> {_modules(*targets)}" for key, targets in self.mapped.items())
        unused = Counter(f"{_modules(key)}: {reason}" for key, reason in self.unused.items())
        fresh = Counter(_modules(key) for key in self.fresh)
        lines = [f"source: {self.source}"]
        for title, counts in (
            ("weights of the source mapped", mapped),
            ("weights of the source unused", unused),
            ("weights of the model initialised anew", fresh),
        ):
            lines.append(f"{counts.total()} {title}")
            lines += [f"  {line}" + (f" ({count} weights)" if count > 1 else "") for line, count in counts.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> str:
        """All of it, weight by weight, as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


class Transfer:
    """Copies weights from a source into a model and keeps account of both.

    Args:
        weights: of the source, by their names there.
        source: what was read, in words, for the report and for errors.

    Raises:
        ValueError: a weight is not floating-point.
    """

    def __init__(self, weights: dict[str, torch.Tensor], source: str):
        self.weights = weights
        self.source = source
        self.report = ConversionReport(source)
        self.target: dict[str, torch.Tensor] = {}
        for key, value in weights.items():
            if not value.is_floating_point():
                raise ValueError(f"`{key}` of {source} must be floating-point, got {value.dtype}.")
        dtypes = sorted({str(value.dtype) for value in weights.values()} - {"torch.float32"})
        if dtypes:
            self.report.notes.append(f"weights in {', '.join(dtypes)} become torch.float32")

    def take(self, key: str, ndim: int | None = None) -> torch.Tensor:
        """A weight of the source. Raises a ValueError if there is none, or one with other than `ndim` dimensions."""
        if key not in self.weights:
            raise ValueError(f"{self.source} has no weight `{key}`.")
        value = self.weights[key]
        if ndim is not None and value.ndim != ndim:
            raise ValueError(f"`{key}` of {self.source} must have {ndim} dimensions, got shape {tuple(value.shape)}.")
        return value

    def into(self, model: nn.Module) -> None:
        """Name the model, once its sizes have been read off the source."""
        self.target = model.state_dict()  # shares its memory

    def put(self, target: str, value: torch.Tensor, *keys: str) -> None:
        """Write one weight of the model, computed from the weights `keys` of the source.

        Raises:
            ValueError: the value has another shape than the weight.
        """
        if value.shape != self.target[target].shape:
            raise ValueError(
                f"`{keys[0]}` of {self.source} gives shape {tuple(value.shape)} for `{target}`, expected"
                f" {tuple(self.target[target].shape)}."
            )
        self.target[target].copy_(value)
        for key in keys:
            self.report.mapped.setdefault(key, []).append(target)

    def put_modules(self, names: dict[str, str], prefix: str = "", target_prefix: str = "") -> None:
        """Copy weight and bias of modules that differ in name only; `names` is {name in the source: ours}."""
        for name, target in names.items():
            for part in ("weight", "bias"):
                key = f"{prefix}{name}.{part}"
                self.put(f"{target_prefix}{target}.{part}", self.take(key), key)

    def skip(self, key: str, reason: str) -> None:
        """Account for a weight of the source that the model does not need."""
        self.report.unused[key] = reason

    def finish(self, fresh: tuple[str, ...]) -> ConversionReport:
        """The report, once every weight of both sides is in it.

        Args:
            fresh: prefixes of weights of the model that the source does not determine.

        Raises:
            ValueError: a weight of the source, or one of the model, has not been accounted for.
        """
        unknown = [key for key in self.weights if key not in self.report.mapped | self.report.unused]
        if unknown:
            raise ValueError(f"{self.source} holds weights that have no place in the model: {_first(unknown)}.")
        written = {target for targets in self.report.mapped.values() for target in targets}
        self.report.fresh = [key for key in self.target if key not in written]
        missing = [key for key in self.report.fresh if not key.startswith(fresh)]
        if missing:
            raise ValueError(f"{self.source} lacks what the model needs for {_first(missing)}.")
        return self.report


def _modules(*keys: str) -> str:
    names = (re.sub(r"\.(weight|bias)$", "", key) for key in keys)
    return ", ".join(dict.fromkeys(re.sub(r"s\.\d+(?=\.)", "s.*", name) for name in names))  # but not to_out.0


def _first(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def save_converted(model: ModelMixin, report: ConversionReport, folder: Path) -> None:
    """Save a converted model with its report, conversion.json, in a folder that is not there before it is complete."""

    def save(staging: str) -> None:
        model.save_pretrained(staging)
        Path(staging, "conversion.json").write_text(report.to_json(), encoding="utf-8")

    save_folder(folder, save)
