# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Entropy thresholds of a data set (sec. 3.1, arXiv:2504.09454): counted once, good for every ratio of grains."""

import math

import torch

from .entropy import LUMA_WEIGHTS, NUM_BINS, SIGMA, region_entropy


NUM_QUANTILES = 200  # steps of half a per cent
_COUNT_BINS = 2**16  # steps of 8.5e-5 nats, below anything a threshold can resolve


class EntropyCalibration:
    """Distribution of region entropy over a data set, counted image by image in constant memory.

    Counts are integers on a fixed grid, so the result does not depend on the order of the images, on the batch size or
    on how many processes shared the work:

        calibration = EntropyCalibration(region_size=16)
        for pixels in batches:                 # (B, 3, H, W) in [-1, 1]
            calibration.update(pixels)
        vae.register_to_config(calibration=calibration.to_config(source="imagenet-1k train, 256x256 centre crops"))

    Args:
        region_size: side S of a region in pixels. Thresholds hold for the region size they were counted with.
        num_bins: bins of Eq. 2.
        sigma: kernel width of Eq. 2.
    """

    def __init__(self, region_size: int = 16, num_bins: int = NUM_BINS, sigma: float = SIGMA):
        self.region_size = region_size
        self.num_bins = num_bins
        self.sigma = sigma
        self.num_images = 0
        self.counts = torch.zeros(_COUNT_BINS, dtype=torch.int64)

    @property
    def _bin_width(self) -> float:
        return math.log(self.num_bins) / _COUNT_BINS

    def update(self, pixels: torch.Tensor) -> None:
        """Count the regions of images (B, 3, H, W) in [-1, 1]. Raises the ValueErrors of `region_entropy`."""
        entropy = region_entropy(pixels, self.region_size, self.num_bins, self.sigma).flatten().cpu()
        bins = (entropy / self._bin_width).long().clamp_max(_COUNT_BINS - 1)
        self.counts += torch.bincount(bins, minlength=_COUNT_BINS)
        self.num_images += len(pixels)

    def merge(self, counts: torch.Tensor, num_images: int) -> None:
        """Add what another process counted with the same settings."""
        self.counts += counts.to(self.counts)
        self.num_images += num_images

    def to_config(self, source: str) -> dict:
        """Everything needed to use and to check the thresholds, as plain JSON values.

        Args:
            source: the images that were counted, in words: data set, split, resolution, crop.

        Raises:
            ValueError: no image was counted.
        """
        if self.num_images == 0:
            raise ValueError("no image was counted: a calibration needs at least one.")
        total = int(self.counts.sum())
        ranks = torch.arange(NUM_QUANTILES + 1, dtype=torch.float64) * total / NUM_QUANTILES
        # Rounded upwards, so that a mass of equal entropies never exceeds its own quantile by a rounding error.
        upper_edge = torch.searchsorted(self.counts.cumsum(0).double(), ranks.clamp_min(1)) + 1
        return {
            "quantiles": [math.ceil(edge * self._bin_width * 1e4) / 1e4 for edge in upper_edge.tolist()],
            "region_size": self.region_size,
            "num_bins": self.num_bins,
            "sigma": self.sigma,
            "luma_weights": list(LUMA_WEIGHTS),
            "luma_range": [0.0, 1.0],
            "num_images": self.num_images,
            "num_regions": total,
            "tie_share": round(int(self.counts.max()) / total, 6),
            "source": source,
        }


def check_calibration(calibration: dict, region_size: int) -> None:
    """Raise a ValueError unless a calibration can be used for regions of `region_size` pixels by this version."""
    if calibration.get("region_size") != region_size:
        raise ValueError(
            f"`calibration` was counted on regions of {calibration.get('region_size')} pixels, this model has regions"
            f" of {region_size}."
        )
    quantiles = calibration.get("quantiles") or []
    if len(quantiles) < 2 or not all(a <= b for a, b in zip(quantiles, quantiles[1:])):  # NaN fails it
        raise ValueError("`calibration` needs two or more ascending `quantiles`.")
    for key, value in (("luma_weights", list(LUMA_WEIGHTS)), ("luma_range", [0.0, 1.0])):
        if list(calibration.get(key, value)) != value:
            raise ValueError(f"`calibration` was counted with {key} {calibration[key]}, this version uses {value}.")


def thresholds_for_ratios(calibration: dict, ratios: list[float]) -> list[float]:
    """Thresholds that give each grain its share of the calibrated regions (the r and T of sec. 3.1).

    Args:
        calibration: what `EntropyCalibration.to_config` returned. Its "quantiles" are the entropies below which
            0, 1/n, ... 1 of the regions lie; values between them are interpolated.
        ratios: share of regions of each grain, coarsest first; they sum to one.

    Returns:
        k - 1 ascending thresholds in nats. A grain of share 0 stays empty also on images of another distribution: its
        thresholds are -inf or +inf at the ends.
    """
    quantiles = calibration["quantiles"]
    thresholds, share = [], 0.0
    for ratio in ratios[:-1]:
        share += ratio
        if share <= 1e-9:
            thresholds.append(-math.inf)
        elif share >= 1 - 1e-9:
            thresholds.append(math.inf)
        else:
            position = share * (len(quantiles) - 1)
            left = int(position)
            right = min(left + 1, len(quantiles) - 1)
            thresholds.append(quantiles[left] + (quantiles[right] - quantiles[left]) * (position - left))
    return thresholds
