# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Reconstructions against their originals, image by image: PSNR and SSIM of torchmetrics, LPIPS, rFID, top-1 accuracy.

Reconstructions are rounded to 8 bits first, as images are when they are kept.

Shapes:
    B images, H W their sides in pixels
"""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator

from ..files import on_main_process, place_of
from ..files.folders import digest
from ..files.source import public_config
from ..grains import fine_share
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..optional import import_optional
from ..pixels import from_uint8, to_uint8
from ..words import listed
from .evaluate import ReadImages, Reading, check_metrics, result_name, versions
from .features import FeatureExtractor, weights_digest
from .images import ImageSet
from .results import Result
from .scores import classifies, frechet_distance
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

    They are compared on a device, by default that of the features; `reference` tells the classes of all originals.

    Raises:
        ValueError: a metric is unknown, given twice or lacks features, or a package or its weights are missing.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        features: FeatureExtractor | None = None,
        device: torch.device | None = None,
        reference: ImageSet | None = None,
    ):
        check_metrics(metrics, PAIR_METRICS)
        lacking = _OF_FEATURES & set(metrics)
        if lacking and features is None:
            raise ValueError(f"the metric {min(lacking)!r} needs `features`.")
        self.metrics, self.features = metrics, features if lacking else None
        self.device = device or (torch.device("cpu") if features is None else features.device)
        self.measures, self.details = {"psnr": psnr, "ssim": ssim}, {}  # and what protocols say of each metric
        if {"psnr", "ssim"} & set(metrics):
            check_torchmetrics()
            self.details |= {metric: {"settings": settings} for metric, settings in _SETTINGS.items()}
        if "lpips" in metrics:
            network = load_lpips(_LPIPS_NETWORK, "the metric 'lpips'").to(self.device)
            self.measures["lpips"] = network
            self.details["lpips"] = {"features": {"name": _LPIPS_NETWORK, "digest": weights_digest(network)}}
        if lacking:
            features.to(self.device)
            self.details |= {metric: {"features": features.describe()} for metric in lacking}
        if "top1" in metrics:
            if "imagenet" not in features.widths((64, 64)):
                raise ValueError(f"the metric 'top1' needs a classifier of ImageNet, and {features.name} is none.")
            self.labels = reference.labels  # of all originals
            self.classes = self.labels.unique()
            self.details["top1"]["settings"] = {"classes": self.classes.tolist()}
        self.originals, self.reconstructions = Reading(), Reading()

    @torch.no_grad()
    def update(
        self, places: torch.Tensor, images: torch.Tensor, reconstructions: torch.Tensor, **others: torch.Tensor
    ) -> None:
        """Add pairs, both uint8 (B, 3, H, W), their places in the set, and what else is averaged over images, (B,)."""
        both = images.to(self.device), reconstructions.to(self.device)
        pixels, decoded = map(from_uint8, both)
        measures = {name: self.measures[name] for name in self.metrics if name not in _OF_FEATURES}
        scores = {name: measure(pixels, decoded).flatten() for name, measure in measures.items()}
        found = self.features(both[1]) if self.features else {}
        if "top1" in self.metrics:
            scores["top1"] = classifies(found["imagenet"].cpu(), self.labels[places], self.classes)
        pools = [{}, {}]
        if "rfid" in self.metrics:
            pools = [{"pool": self.features(both[0])["pool"]}, {"pool": found["pool"]}]
        self.originals.add(places, images, {}, pools[0])
        self.reconstructions.add(places, reconstructions, scores | others, pools[1])

    def results(self, samples: dict, reference: ImageSet, accelerator: Accelerator | None) -> list[Result]:
        """A result for each metric and other value over all processes; `samples` is what protocols say of them."""
        reference.share_left_out(accelerator)
        originals, reconstructions = self.originals.joined(accelerator), self.reconstructions.joined(accelerator)
        values = on_main_process(accelerator, lambda: _means(originals, reconstructions))
        common = {
            "samples": {**samples, "num_images": len(originals.places), "digest": reconstructions.digest},
            "reference": {**reference.describe(), "digest": originals.digest},
            "versions": versions(self.features),
        }
        if "rfid" in self.metrics:
            self.details["rfid"]["rank_deficient"] = len(originals.places) <= len(originals.moments["pool"][0])
        results = []
        for name in dict.fromkeys([*self.metrics, *values]):
            shown = result_name(name, self.features) if name in _OF_FEATURES else name
            results.append(Result(shown, values[name], common | self.details.get(name, {})))
        return results


def _means(originals: ReadImages, reconstructions: ReadImages) -> dict[str, float]:
    """The mean of each score of the pairs, and with features "rfid"."""
    found = {name: scores.double().mean().item() for name, scores in reconstructions.rows.items()}
    if originals.moments:
        found["rfid"] = frechet_distance(*reconstructions.moments["pool"], *originals.moments["pool"])
    return found


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
    order, paired = samples.order_of(reference)
    device, place = None if accelerator is None else accelerator.device, place_of(accelerator)
    scores = PairScores(metrics, features, device, reference)
    originals = reference.batches(batch_size, *place, num_workers, progress=place[0] == 0)
    theirs = samples.batches(batch_size, *place, num_workers, order=order)
    for places, images in originals:  # of which some may be left out, and whole batches
        none = places[:0], images[:0]
        others, reconstructions = next((batch for batch in theirs if batch[0][-1] >= places[-1]), none)
        partners = torch.isin(others, places)
        if partners.sum() < len(places):
            reasons = listed((f"{name}: {reason}" for name, reason in samples.left_out.items()), most=10)
            raise ValueError(f"reconstructions of {samples.name} cannot be used, and their originals can: {reasons}.")
        scores.update(places, images, reconstructions[partners])
    return scores.results(samples.describe() | {"paired": paired}, reference, accelerator)


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
    scores, place = PairScores(metrics, features, vae.device, reference), place_of(accelerator)
    for places, images in reference.batches(batch_size, *place, num_workers, progress=place[0] == 0):
        reconstructions, shares = reconstruct(vae, images, fine_ratio)
        scores.update(places, images, reconstructions, fine_share=shares)
    samples = {
        "name": "reconstructions",
        "resolution": list(reference.size),
        "checkpoint": {"weights": weights_digest(vae), "config": digest(public_config(vae.config))},
        "fine_ratio": vae.grain_ratios[-1] if fine_ratio is None else fine_ratio,
        "latents": "mode of the posterior",
        "dtype": str(vae.dtype).removeprefix("torch."),
    }
    return scores.results(samples, reference, accelerator)


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
    scores, num_images = PairScores(metrics, features, vae.device), 0
    for images in map(to_uint8, batches):
        reconstructions, shares = reconstruct(vae, images, fine_ratio)
        scores.update(torch.arange(num_images, num_images + len(images)), images, reconstructions, fine_share=shares)
        num_images += len(images)
    if not num_images:
        raise ValueError("`batches` must hold images to score, got none.")
    return _means(scores.originals.joined(), scores.reconstructions.joined()) | {"num_images": num_images}
