# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The perceptual term of the first stage."""

import torch

from ..evaluation.features import load_lpips


def load_perceptual_loss() -> torch.nn.Module:
    """LPIPS on VGG features, frozen: called as loss(reconstruction, pixels), both (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: the package, or its VGG weights, a download of 528 MB, are missing or broken.
    """
    advice = "Training goes on without LPIPS if you pass --perceptual_weight 0; reconstructions are then softer."
    return load_lpips("vgg", "--perceptual_weight", advice)
