# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Changes to saved models, and what every conversion must account for."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffusers_d2it.conversion import ConversionReport


def assert_accounts_for_everything(report: ConversionReport, source_keys, model: torch.nn.Module) -> None:
    assert report.mapped.keys() | report.unused.keys() == set(source_keys)
    assert not report.mapped.keys() & report.unused.keys()
    written = {target for targets in report.mapped.values() for target in targets}
    assert written | set(report.fresh) == set(model.state_dict())
    assert not written & set(report.fresh)
    assert all(report.unused.values())


def without(weights: dict, key: str) -> dict:
    return {name: value for name, value in weights.items() if name != key}


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "removed"}))


def edit_weights(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_folder(folder: Path, change: dict | Callable[[dict], dict]) -> None:
    """Change the configuration of a model by a dictionary, or its weights by a function."""
    if callable(change):
        edit_weights(folder, change)
    else:
        edit_config(folder, **change)
