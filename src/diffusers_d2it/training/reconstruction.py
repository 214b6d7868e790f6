# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How well an autoencoder reconstructs: PSNR, SSIM and rFID, all of torchmetrics."""

from collections.abc import Iterable

import torch
from torch import nn

from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL


def psnr(pixels: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1], a value per image: (B,)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        reconstruction.float().clamp(-1, 1), pixels.float(), data_range=2.0, reduction="none", dim=(1, 2, 3)
    )


@torch.no_grad()
def reconstruction_scores(
    vae: DynamicAutoencoderKL,
    batches: Iterable[torch.Tensor],
    fine_ratio: float | None = None,
    fid_features: int | nn.Module | None = None,
) -> dict[str, float]:
    """Score reconstructions from the mode of the posterior.

    Args:
        vae: the autoencoder.
        batches: images (B, 3, H, W) in [-1, 1].
        fine_ratio: as in `encode`.
        fid_features: what torchmetrics' FrechetInceptionDistance takes: 2048 for Inception's pooled features (needs
            torch-fidelity and a download), or a module that maps uint8 images (B, 3, H, W) to features (B, V) and says
            their number as `num_features`. None leaves the rFID out.

    Returns:
        "psnr" (dB) and "ssim", means over the images, "fine_share", "num_images", and "rfid" if asked for.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    fid = None
    if fid_features is not None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        fid = FrechetInceptionDistance(feature=fid_features, normalize=True).to(vae.device)
    sums = {"psnr": 0.0, "ssim": 0.0, "fine_share": 0.0}
    count = 0
    for pixels in batches:
        encoded = vae.encode(pixels.to(vae.device), fine_ratio=fine_ratio)
        pixels = pixels.to(vae.device)
        reconstruction = vae.decode(encoded.latent_dist.mode()).sample.float().clamp(-1, 1)
        sums["psnr"] += psnr(pixels, reconstruction).sum().item()
        similarity = structural_similarity_index_measure(reconstruction, pixels, data_range=2.0, reduction="none")
        sums["ssim"] += similarity.sum().item()
        sums["fine_share"] += (encoded.grain_map == vae.num_grains - 1).float().mean(dim=(1, 2)).sum().item()
        count += len(pixels)
        if fid is not None:
            fid.update((pixels + 1) / 2, real=True)
            fid.update((reconstruction + 1) / 2, real=False)
    scores = {name: total / count for name, total in sums.items()} | {"num_images": count}
    if fid is not None:
        scores["rfid"] = fid.compute().item()
    return scores
