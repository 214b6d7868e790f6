# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What Dynamic Grained Coding decides by (sec. 3.1, arXiv:2504.09454): entropy of regions, thresholds of a data set.

Shapes:
    B batch, H W image sides in pixels, S side of a region in pixels, h = H / S, w = W / S
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .limits import can_be_read


NUM_BINS = 256
SIGMA = 0.01
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, the single channel Y that Eq. 2 works on
_CELLS_PER_SIGMA = 4  # of the grid of splines; entropy is then within 1e-5 nats
_BLOCK = 64  # bins computed by one matrix product
_REACH = 30  # cells from a bin to the last spline that matters to it: the coefficients beyond are below 1e-11
NUM_QUANTILES = 200  # of a calibration: steps of half a per cent
_COUNT_BINS = 2**16  # steps of 8.5e-5 nats, below anything a threshold can resolve


def region_entropy(
    pixels: torch.Tensor, region_size: int = 16, num_bins: int = NUM_BINS, sigma: float = SIGMA
) -> torch.Tensor:
    """Shannon entropy of the luma of every region, Eqs. 2-3 of arXiv:2504.09454.

    The density of Eq. 2 is a sum of Gaussians around the pixels of a region, evaluated at `num_bins` bins evenly
    spaced on [0, 1]. As printed it does not sum to one; it is divided by its sum before Eq. 3. Instead of `num_bins`
    exponentials a pixel, a Gaussian is written as a sum of cubic B-splines on a grid four times finer than sigma: each
    pixel adds its four spline weights to a histogram of its region, and one small matrix product with the fixed
    coefficients of the bins gives the density, within 1e-5 nats of the direct sum.

    Args:
        pixels: RGB images of shape (B, 3, H, W) with values in [-1, 1].
        region_size: side S of a region in pixels; H and W are multiples of it.
        num_bins: number of bins b_j of Eq. 2. The paper takes S ** 2, which is 256 for S = 16; fewer than 256 would
            under-sample a kernel of sigma = 0.01, so 256 stays for smaller regions.
        sigma: width of the kernel of Eq. 2, in units of the luma range [0, 1].

    Returns:
        Entropy in nats, float32, of shape (B, H / S, W / S); at most ln(num_bins).

    Raises:
        ValueError: `pixels` is not (B, 3, H, W), is not floating point, has sides that are not multiples of
            `region_size`, or has values that are NaN or outside [-1, 1]; the bins lie further than 2 sigma apart.
    """
    _check_pixels(pixels, region_size)
    if num_bins < 2 or (num_bins - 1) * sigma < 0.5:
        raise ValueError(
            f"`num_bins` {num_bins} cannot sample a kernel of `sigma` {sigma}: bins lie further than 2 sigma apart."
        )
    # In half precision the density under- and overflows (fp16 gives NaN): float32, also inside an autocast region.
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        return _entropy(pixels.float(), region_size, num_bins, sigma)


