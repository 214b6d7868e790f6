# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From files of other libraries, tensors and settings but never code, to a model that accounts for every weight."""

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import nn

from ..files import read_json, save_folder
from ..files.source import public_config
from ..files.weights import read_headers, weight_files, weight_names
from ..models.strict import init_parameters
from ..words import listed, shown


@dataclass
class ConversionReport:
    """What became of every weight of a source, and where every weight of the model came from.

    Args:
        source: what was read.
        mapped: weight of the source -> the weights of the model that it went to. Several may share one (a folded
            convolution), and one may go to several (a fused projection, two heads).
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
            "weights of the model that are newly initialised": [_modules([key]) for key in self.fresh],
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
    """A weight of the source. Raises a ValueError if there is none, or it is empty or not of `ndim` dimensions."""
    if key not in weights:
        raise ValueError(f"{source} has no weight `{key}`.")
    value = weights[key]
    if ndim is not None and (value.ndim != ndim or not value.numel()):
        raise ValueError(
            f"`{key}` of {source} must have {ndim} dimensions and values, got shape {tuple(value.shape)}."
        )
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
        report: is filled; what stands in `unused` needs no place in the model.

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
    """Save a converted model with its report, conversion.json, in a folder that is there whole or not at all."""

    def save(staging: str) -> None:
        model.save_pretrained(staging)
        Path(staging, "conversion.json").write_text(report.to_json(), encoding="utf-8")

    save_folder(folder, save)


def read_checkpoint(
    path: Path, plain_classes: Iterable[str] = ()
) -> tuple[dict[str, torch.Tensor], str, dict[str, Any]]:
    """Weights of a `.pt` file, where they are in it, in words, and what lies beside them.

    Args:
        path: the file; the weights are all of it, or its entry "ema" (taken first) or "model".
        plain_classes: dotted names of the classes whose instances it may hold. They are not imported: what stands in
            their place has the attributes of the file, and does nothing.

    Raises:
        ValueError: no such file, or one that holds other things than tensors, plain values and these instances.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file.")
    found, source = _unpickle(path, plain_classes), path.name
    entry = next((entry for entry in ("ema", "model") if isinstance(found, dict) and entry in found), None)
    if entry is None:
        return _check_weights(found, source), source, {}
    source = f'{path.name}, entry "{entry}"'
    others = {key: value for key, value in found.items() if key not in ("ema", "model")}
    return _check_weights(found[entry], source), source, others


def read_folder(
    folder: Path, subfolder: str, class_names: tuple[str, ...], cls: type
) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """Configuration and weights of a model that diffusers saved, and what they are, in words.

    The folder is that of the model, or of a pipeline that has it in `subfolder`. config.json may call it by any of
    `class_names`, of which the first is in use; the defaults of the class complete the configuration.

    Raises:
        ValueError: a file is missing, the model is of another class, or it has an option that `cls` does not know.
    """
    if not (folder / "config.json").is_file() and (folder / subfolder / "config.json").is_file():
        folder = folder / subfolder
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds neither config.json nor {subfolder}/config.json.")
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in class_names:
        raise ValueError(f"{folder} must hold a model of class {class_names[0]}, got {shown(name)}.")
    source = f"{name} in {folder.absolute().name}"
    defaults = {name: parameter.default for name, parameter in init_parameters(cls).items()}
    for key, value in public_config(config).items():
        # Old files have options that diffusers has dropped since: one that was off changes nothing.
        if key not in defaults and value not in (None, False, "default"):
            raise ValueError(f"{source} has an option that is not known: {shown(key)} is {shown(value)}.")
    if any((folder / file).is_file() for file in weight_names(None)):
        read_headers(files := weight_files(folder))
        parts = [load_file(file) for file in files if file.suffix == ".safetensors"]
    else:
        parts = [_unpickle(file) for file in weight_files(folder, suffix=".bin") if file.suffix == ".bin"]
    weights = {key: value for part in parts for key, value in _check_weights(part, source).items()}
    return defaults | config, weights, source


def check_config(config: dict[str, Any], source: str, **expected: Any) -> None:
    """Raise a ValueError that names the first option of `config` that is not as expected."""
    for key, value in expected.items():
        found = list(config[key]) if isinstance(config[key], tuple) else config[key]
        if found != value:
            raise ValueError(f"`{key}` of {source} must be {value!r} to be converted, got {shown(found)}.")


def _unpickle(path: Path, plain_classes: Iterable[str] = ()) -> Any:
    holders = [(type(name.rpartition(".")[2], (), {}), name) for name in plain_classes]
    try:
        with torch.serialization.safe_globals(holders):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values: such a file can run code, and is not read."
        ) from error
    except Exception as error:  # cut off, or no file of torch at all: there is no end to what its bytes can raise
        raise ValueError(f"{path} is damaged or no file of torch: {shown(str(error))}.") from error


def _check_weights(weights: Any, source: str) -> dict[str, torch.Tensor]:
    if not isinstance(weights, dict):
        raise ValueError(f"{source} must be a dictionary of tensors, got {type(weights).__name__}.")
    for key, value in weights.items():
        if not isinstance(key, str) or not key.isprintable():
            raise ValueError(f"{source} must name its weights in printable characters, got {shown(key)}.")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"`{key}` of {source} must be a floating-point tensor, got {found}.")
    return weights
