# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""LPIPS (Zhang et al., arXiv:1801.03924), from the package lpips."""

import torch

from ..optional import import_optional


_NETWORKS = {"alex": "AlexNet", "vgg": "VGG-16"}


def load_lpips(network: str, purpose: str, advice: str = "") -> torch.nn.Module:
    """LPIPS, frozen: called as lpips(a, b), both (B, 3, H, W) in [-1, 1], it gives (B, 1, 1, 1).

    Args:
        network: whose features are compared: "alex", which its authors advise for measuring, or "vgg", for training.
        purpose: what needs it, in words, such as the flag that was given.
        advice: what else a user can do, for errors.

    Raises:
        ValueError: the package is missing or broken, or the weights of the network, a download, are missing.
    """
    try:
        lpips = import_optional("lpips", purpose, extra="lpips")
    except ValueError as error:
        raise ValueError(f"{error} {advice}".strip()) from error
    try:
        model = lpips.LPIPS(net=network, verbose=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{purpose} needs the ImageNet weights of {_NETWORKS[network]} in {torch.hub.get_dir()}/checkpoints, and"
            f" they could not be downloaded: {error}. {advice}".strip()
        ) from error
    return model.requires_grad_(False).eval()
