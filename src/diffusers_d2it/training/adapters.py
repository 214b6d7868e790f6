# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Training adapters (LoRA) instead of a model: the model stays as it is, and what is saved is small."""

import os

from ..evaluation import weights_digest
from ..files import save_folder
from ..models.transformer_d2it_content import D2iTContentModel
from ..optional import import_optional
from ..pipelines.pipeline_d2it import D2iTPipeline


_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_adapters(transformer: D2iTContentModel, rank: int) -> dict[str, str]:
    """Add adapters to the attention of all blocks, which alone are trained from now on.

    Returns:
        What identifies the model beneath, which a resumed run must find again.

    Raises:
        ValueError: the package peft is missing.
    """
    peft = import_optional("peft", "training adapters", extra="lora")
    base = {"base": weights_digest(transformer)}
    transformer.requires_grad_(False)
    settings = {"target_modules": _TARGETS, "init_lora_weights": "gaussian"}
    transformer.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, **settings))
    return base


def save_adapters(transformer: D2iTContentModel, folder: str | os.PathLike) -> None:
    """Save adapters to a folder, whole or not at all, where `pipe.load_lora_weights` finds them."""
    from peft import get_peft_model_state_dict

    (name,) = transformer.peft_config
    parts = {
        "transformer_lora_layers": get_peft_model_state_dict(transformer, adapter_name=name),
        "transformer_lora_adapter_metadata": transformer.peft_config[name].to_dict(),
    }
    save_folder(folder, lambda path: D2iTPipeline.save_lora_weights(path, **parts))
