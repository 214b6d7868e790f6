# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The paper's sizes, each once, as JSON in `presets/`."""

import difflib
import json
from pathlib import Path


_FOLDER = Path(__file__).parent / "presets"
_CHECKPOINT = Path(__file__).parent / "checkpoints" / "tiny-imagenet-20-64"


def list_presets() -> list[str]:
    """Names that `load_preset` knows."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_preset(name: str) -> dict:
    """Keyword arguments of a model, by name of a preset or from a JSON file of the same form.

        vae = DynamicAutoencoderKL(**load_preset("dvae-f8f16"))

    Args:
        name: one of `list_presets()`, or the path of a file that ends in `.json`.

    Raises:
        ValueError: no such preset or file.
    """
    path = Path(name) if name.endswith(".json") else _FOLDER / f"{name}.json"
    if not path.is_file():
        close = difflib.get_close_matches(name, list_presets(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no preset or JSON file {name!r}.{hint} Presets: {', '.join(list_presets())}.")
    return json.loads(path.read_text(encoding="utf-8"))


def bundled_checkpoint() -> str:
    """Folder of the small checkpoint that comes with the package, for `D2iTPipeline.from_pretrained`.

    64x64 images of 20 ImageNet classes; its README.md is the model card.
    """
    return str(_CHECKPOINT)
