# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""LPIPS (Zhang et al., arXiv:1801.03924), from the package lpips."""

import torch


def load_perceptual_loss() -> torch.nn.Module:
    """LPIPS on VGG features, frozen: called as loss(reconstruction, pixels), both (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: the package or its VGG weights, a download of 528 MB, are missing.
    """
    advice = "Training goes on without LPIPS if you pass --perceptual_weight 0; reconstructions are then softer."
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter where it was built for another torch
        raise ValueError(
            f"--perceptual_weight needs the package lpips and a torchvision that fits torch {torch.__version__}"
            f' (`pip install "diffusers-d2it[lpips]"`), but importing it failed: {error}. {advice}'
        ) from error
    try:
        model = lpips.LPIPS(net="vgg", verbose=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"--perceptual_weight needs the ImageNet weights of VGG-16 in {torch.hub.get_dir()}/checkpoints, and they"
            f" could not be downloaded: {error}. {advice}"
        ) from error
    return model.requires_grad_(False).eval()
