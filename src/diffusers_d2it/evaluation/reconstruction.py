# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Reconstructions against their originals, image by image: PSNR and SSIM of torchmetrics, LPIPS, rFID, top-1 accuracy.

Reconstructions are rounded to 8 bits first, as images are when they are kept.

Shapes:
    B images, H W their sides in pixels
"""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator

from ..files import gather, on_main_process, place_of
from ..files.folders import digest
from ..files.source import public_config
from ..grains import fine_share
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..optional import import_optional
from ..pixels import from_uint8, to_uint8
from .evaluate import check_metrics, result_name, versions
from .features import FeatureExtractor, weights_digest
from .frechet import frechet_distance
from .images import ImageSet, hash_pixels, pixel_digest
from .results import Result
from .scores import classifies
from .statistics import FeatureStatistics
from .vision_networks import load_lpips


PAIR_METRICS = ("psnr", "ssim", "lpips", "rfid", "top1")
_OF_FEATURES = {"rfid", "top1"}

_LPIPS_NETWORK = "alex"
_SETTINGS = {
    "psnr": "mean over the images, in dB",
    "ssim": "mean over the images, window of deviation 1.5, edges count",
}


def check_torchmetrics() -> None:
    """Raise a ValueError if torchmetrics is missing or broken: metrics are asked for after a long training."""
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


@torch.no_grad()
def reconstruct(
    vae: DynamicAutoencoderKL, images: torch.Tensor, fine_ratio: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions from the mode of the posterior, and the shares of fine regions.

    Images uint8 (B, 3, H, W) become others and (B,); `fine_ratio` is that of `encode`, which may raise a ValueError.
    """
    encoded = vae.encode(from_uint8(images.to(vae.device)).to(vae.dtype), fine_ratio=fine_ratio)
    decoded = vae.decode(encoded.latent_dist.mode()).sample
    return to_uint8(decoded), fine_share(encoded.grain_map, vae.num_grains)


