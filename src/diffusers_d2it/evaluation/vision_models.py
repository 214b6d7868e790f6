# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Vision transformers of transformers, loaded frozen: for features of metrics and for representation alignment."""

import inspect

import torch
from torch import nn


def load_vision_model(name: str) -> tuple[nn.Module, dict]:
    """A frozen ViT such as DINOv2, and its preprocessing.

    Args:
        name: folder or Hub name of a model that `transformers.AutoModel` loads, with square patches.

    Returns:
        The model in eval mode, and what its preprocessor_config.json says, "image_mean" and "image_std" among it.

    Raises:
        ValueError: it cannot be loaded, is no vision transformer, or does not say how images are normalised.
    """
    from transformers import AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        model = AutoModel.from_pretrained(name)
        preprocessing, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no vision model could be loaded from {name!r}: {error}") from error
    if not hasattr(model.config, "patch_size") or not hasattr(model.config, "image_size"):
        raise ValueError(
            f"{name!r} is a {type(model).__name__}; a vision transformer with `patch_size` and `image_size` is needed."
        )
    missing = [key for key in ("image_mean", "image_std") if key not in preprocessing]
    if missing:
        raise ValueError(f"the preprocessor_config.json of {name!r} lacks {' and '.join(missing)}.")
    return model.requires_grad_(False).eval(), preprocessing


def vision_tokens(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Tokens of the last layer, after its norm, of images of any size: (B, number of tokens, width), float32.

    Args:
        model: from `load_vision_model`.
        images: (B, 3, H, W), normalised as the model wants it, sides that are multiples of its patches.
    """
    kwargs = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        kwargs["interpolate_pos_encoding"] = True  # DINOv2 always does, ViT on request
    return model(pixel_values=images.to(model.dtype), **kwargs).last_hidden_state.float()