def _entropy(pixels: torch.Tensor, region_size: int, num_bins: int, sigma: float) -> torch.Tensor:
    batch, _, height, width = pixels.shape
    rows, columns = height // region_size, width // region_size
    num_regions = batch * rows * columns
    num_cells = math.ceil(_CELLS_PER_SIGMA / sigma)
    num_splines = num_cells + 3

    # A new tensor costs more here than the arithmetic on it, hence the operations in place.
    red, green, blue = pixels.unbind(1)
    luma = (red * LUMA_WEIGHTS[0]).add_(green, alpha=LUMA_WEIGHTS[1]).add_(blue, alpha=LUMA_WEIGHTS[2])
    position = luma.add_(1).mul_(num_cells / 2).clamp_(0, num_cells)  # the clamp only removes the rounding of the sum
    cell = position.long().clamp_(0, num_cells - 1)  # (B, H, W); NaN has none
    position = position.sub_(cell).flatten()  # inside its cell, 0 ... 1

    # Histogram of each region: a pixel adds to the four splines that overlap its cell, by their value there.
    region = torch.arange(num_regions, device=pixels.device).view(batch, rows, 1, columns, 1)
    cell.view(batch, rows, region_size, columns, region_size).add_(region * num_splines)
    cell = cell.flatten()
    histogram = position.new_zeros(num_regions * num_splines)
    for spline, weight in enumerate(_spline_weights(position)):
        histogram[spline:].scatter_add_(0, cell, weight)
    histogram = histogram.view(num_regions, num_splines)

    # Eq. 2, a block of bins after the other from the splines that reach it
    coefficients = _gaussians_as_splines(num_bins, sigma, num_cells, pixels.device)
    density = []
    for first in range(0, num_bins, _BLOCK):
        last = min(first + _BLOCK, num_bins) - 1
        low, high = (j * num_cells // (num_bins - 1) for j in (first, last))  # cells of the bins
        splines = slice(max(low - _REACH, 0), high + _REACH)
        density.append(histogram[:, splines] @ coefficients[splines, first : last + 1])
    density = torch.cat(density, dim=1)
    density = density.clamp_min_(1e-30)  # (B * h * w, num_bins); the splines may leave a negative rounding error

    # Eq. 3 of the density over its sum: -sum(p log p) with p = d / sum(d) is log(sum(d)) - sum(d log d) / sum(d)
    total = density.sum(dim=-1)
    entropy = total.log() - density.log().mul_(density).sum(dim=-1) / total
    return entropy.view(batch, rows, columns)


def _spline_weights(position: torch.Tensor) -> Iterator[torch.Tensor]:
    """The cubic B-splines that overlap a cell, from low to high, at a position 0 ... 1 inside it; six times each."""
    remaining = 1 - position
    yield remaining.square().mul_(remaining)
    yield (position * 3).sub_(6).mul_(position).mul_(position).add_(4)
    yield (remaining * 3).sub_(6).mul_(remaining).mul_(remaining).add_(4)
    yield position.square().mul_(position)


@torch.compiler.assume_constant_result  # of a graph too
def _gaussians_as_splines(num_bins: int, sigma: float, num_cells: int, device: torch.device) -> torch.Tensor:
    """The Gaussian of every bin as a sum of splines: coefficients (num_cells + 3, num_bins)."""
    with _disable_current_modes():  # while torch.export records, tensors have no values
        return _fitted_splines(num_bins, sigma, num_cells, device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept must also serve a graph
def _fitted_splines(num_bins: int, sigma: float, num_cells: int, device: torch.device) -> torch.Tensor:
    """Fitted by least squares on [0, 1]: the error is smallest where pixels can be; the ends need no conditions."""
    position = torch.linspace(0, num_cells, 2 * num_cells + 1, dtype=torch.float64)
    cell = position.long().clamp_(max=num_cells - 1)
    splines = position.new_zeros(len(position), num_cells + 3)
    for spline, weight in enumerate(_spline_weights(position - cell)):
        splines.scatter_(1, (cell + spline)[:, None], weight[:, None])
    bins = torch.linspace(0, num_cells, num_bins, dtype=torch.float64)
    gaussians = torch.exp(-0.5 * ((position[:, None] - bins) / (num_cells * sigma)) ** 2)
    return torch.linalg.lstsq(splines, gaussians).solution.float().to(device)


def _check_pixels(pixels: torch.Tensor, region_size: int) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise ValueError(f"`pixels` must be RGB images of shape (B, 3, H, W), got {tuple(pixels.shape)}.")
    if not pixels.is_floating_point():
        raise ValueError(f"`pixels` must be floating point in [-1, 1], got {pixels.dtype}.")
    height, width = pixels.shape[-2:]
    if height % region_size or width % region_size:
        raise ValueError(
            f"height and width of `pixels` must be multiples of {region_size}, the side of a region, got {height} and"
            f" {width}."
        )
    if can_be_read(pixels):
        low, high = torch.aminmax(pixels)
        if not (low >= -1 and high <= 1):  # written so that NaN fails it
            raise ValueError(f"`pixels` must lie in [-1, 1], got values from {low.item():.4g} to {high.item():.4g}.")


# ---------------------------------------------------------------------------------------------------------------------
# Thresholds: counted once on a data set, good for every ratio of grains
# ---------------------------------------------------------------------------------------------------------------------


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
