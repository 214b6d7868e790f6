# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How well an autoencoder reconstructs: PSNR, SSIM and rFID, all of torchmetrics."""

from collections.abc import Iterable

import torch
from torch import nn

from ..broken_packages import import_optional
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from .vision_features import PooledFeatures


def check_torchmetrics() -> None:
    """Raise a ValueError if torchmetrics is missing or broken: figures are asked for after a long training."""
    import_optional("torchmetrics", "scoring reconstructions", extra="training")


def psnr(pixels: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1], a value per image: (B,)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        reconstruction.float().clamp(-1, 1), pixels.float(), data_range=2.0, reduction="none", dim=(1, 2, 3)
    )


def make_fid(name: str) -> nn.Module:
    """torchmetrics' Frechet distance with features of `name`, for images in [0, 1].

    Args:
        name: "inception" for Inception's 2048 pooled features (needs torch-fidelity and a download), or a vision model
            as of `PooledFeatures`.

    Raises:
        ValueError: the features cannot be loaded, or a package is missing or broken; it is named.
    """
    check_torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance

    if name != "inception":
        return FrechetInceptionDistance(feature=PooledFeatures(name), normalize=True)
    import_optional("torch_fidelity", "--fid_model inception", extra="metrics")
    try:
        return FrechetInceptionDistance(feature=2048, normalize=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--fid_model inception needs a download of its weights: {error}") from error


@torch.no_grad()
def reconstruction_scores(
    vae: DynamicAutoencoderKL,
    batches: Iterable[torch.Tensor],
    fine_ratio: float | None = None,
    fid: nn.Module | None = None,
) -> dict[str, float]:
    """Score reconstructions from the mode of the posterior.

    Args:
        vae: the autoencoder.
        batches: images (B, 3, H, W) in [-1, 1].
        fine_ratio: as in `encode`.
        fid: from `make_fid`; None leaves the rFID out.

    Returns:
        "psnr" (dB) and "ssim", means over the images, "fine_share", "num_images", and "rfid" if asked for.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if fid is not None:
        fid = fid.to(vae.device)
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