class PairScores:
    """Means over pairs of an image and its reconstruction, in one pass; each process has pairs of its own.

    `reference` tells the classes of the originals, for "top1".

    Raises:
        ValueError: a metric is unknown, given twice or lacks features, or a package or its weights are missing.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        features: FeatureExtractor | None = None,
        accelerator: Accelerator | None = None,
        device: torch.device | None = None,
        reference: ImageSet | None = None,
    ):
        check_metrics(metrics, PAIR_METRICS)
        if features is None and (lacking := _OF_FEATURES & set(metrics)):
            raise ValueError(f"the metric {min(lacking)!r} needs `features`.")
        self.labels = self.classes = None
        if "top1" in metrics:
            if "imagenet" not in features.widths((64, 64)):
                raise ValueError(f"the metric 'top1' needs a classifier of ImageNet, and {features.name} is none.")
            self.labels = reference.labels  # of all originals
            self.classes = self.labels.unique()
        if {"psnr", "ssim"} & set(metrics):
            check_torchmetrics()
        if device is None:
            device = accelerator.device if accelerator else features.device if features else torch.device("cpu")
        self.metrics, self.accelerator, self.device = metrics, accelerator, device
        self.features = features.to(device) if _OF_FEATURES & set(metrics) else None
        self.lpips = load_lpips(_LPIPS_NETWORK, "the metric 'lpips'").to(device) if "lpips" in metrics else None
        self.num_images, self.sums, self.hashes = 0, {}, [0, 0]  # of images and reconstructions
        self.statistics: list[FeatureStatistics] = []  # of both

    @torch.no_grad()
    def update(
        self,
        images: torch.Tensor,
        reconstructions: torch.Tensor,
        places: torch.Tensor | None = None,
        **others: torch.Tensor,
    ) -> None:
        """Add pairs, both uint8 (B, 3, H, W), their places in the set, and what else is averaged over images, (B,)."""
        self.hashes = [total + hash_pixels(part) for total, part in zip(self.hashes, (images, reconstructions))]
        images, reconstructions = images.to(self.device), reconstructions.to(self.device)
        pixels, decoded = from_uint8(images), from_uint8(reconstructions)
        scored = {"psnr": psnr, "ssim": ssim, "lpips": self.lpips}
        scored = {metric: scored[metric](pixels, decoded) for metric in self.metrics if metric not in _OF_FEATURES}
        found = self.features(reconstructions) if self.features else {}
        if self.labels is not None:
            scored["top1"] = classifies(found["imagenet"].cpu(), self.labels[places], self.classes)
        for name, values in (scored | others).items():
            self.sums[name] = self.sums.get(name, 0.0) + values.double().sum().item()
        self.num_images += len(images)
        if "rfid" in self.metrics:
            pools = [self.features(images)["pool"], found["pool"]]
            self.statistics = self.statistics or [FeatureStatistics(pool.shape[1]) for pool in pools]
            for statistics, pool in zip(self.statistics, pools):
                statistics.update(pool)

    def compute(self) -> dict[str, float]:
        """The mean of each metric and of the other values, and "rfid"."""
        means = {name: total / self.num_images for name, total in self.sums.items()}
        if self.statistics:
            real, fake = (statistics.moments for statistics in self.statistics)
            means["rfid"] = frechet_distance(*fake, *real)
        return means

    def results(self, samples: dict, reference: ImageSet) -> list[Result]:
        """A result for each metric and other value over all processes; `samples` is what protocols say of them."""
        parts = gather(
            self.accelerator, (self.num_images, self.sums, self.hashes, self.statistics, reference.left_out)
        )
        for part in parts:
            reference.left_out |= part[4]
        reference.check_left_out()
        parts = [part for part in parts if part[0]]  # a process may have had no images
        numbers, sums, hashes, statistics, _ = zip(*parts)
        self.num_images = sum(numbers)
        self.sums = {name: sum(part[name] for part in sums) for name in sums[0]}
        self.statistics = statistics[0]
        for part in statistics[1:]:
            for mine, theirs in zip(self.statistics, part):
                mine.merge(theirs)
        values = on_main_process(self.accelerator, self.compute)

        original, reconstruction = (pixel_digest(self.num_images, sum(of_part)) for of_part in zip(*hashes))
        common = {
            "samples": {**samples, "num_images": self.num_images, "digest": reconstruction},
            "reference": {**reference.describe(), "digest": original},
            "versions": versions(self.features),
        }
        details = {metric: {"settings": _SETTINGS.get(metric, {})} for metric in self.metrics}
        if "lpips" in details:
            details["lpips"] = {"features": {"name": _LPIPS_NETWORK, "digest": weights_digest(self.lpips)}}
        if "top1" in details:
            details["top1"] = {
                "features": self.features.describe(),
                "settings": {"classes": self.classes.tolist()},
            }
        if "rfid" in details:
            rank_deficient = self.num_images <= self.statistics[0].num_features
            details["rfid"] = {"features": self.features.describe(), "rank_deficient": rank_deficient}
        results = []
        for name in dict.fromkeys([*self.metrics, *values]):
            shown = result_name(name, self.features) if name in _OF_FEATURES else name
            results.append(Result(shown, values[name], common | details.get(name, {})))
        return results


def evaluate_pairs(
    samples: ImageSet,
    reference: ImageSet,
    metrics: Sequence[str],
    features: FeatureExtractor | None = None,
    *,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    num_workers: int = 0,
) -> list[Result]:
    """Compare images one by one, each reconstruction with its original.

    Args:
        samples: the reconstructions.
        reference: the originals. Files belong to files of the same name but for the ending, in whatever order; where
            either set has no files, image i belongs to image i.
        metrics: some of `PAIR_METRICS`.
        features: for "rfid", which is called "rfd_<name>" with others than Inception's.
        batch_size, accelerator, num_workers: of `evaluate`.

    Returns:
        A result for each metric.

    Raises:
        ValueError: the sets differ in number or size, or images have no partner (they are named) or cannot be used; or
            from `PairScores`.
    """
    samples, paired = samples.paired_with(reference)
    scores, place = PairScores(metrics, features, accelerator, reference=reference), place_of(accelerator)
    originals = reference.batches(batch_size, *place, num_workers, progress=place[0] == 0)
    theirs = samples.batches(batch_size, *place, num_workers)
    for places, images in originals:  # of which some may be left out, and whole batches
        others, reconstructions = next(batch for batch in theirs if batch[0][-1] >= places[-1])
        scores.update(images, reconstructions[torch.isin(others, places)], places)
    return scores.results(samples.describe() | {"paired": paired}, reference)


def evaluate_reconstructions(
    vae: DynamicAutoencoderKL,
    reference: ImageSet,
    metrics: Sequence[str],
    features: FeatureExtractor | None = None,
    *,
    fine_ratio: float | None = None,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    num_workers: int = 0,
) -> list[Result]:
    """Score an autoencoder on images: reconstructions from the mode of the posterior.

    Args:
        vae: the autoencoder.
        reference: the images.
        fine_ratio: as in `encode`.
        metrics, features, batch_size, accelerator, num_workers: of `evaluate_pairs`.

    Returns:
        A result for each metric, and "fine_share", the share of fine regions that the maps really had.

    Raises:
        ValueError: images cannot be used; or from `PairScores` and `encode`.
    """
    vae = vae if accelerator is None else vae.to(accelerator.device)
    scores = PairScores(metrics, features, accelerator, vae.device, reference)
    place = place_of(accelerator)
    for places, images in reference.batches(batch_size, *place, num_workers, progress=place[0] == 0):
        reconstructions, shares = reconstruct(vae, images, fine_ratio)
        scores.update(images, reconstructions, places, fine_share=shares)
    samples = {
        "name": "reconstructions",
        "num_images": len(reference),
        "resolution": list(reference.size),
        "checkpoint": {"weights": weights_digest(vae), "config": digest(public_config(vae.config))},
        "fine_ratio": vae.grain_ratios[-1] if fine_ratio is None else fine_ratio,
        "latents": "mode of the posterior",
        "dtype": str(vae.dtype).removeprefix("torch."),
    }
    return scores.results(samples, reference)


def reconstruction_scores(
    vae: DynamicAutoencoderKL,
    batches: Iterable[torch.Tensor],
    fine_ratio: float | None = None,
    features: FeatureExtractor | None = None,
) -> dict[str, float]:
    """Score reconstructions from the mode of the posterior, without a protocol, as training does.

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
    metrics = ["psnr", "ssim"] if features is None else ["psnr", "ssim", "rfid"]
    scores = PairScores(metrics, features, device=vae.device)
    for pixels in batches:
        images = to_uint8(pixels)
        reconstructions, shares = reconstruct(vae, images, fine_ratio)
        scores.update(images, reconstructions, fine_share=shares)
    if not scores.num_images:
        raise ValueError("`batches` must hold images to score, got none.")
    return scores.compute() | {"num_images": scores.num_images}
