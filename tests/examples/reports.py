# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the tests of both reports share: a tiny checkpoint with the classes of the photographs, and their flags."""

import json
from collections.abc import Callable
from pathlib import Path


FLAGS = ["--features", "metric_inputs:small_network", "--metrics", "fid", "precision", "--num_images", 4]
FLAGS += ["--num_reference_images", 4, "--num_inference_steps", 2, "--grain_num_inference_steps", 2, "--batch_size", 3]


def save_checkpoint(make_pipeline: Callable, photos: Path, folder: Path) -> Path:
    """A tiny pipeline that knows the classes of a folder by name, under other numbers than theirs."""
    names = sorted(path.name for path in photos.iterdir())
    make_pipeline(id2label=dict(enumerate(reversed(names), start=2))).save_pretrained(folder)
    return folder


def read_json(path: Path) -> dict:
    """A file of plain JSON: NaN and infinities are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
