# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Training losses: tensors in, named scalars out."""

import torch
import torch.nn.functional as F

from .grains import cells_per_region, code_weights, grain_map_to_cells


def dvae_loss(
    pixels: torch.Tensor, reconstruction: torch.Tensor, kl: torch.Tensor, kl_weight: float = 1e-6
) -> dict[str, torch.Tensor]:
    """Reconstruction and rate of the first stage.

    Both terms are means over pixel values, so `kl_weight` means the same at every resolution, and 1e-6 is the weight
    of latent diffusion (Rombach et al., arXiv:2112.10752), which sums both over the image.

    Args:
        pixels: images (B, 3, H, W) in [-1, 1].
        reconstruction: decoded images, the same shape.
        kl: nats per image (B,), from `TiedGaussianDistribution.kl`, which counts a code once.
        kl_weight: weight of the KL term.

    Returns:
        "loss", "l1" (mean absolute error per value) and "kl" (nats per value).
    """
    l1 = F.l1_loss(reconstruction.float(), pixels.float())
    kl = kl.float().mean() / pixels[0].numel()
    return {"loss": l1 + kl_weight * kl, "l1": l1, "kl": kl}


def grain_loss(logits: torch.Tensor, grain_map: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross-entropy of the clean map, Eq. 5, in nats per region.

    Args:
        logits: (B, k, h, w).
        grain_map: (B, h, w) int64.

    Returns:
        "loss" and "accuracy", the share of regions whose most likely grain is the true one.
    """
    loss = F.cross_entropy(logits.float(), grain_map)
    accuracy = (logits.argmax(dim=1) == grain_map).float().mean()
    return {"loss": loss, "accuracy": accuracy}


def multi_grained_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    grain_map: torch.Tensor,
    grain_weights: tuple[float, ...] | None = None,
) -> dict[str, torch.Tensor]:
    """Multi-grained noise loss, Eq. 11.

    Every cell weighs alpha = 1 / 4 ** (k - 1 - grain), so a code counts once however many cells it is copied to. The
    sum is divided by the fixed number of cells, so a code counts the same in every image, whatever its fine ratio.

    Args:
        prediction: predicted noise (B, C, hR, wR).
        target: the noise, tied.
        grain_map: (B, h, w) int64.
        grain_weights: weight of a cell of each grain, coarsest first, instead of alpha. (1, 1) weighs cells alike.

    Returns:
        "loss", and "mse_grain_<i>", the unweighted mean squared error of grain i, coarsest 0: NaN where no region of
        the batch has it.
    """
    cells = cells_per_region(target, grain_map)
    num_grains = cells.bit_length()
    grain_of_cell = grain_map_to_cells(grain_map, cells)
    squared_error = (prediction.float() - target.float()).pow(2).mean(dim=1)  # (B, hR, wR)
    if grain_weights is None:
        weights = code_weights(grain_of_cell, num_grains)
    else:
        if len(grain_weights) != num_grains:
            raise ValueError(f"`grain_weights` must be {num_grains} weights, coarsest first, got {grain_weights}.")
        weights = torch.tensor(grain_weights, device=squared_error.device)[grain_of_cell]
    losses = {"loss": (weights * squared_error).mean()}
    for grain in range(num_grains):
        of_grain = (grain_of_cell == grain).float()
        losses[f"mse_grain_{grain}"] = (squared_error.detach() * of_grain).sum() / of_grain.sum()
    return losses
