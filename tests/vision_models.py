# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Tiny vision transformers, as folders that transformers loads."""

import json
from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]  # of their preprocessing


def save_vision_model(folder: Path, kind: str = "dinov2", image_size: int = 28, seed: int = 0, **preprocessing) -> str:
    """A random "dinov2" or "vit" of width 16 with patches of 7 pixels."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7}
    sizes |= {"image_size": image_size, "intermediate_size": 32}
    torch.manual_seed(seed)
    model = Dinov2Model(Dinov2Config(**sizes)) if kind == "dinov2" else ViTModel(ViTConfig(**sizes))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD} | preprocessing)
    )
    return str(folder)
