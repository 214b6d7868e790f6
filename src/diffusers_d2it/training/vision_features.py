# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Patch features of a frozen vision transformer of transformers, for representation alignment.

Shapes:
    B batch, h w sides of the grain map in regions, V width of the vision model
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..evaluation.features import load_vision_model, vision_tokens


class VisionFeatures(nn.Module):
    """Patch features of a ViT such as DINOv2 for images in [-1, 1], on the grid of the regions.

    Args:
        name: folder or Hub name of a model that `transformers.AutoModel` loads, with square patches.

    Raises:
        ValueError: from `load_vision_model`.
    """

    def __init__(self, name: str):
        super().__init__()
        self.model, preprocessing = load_vision_model(name)
        self.register_buffer("mean", torch.tensor(preprocessing["image_mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing["image_std"])[:, None, None], persistent=False)

    @property
    def width(self) -> int:
        """V."""
        return self.model.config.hidden_size

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, h * w, V).

        Args:
            pixels: the images, resized so that a patch of the vision model is a region.
            size: (h, w); None for the size that the vision model was trained with.
        """
        patch = self.model.config.patch_size
        height, width = size or (self.model.config.image_size // patch,) * 2
        images = F.interpolate(pixels.float(), (height * patch, width * patch), mode="bicubic", antialias=True)
        images = ((images.clamp(-1, 1) + 1) / 2 - self.mean) / self.std
        return vision_tokens(self.model, images)[:, -height * width :]  # class and register tokens come first
