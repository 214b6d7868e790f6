# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How well an autoencoder reconstructs: PSNR and SSIM of torchmetrics, LPIPS, and rFID, over pairs of images.

Reconstructions are rounded to 8 bits first, as images are when they are kept.

Shapes:
    B images, H W their sides in pixels
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from accelerate import Accelerator
from torch import nn

from ..grains import fine_share
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..optional import import_optional
from .collecting import feature_widths
from .features import FeatureExtractor
from .frechet import frechet_distance
from .statistics import FeatureStatistics


PAIR_METRICS = ("psnr", "ssim", "lpips", "rfid")


def check_torchmetrics() -> None:
    """Raise a ValueError if torchmetrics is missing or broken: figures are asked for after a long training."""
    import_optional("torchmetrics", "scoring reconstructions", extra="metrics")


def psnr(pixels: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1], a value per image: (B,)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        reconstruction.float().clamp(-1, 1), pixels.float(), data_range=2.0, reduction="none", dim=(1, 2, 3)
    )


def ssim(pixels: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Structural similarity of images (B, 3, H, W) in [-1, 1], a value per image: (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    # In [0, 1]: it compares means by their ratio, so that zero must be black
    decoded, pixels = ((images.float().clamp(-1, 1) + 1) / 2 for images in (reconstruction, pixels))
    similarity = structural_similarity_index_measure(decoded, pixels, data_range=1.0, reduction="none")
    return similarity.reshape(len(pixels))


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as they lie on disk; what lies outside is clamped."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def reconstruct(
    vae: DynamicAutoencoderKL, images: torch.Tensor, fine_ratio: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions from the mode of the posterior, and the share of fine regions.

    Args:
        vae: the autoencoder.
        images: uint8 (B, 3, H, W).
        fine_ratio: as in `encode`.

    Returns:
        uint8 (B, 3, H, W) and (B,).

    Raises:
        ValueError: from `encode`.
    """
    pixels = (images.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    encoded = vae.encode(pixels, fine_ratio=fine_ratio)
    decoded = vae.decode(encoded.latent_dist.mode()).sample
    return to_uint8(decoded), fine_share(encoded.grain_map, vae.num_grains)


class PairScores:
    """Means over pairs of an image and its reconstruction, in one pass.

    Args:
        metrics: some of `PAIR_METRICS`.
        features: of the Frechet distance "rfid".
        size: (H, W); with "rfid" only.
        lpips: from `load_lpips`, for "lpips".
    """

    def __init__(
        self,
        metrics: Sequence[str],
        features: FeatureExtractor | None = None,
        size: tuple[int, int] | None = None,
        lpips: nn.Module | None = None,
    ):
        self.metrics = [metric for metric in metrics if metric != "rfid"]
        self.features, self.lpips = features, lpips
        self.sums = torch.zeros(len(self.metrics) + 1, dtype=torch.float64)  # the last one counts the images
        self.moments: list[FeatureStatistics] = []
        if "rfid" in metrics:
            width = feature_widths(features, size)["pool"]
            self.moments = [FeatureStatistics(width), FeatureStatistics(width)]

    @torch.no_grad()
    def update(self, images: torch.Tensor, reconstructions: torch.Tensor) -> None:
        """Add pairs, both uint8 (B, 3, H, W)."""
        pixels, decoded = images.float() / 127.5 - 1, reconstructions.float() / 127.5 - 1
        for number, metric in enumerate(self.metrics):
            if metric == "lpips":
                scores = self.lpips(pixels, decoded).flatten()
            else:
                scores = {"psnr": psnr, "ssim": ssim}[metric](pixels, decoded)
            self.sums[number] += scores.double().sum().cpu()
        self.sums[-1] += len(images)
        for moments, part in zip(self.moments, (images, reconstructions)):
            moments.update(self.features(part)["pool"])

    def gathered(self, accelerator: Accelerator | None) -> "PairScores":
        """The scores of the pairs of all processes, the same on each; all must call it."""
        if accelerator is None or accelerator.num_processes == 1:
            return self
        total = PairScores(self.metrics)
        total.sums = accelerator.reduce(self.sums.to(accelerator.device), "sum").cpu()
        total.moments = [moments.gathered(accelerator) for moments in self.moments]
        return total

    def compute(self) -> dict[str, float]:
        """The means by metric, and "rfid"."""
        means = dict(zip(self.metrics, (self.sums[:-1] / self.sums[-1]).tolist()))
        if self.moments:
            real, fake = self.moments
            means["rfid"] = frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)
        return means


def reconstruction_scores(
    vae: DynamicAutoencoderKL,
    batches: Iterable[torch.Tensor],
    fine_ratio: float | None = None,
    features: FeatureExtractor | None = None,
) -> dict[str, float]:
    """Score reconstructions from the mode of the posterior.

    Args:
        vae: the autoencoder.
        batches: images (B, 3, H, W) in [-1, 1].
        fine_ratio: as in `encode`.
        features: of an rFID; None leaves it out.

    Returns:
        "psnr" (dB) and "ssim", means over the images, "fine_share", "num_images", and "rfid" if asked for.

    Raises:
        ValueError: there are no images, or with features fewer than two; from `encode`.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("`batches` must hold images to score, got none.")
    metrics = ["psnr", "ssim"]
    if features is not None:
        features = features.to(vae.device)
        metrics.append("rfid")
    scores, shares = PairScores(metrics, features, tuple(first.shape[2:])), []
    for pixels in chain([first], batches):
        images = to_uint8(pixels).to(vae.device)
        decoded, fine_shares = reconstruct(vae, images, fine_ratio)
        scores.update(images, decoded)
        shares.append(fine_shares.cpu())
    shares = torch.cat(shares)
    return scores.compute() | {"fine_share": shares.mean().item(), "num_images": len(shares)}
