# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Features of a frozen vision transformer of transformers: for representation alignment and for an rFID.

Shapes:
    B batch, h w sides of the grain map in regions, V width of the vision model
"""

import inspect

import torch
import torch.nn.functional as F
from torch import nn

from ..broken_packages import call_around


class VisionFeatures(nn.Module):
    """Patch features of a ViT such as DINOv2 for images in [-1, 1], on the grid of the regions.

    Args:
        name: folder or Hub name of a model that `transformers.AutoModel` loads, with square patches.

    Raises:
        ValueError: it cannot be loaded, or is no vision transformer.
    """

    def __init__(self, name: str):
        super().__init__()
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            self.model = call_around(lambda: AutoModel.from_pretrained(name))
            preprocessing, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"no vision model could be loaded from {name!r}: {error}") from error
        if not hasattr(self.model.config, "patch_size") or not hasattr(self.model.config, "image_size"):
            raise ValueError(
                f"{name!r} is a {type(self.model).__name__}; a vision transformer with `patch_size` and `image_size`"
                " is needed."
            )
        self.requires_grad_(False)
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
        kwargs = {}
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            kwargs["interpolate_pos_encoding"] = True  # DINOv2 always does, ViT on request
        tokens = self.model(pixel_values=images.to(self.model.dtype), **kwargs).last_hidden_state
        return tokens[:, -height * width :].float()  # class and register tokens come first


class PooledFeatures(nn.Module):
    """Mean of the patch features, in the form that torchmetrics' FrechetInceptionDistance takes.

    Args:
        name: as of `VisionFeatures`.
    """

    def __init__(self, name: str):
        super().__init__()
        self.features = VisionFeatures(name)
        self.num_features = self.features.width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, V)."""
        return self.features(2 * images - 1).mean(dim=1)
