# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What metrics are tried on: crops of photographs, a small network with all kinds of features, and what is refused.

A command line finds the network as `metric_inputs:small_network`.
"""

from collections.abc import Callable

import pytest
import torch
from photographs import load_photographs
from torch import nn


def crops(number: int, seed: int, side: int = 32) -> torch.Tensor:
    """Random crops of eight photographs, uint8 (number, 3, side, side)."""
    photographs = ((load_photographs(256) + 1) * 127.5).round().to(torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, 256 - side, (number, 2), generator=generator).tolist()
    cut = [photographs[i % 8, :, top : top + side, left : left + side] for i, (top, left) in enumerate(places)]
    return torch.stack(cut)


class SmallNetwork(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> 8 pooled features, 12 logits, and 18 spatial features of 32-pixel images."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
        self.classifier = nn.Linear(8, 12)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.convolutions(pixels)
        pool = features.mean(dim=(2, 3))
        return {"pool": pool, "logits": self.classifier(50 * pool), "spatial": features[:, :2, ::3, ::3].flatten(1)}


def small_network(seed: int = 0) -> SmallNetwork:
    """A SmallNetwork with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallNetwork().eval()


def refused(said: str, function: Callable, *arguments: object, **options: object) -> None:
    """Check that a call raises a ValueError which says this, a pattern."""
    with pytest.raises(ValueError, match=said):
        function(*arguments, **options)
