# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Reads the files of other libraries: tensors and settings, never code."""

import argparse
import inspect
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files.folders import read_json
from ..files.weights import read_header, weight_files, weight_names
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
        raise ValueError(f"{folder} must hold a model of class {class_names[0]}, got {name}.")
    source = f"{name} in {folder.name}"
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}
    for key, value in config.items():
        # Old files have options that diffusers has dropped since: one that was off changes nothing.
        if not key.startswith("_") and key not in defaults and value not in (None, False, "default"):
            raise ValueError(f"{source} has an option that is not known: {key}={value!r}.")
    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        read = _read_safetensors if file.suffix == ".safetensors" else _unpickle
        weights |= _check_weights(read(file), source)
    return defaults | config, weights, source


def check_config(config: dict[str, Any], source: str, **expected: Any) -> None:
    """Raise a ValueError that names the first option of `config` that is not as expected."""
    for key, value in expected.items():
        found = list(config[key]) if isinstance(config[key], tuple) else config[key]
        if found != value:
            raise ValueError(f"`{key}` of {source} must be {value!r} to be converted, got {found!r}.")


def _weight_files(folder: Path) -> list[Path]:
    for suffix in (".safetensors", ".bin"):
        if any((folder / name).is_file() for name in weight_names(None, suffix)):
            return [file for file in weight_files(folder, suffix=suffix) if file.suffix == suffix]
    raise ValueError(f"{folder} holds neither diffusion_pytorch_model.safetensors nor diffusion_pytorch_model.bin.")


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    read_header(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _unpickle(path: Path) -> Any:
    try:
        # Training of the original DiT keeps its flags in the file: plain values in a plain class.
        with torch.serialization.safe_globals([argparse.Namespace]):
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
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"`{key}` of {source} must be a tensor, got {type(value).__name__}.")
    return weights
