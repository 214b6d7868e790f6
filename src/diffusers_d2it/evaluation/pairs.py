# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Reconstructions against their originals, image by image: PSNR, SSIM, LPIPS and rFID, each with its protocol."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..files import on_main_process
from ..files.folders import digest
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from .collecting import device_of, place_of, versions
from .evaluation import result_name
from .features import FeatureExtractor, weights_digest
from .image_sets import ImageSet, PixelDigest
from .perceptual import load_lpips
from .reconstruction import PAIR_METRICS, PairScores, check_torchmetrics, reconstruct
from .results import Result


_LPIPS_NETWORK = "alex"
_SETTINGS = {
    "psnr": "mean over the images, in dB",
    "ssim": "mean over the images, window of deviation 1.5, edges count",
}

Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]  # originals and reconstructions, uint8 (B, 3, H, W)


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
    """Compare images one by one: image i of the samples is a reconstruction of image i of the reference.

    Args:
        samples: the reconstructions.
        reference: the originals, in the same order.
        metrics: some of `PAIR_METRICS`.
        features: for "rfid", which is called "rfd_<name>" with others than Inception's.
        batch_size: images of a batch and process.
        accelerator: its processes share the images; all of them get the results.
        num_workers: processes that decode images, of each process.

    Returns:
        A result for each metric.

    Raises:
        ValueError: the sets differ in number or size, a metric is unknown, given twice or lacks features, a package or
            its weights are missing, or images cannot be used.
    """
    if (samples.num_images, samples.size) != (reference.num_images, reference.size):
        numbers = (f"{one.num_images} of {one.size[0]}x{one.size[1]} in {one.name}" for one in (samples, reference))
        raise ValueError(f"pairs need as many images of the same size, got {' and '.join(numbers)}.")
    scorer = _Scorer(metrics, reference, features, accelerator)

    def pairs() -> Pairs:
        both = (one.batches(batch_size, *scorer.place, num_workers) for one in (reference, samples))
        for (_, images), (_, reconstructions) in zip(*both):
            yield images, reconstructions

    scorer.read(pairs(), batch_size)
    return scorer.results(samples.describe())


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
        metrics, features: of `evaluate_pairs`.
        fine_ratio: as in `encode`.
        batch_size, accelerator, num_workers: of `evaluate_pairs`.

    Returns:
        A result for each metric, and "fine_share", the share of fine regions that the maps really had.

    Raises:
        ValueError: from `evaluate_pairs` and `encode`.
    """
    vae = vae if accelerator is None else vae.to(accelerator.device)
    scorer = _Scorer(metrics, reference, features, accelerator, vae.device)
    fine = torch.zeros(1, dtype=torch.float64)

    def pairs() -> Pairs:
        for _, images in reference.batches(batch_size, *scorer.place, num_workers):
            reconstructions, shares = reconstruct(vae, images, fine_ratio)
            fine.add_(shares.double().sum().cpu())
            yield images, reconstructions

    scorer.read(pairs(), batch_size)
    if scorer.place[1] > 1:
        fine = accelerator.reduce(fine.to(accelerator.device), "sum").cpu()
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    ratios = vae.config.grain_ratios or [1 / vae.num_grains] * vae.num_grains
    samples = {
        "name": "reconstructions",
        "num_images": reference.num_images,
        "resolution": list(reference.size),
        "checkpoint": {"weights": weights_digest(vae), "config": digest(config)},
        "fine_ratio": ratios[-1] if fine_ratio is None else fine_ratio,
        "latents": "mode of the posterior",
        "dtype": str(vae.dtype).removeprefix("torch."),
    }
    return [*scorer.results(samples), Result("fine_share", fine.item() / len(reference), scorer.protocol(samples))]


class _Scorer:
    """Scores pairs and tells how; checks first what it is asked for."""

    def __init__(
        self,
        metrics: Sequence[str],
        reference: ImageSet,
        features: FeatureExtractor | None,
        accelerator: Accelerator | None,
        device: torch.device | None = None,
    ):
        if not metrics or len(set(metrics)) < len(metrics) or not set(metrics) <= set(PAIR_METRICS):
            raise ValueError(f"`metrics` must be some of {', '.join(PAIR_METRICS)}, each once, got {list(metrics)}.")
        if "rfid" in metrics and features is None:
            raise ValueError("the metric 'rfid' needs `features`.")
        if "rfid" in metrics and len(reference) < 2:
            raise ValueError(f"the metric 'rfid' needs at least 2 images, got {len(reference)} in {reference.name}.")
        if {"psnr", "ssim"} & set(metrics):
            check_torchmetrics()
        self.metrics, self.reference, self.accelerator = metrics, reference, accelerator
        self.place = place_of(accelerator)
        self.features, self.lpips = (features if "rfid" in metrics else None), None
        if self.features is not None:
            device = device or device_of(features, accelerator)
            self.features = features.to(device)
        self.device = device or (torch.device("cpu") if accelerator is None else accelerator.device)
        if "lpips" in metrics:
            self.lpips = load_lpips(_LPIPS_NETWORK, "the metric 'lpips'").to(self.device)

    def read(self, pairs: Pairs, batch_size: int) -> None:
        """Read all pairs, each process its share, and compute the values."""
        scores = PairScores(self.metrics, self.features, self.reference.size, self.lpips)
        digests = [PixelDigest(), PixelDigest()]
        index, count = self.place
        total = -(-len(self.reference) // (batch_size * count))
        for pair in tqdm(pairs, desc=self.reference.name, total=total, disable=index > 0):
            for pixels, images in zip(digests, pair):
                pixels.update(images)
            scores.update(*(images.to(self.device) for images in pair))
        scores = scores.gathered(self.accelerator)
        if count > 1:
            digests = [pixels.gathered() for pixels in digests]
        self._digests = [pixels.hexdigest() for pixels in digests]
        self._values = on_main_process(self.accelerator, scores.compute)
        self._num_features = scores.moments[0].num_features if scores.moments else None

    def protocol(self, samples: dict, **details: object) -> dict:
        """How a figure was measured."""
        original, reconstruction = self._digests
        return {
            "samples": {**samples, "digest": reconstruction},
            "reference": {**self.reference.describe(), "digest": original},
            **details,
            "versions": versions(self.features),
        }

    def results(self, samples: dict) -> list[Result]:
        """A result for each metric; `samples` is what a protocol says of the reconstructions."""
        results = []
        for metric in self.metrics:
            name, details = metric, {"settings": _SETTINGS.get(metric, {})}
            if metric == "lpips":
                details = {"features": {"name": _LPIPS_NETWORK, "digest": weights_digest(self.lpips)}}
            elif metric == "rfid":
                name = result_name(metric, self.features)
                details = {"features": self.features.describe()}
                details["rank_deficient"] = len(self.reference) <= self._num_features
            results.append(Result(name, self._values[metric], self.protocol(samples, **details)))
        return results
