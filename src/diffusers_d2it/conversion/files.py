# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Reads the files of other libraries: tensors and settings, never code."""

import inspect
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..files.folders import read_json
from ..files.source import public_config
from ..files.weights import read_headers, weight_files, weight_names
from ..words import shown


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Weights of a `.pt` file and where they were found, in words.

    Args:
        path: holds the weights alone, or beside others in an entry "ema" (taken first) or "model".

    Raises:
        ValueError: no such file, or one that holds other things than tensors and plain values.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file.")
    checkpoint, source = _unpickle(path), path.name
    for entry in ("ema", "model"):
        if isinstance(checkpoint, dict) and entry in checkpoint:
            checkpoint, source = checkpoint[entry], f'{path.name}, entry "{entry}"'
            break
    return _check_weights(checkpoint, source), source


def read_folder(
    folder: Path, subfolder: str, class_names: tuple[str, ...], cls: type
) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """Configuration and weights of a model that diffusers saved, and what they are, in words.

    Args:
        folder: of the model, or of a pipeline.
        subfolder: of the model in a pipeline.
        class_names: what config.json may call the model; the first is the name in use.
        cls: the class, whose defaults complete the configuration.

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
    source = f"{name} in {folder.name}"
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}
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


def _unpickle(path: Path) -> Any:
    try:
        # Training of the original DiT keeps its flags in the file: plain values in a plain class.
        with torch.serialization.safe_globals([Namespace]):
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
