# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Adapters (LoRA) of a pipeline, as diffusers has them: load, save, weigh, fuse and unload, from safetensors only."""

import os
from typing import Any

import torch
from diffusers.loaders import SanaLoraLoaderMixin

from ..models.strict import refuse_pickled_adapter, refuse_unsafe


class LoraPipelineMixin(SanaLoraLoaderMixin):
    """Adapters of the component `transformer`: diffusers' own mixin for pipelines that have them nowhere else.

    pipe.load_lora_weights("user/lora")
    pipe.set_adapters("default_0", 0.7)
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor], **kwargs: Any
    ) -> dict[str, torch.Tensor] | tuple:
        """The weights of adapters, as of diffusers.

        Raises:
            ValueError: an argument, or the file, would read pickled weights.
            OSError: there are no safetensors.
        """
        refuse_pickled_adapter(pretrained_model_name_or_path_or_dict, kwargs)
        return super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs | {"use_safetensors": True})

    @classmethod
    def save_lora_weights(
        cls, save_directory: str | os.PathLike, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Save the weights of adapters, as of diffusers.

        Raises:
            ValueError: something else than safetensors is asked for.
        """
        refuse_unsafe(safe_serialization, use_flashpack=False)
        super().save_lora_weights(save_directory, *args, **kwargs)
