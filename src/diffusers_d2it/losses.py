# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Training losses: tensors in, named scalars out."""

import math

import torch
import torch.nn.functional as F

from .grains import GrainLayout, code_weights


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


def adversarial_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """What the autoencoder minimises against a discriminator: minus the mean logit of its reconstructions."""
    return -fake_logits.float().mean()


def hinge_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the discriminator minimises (Lim and Ye, arXiv:1705.02894): 1 while it cannot tell, 0 when it can by far.

    Args:
        real_logits: discriminator on images, any shape.
        fake_logits: discriminator on detached reconstructions.

    Returns:
        "discriminator", and the mean logits "logits_real" and "logits_fake".
    """
    real_logits, fake_logits = real_logits.float(), fake_logits.float()
    loss = (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    return {"discriminator": loss, "logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.nn.Parameter
) -> torch.Tensor:
    """Weight at which the adversarial loss pulls the last layer as hard as the reconstruction loss does.

    Esser et al., arXiv:2012.09841, Eq. 7: the ratio of the gradients' norms, at most 1e4; it has no gradient itself.
    """
    wanted, given = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction_loss, adversarial)
    )
    return (wanted / (given + 1e-6)).clamp_max(1e4).detach()


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


def mse_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    cell_weights: torch.Tensor | None = None,
    sample_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error over cells, each of a weight.

    Args:
        prediction: (B, C, H, W).
        target: the same shape.
        cell_weights: (B, H, W); None for equal ones.
        sample_weights: weight of each image (B,), such as min-SNR's; None for equal ones.

    Returns:
        Scalar.
    """
    return _weighted(_squared_error(prediction, target), cell_weights, sample_weights).mean()


def multi_grained_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    layout: GrainLayout,
    grain_weights: tuple[float, ...] | None = None,
    sample_weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Multi-grained noise loss, Eq. 11.

    Every cell weighs alpha = 1 / 4 ** (k - 1 - grain), so a code counts once however many cells it is copied to. The
    sum is divided by the fixed number of cells, so a code counts the same in every image, whatever its fine ratio.

    Args:
        prediction: predicted noise (B, C, hR, wR).
        target: the noise, tied.
        layout: of the grain map.
        grain_weights: weight of a cell of each grain, coarsest first, instead of alpha. (1, 1) weighs cells alike.
        sample_weights: weight of each image (B,), such as min-SNR's; None for equal ones.

    Returns:
        "loss", and "mse_grain_<i>", the unweighted mean squared error of grain i, coarsest 0: NaN where no region of
        the batch has it.

    Raises:
        ValueError: there is not one weight for each grain, or the map does not match.
    """
    layout.check_sides(target)
    squared_error = _squared_error(prediction, target)  # (B, hR, wR)
    losses = {"loss": _weighted(squared_error, weights_of_cells(layout, grain_weights), sample_weights).mean()}
    for grain in range(layout.num_grains):
        of_grain = (layout.grain_of_cell == grain).float()
        losses[f"mse_grain_{grain}"] = (squared_error.detach() * of_grain).sum() / of_grain.sum()
    return losses


def variance_loss(
    variance: torch.Tensor,
    predicted_latents: torch.Tensor,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    cell_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Variational bound that trains a learned variance, in bits per latent value (Nichol and Dhariwal, 2102.09672).

    KL divergence between the posterior q(z_{t-1} | z_t, z_0) and the model's step, mean over cells. The variance is
    interpolated in its logarithm between the posterior's and beta_t (their Eq. 15). The prediction gets no
    gradient: its own loss trains it. With 1000 steps the mean over t is their 0.001 * L_vlb.

    Args:
        variance: v, the second half of the network's output, (B, C, H, W); -1 is the posterior's variance, 1 beta_t.
        predicted_latents: estimate of z_0 that the first half stands for.
        latents: z_0.
        timesteps: (B,) int64.
        alphas_cumprod: (T,) of the scheduler.
        cell_weights: (B, H, W), for D2iT those of `weights_of_cells(layout)`; None for equal ones.

    Returns:
        Scalar.
    """
    alphas_cumprod = alphas_cumprod.to(latents.device, torch.float64)
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before
    posterior_variance = betas * (1 - before) / (1 - alphas_cumprod)
    posterior_variance[0] = posterior_variance[1]  # the last step has none; a KL divergence needs one
    slope = before.sqrt() * betas / (1 - alphas_cumprod)  # of the posterior's mean in z_0

    def at(values: torch.Tensor) -> torch.Tensor:
        return values[timesteps].float()[:, None, None, None]

    log_posterior, log_beta = at(posterior_variance.log()), at(betas.log())
    log_variance = log_posterior + (variance.float() + 1) / 2 * (log_beta - log_posterior)
    mean_error = at(slope) * (predicted_latents.detach() - latents).float()  # both means share their term in z_t
    kl = 0.5 * (
        log_variance - log_posterior - 1 + (log_posterior - log_variance).exp() + mean_error**2 / log_variance.exp()
    )
    kl = kl.mean(dim=1) / math.log(2)  # (B, H, W)
    return _weighted(kl, cell_weights).mean()


def ratio_loss(probability: torch.Tensor, compression: float, group_size: int | None = None) -> torch.Tensor:
    """What holds the share of natural cells of DC-DiT at 1 / compression (arXiv:2603.06351).

    N / (N - 1) * ((1 - r) * (1 - p) + (N - 1) * r * p), with r the share of natural cells and p the mean probability:
    1 where both are 1 / N. r has no gradient; p is pulled up where r is too small, and down where it is too large.

    Args:
        probability: of the router, (B, H, W), before a budget takes cells away.
        compression: N, cells for each that is natural, above 1.
        group_size: images over which r and p are means, B a multiple of it; None for all.

    Returns:
        Scalar, the mean over the groups.

    Raises:
        ValueError: the compression is 1 or less, or the images are no multiple of the group.
    """
    if not compression > 1:
        raise ValueError(f"`compression` must be above 1, got {compression}.")
    group_size = len(probability) if group_size is None else group_size
    if group_size < 1 or len(probability) % group_size:
        raise ValueError(f"`group_size` must divide the {len(probability)} images of a batch, got {group_size}.")
    groups = probability.float().reshape(len(probability) // group_size, -1)
    natural, mean = (groups > 0.5).float().mean(dim=1), groups.mean(dim=1)
    loss = (1 - natural) * (1 - mean) + (compression - 1) * natural * mean
    return compression / (compression - 1) * loss.mean()


def weights_of_cells(layout: GrainLayout, grain_weights: tuple[float, ...] | None = None) -> torch.Tensor:
    """Loss weight of every cell, (B, hR, wR): alpha of Eq. 11, or the weight of its grain, coarsest first.

    Raises:
        ValueError: there is not one weight for each grain.
    """
    if grain_weights is None:
        return code_weights(layout.grain_of_cell, layout.num_grains)
    if len(grain_weights) != layout.num_grains:
        raise ValueError(f"`grain_weights` must be {layout.num_grains} weights, coarsest first, got {grain_weights}.")
    return torch.tensor(grain_weights, device=layout.grain_map.device)[layout.grain_of_cell]


def _squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of every cell, (B, H, W)."""
    return (prediction.float() - target.float()).pow(2).mean(dim=1)


def _weighted(
    values: torch.Tensor, cell_weights: torch.Tensor | None, sample_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Values of cells, (B, H, W), times what is given of (B, H, W) and (B,)."""
    if cell_weights is not None:
        values = cell_weights * values
    return values if sample_weights is None else values * sample_weights[:, None, None]
