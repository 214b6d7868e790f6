# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""LPIPS (Zhang et al., arXiv:1801.03924), from the package lpips."""

import torch

from ..broken_packages import import_optional


def load_perceptual_loss() -> torch.nn.Module:
    """LPIPS on VGG features, frozen: called as loss(reconstruction, pixels), both (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: the package, or its VGG weights, a download of 528 MB, are missing or broken.
    """
    advice = "Training goes on without LPIPS if you pass --perceptual_weight 0; reconstructions are then softer."
    try:
        lpips = import_optional("lpips", "--perceptual_weight", extra="lpips")
    except ValueError as error:
        raise ValueError(f"{error} {advice}") from error
    try:
        model = lpips.LPIPS(net="vgg", verbose=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"--perceptual_weight needs the ImageNet weights of VGG-16 in {torch.hub.get_dir()}/checkpoints, and they"
            f" could not be downloaded: {error}. {advice}"
        ) from error
    return model.requires_grad_(False).eval()
