# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""PatchGAN discriminator (Isola et al., arXiv:1611.07004): is each patch of an image real or a reconstruction?

Shapes:
    B batch, H W image sides in pixels
"""

import torch
from torch import nn


class PatchDiscriminator(nn.Module):
    """Convolutions of kernel 4 that end in one logit for every patch of 70x70 pixels, eight pixels apart.

    Group norms stand where the paper has batch norms: a logit then depends on one image alone, in every process alike.

    Args:
        in_channels: channels of an image.
        base_channels: width of the first layer, doubled by each of the next three; a multiple of 8.

    Raises:
        ValueError: `base_channels` is no positive multiple of 8.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64):
        super().__init__()
        if base_channels < 8 or base_channels % 8:
            raise ValueError(f"`base_channels` must be a positive multiple of 8, got {base_channels}.")
        layers = [nn.Conv2d(in_channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for factor, stride in ((1, 2), (2, 2), (4, 1)):
            channels = factor * base_channels
            layers += [
                nn.Conv2d(channels, 2 * channels, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, 2 * channels),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(8 * base_channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1], sides of 32 or more -> logits (B, 1, H / 8 - 2, W / 8 - 2)."""
        return self.layers(pixels)
