# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Dynamic Grained Coding (sec. 3.1, arXiv:2504.09454) as pure tensor functions.

Grains are numbered here, once for the package: 0 is the coarsest, ``k - 1`` the finest, the order of the latents'
resolution. (The paper sorts its factors from fine to coarse, ``f_1 < f_2``, and numbers its
maps from coarse to fine, ``1 < 2``; one order is enough.)

Shapes:
    B batch, C latent channels, H W image height and width in pixels, S region side in pixels (the largest factor)
    k number of grains, h w height and width of the grain map: h = H / S, w = W / S
    R cells per region side at the finest grain: R = 2 ** (k - 1); latents are (B, C, h * R, w * R)
"""

import math
import numbers
from collections.abc import Iterator
from functools import lru_cache

import torch
from einops import repeat


NUM_BINS = 256
SIGMA = 0.01
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, the single channel Y that Eq. 2 works on
_CELLS_PER_SIGMA = 4  # of the grid of splines; entropy is then within 1e-5 nats
_BLOCK = 64  # bins computed by one matrix product


# ---------------------------------------------------------------------------------------------------------------------
# From pixels to entropy (Eqs. 2-3)
# ---------------------------------------------------------------------------------------------------------------------


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
    cell = position.long().clamp_(max=num_cells - 1)  # (B, H, W)
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
    blocks = _gaussians_as_splines(num_bins, sigma, num_cells, pixels.device)
    density = torch.cat([histogram[:, splines] @ coefficients for splines, coefficients in blocks], dim=1)
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


@lru_cache(maxsize=8)
def _gaussians_as_splines(
    num_bins: int, sigma: float, num_cells: int, device: torch.device
) -> list[tuple[slice, torch.Tensor]]:
    """The Gaussian of every bin as a sum of splines, block by block: the splines that matter, their coefficients.

    Fitted by least squares on [0, 1]: the error is smallest where pixels can be, and the ends need no conditions.
    """
    position = torch.linspace(0, num_cells, 2 * num_cells + 1, dtype=torch.float64)
    cell = position.long().clamp_(max=num_cells - 1)
    splines = position.new_zeros(len(position), num_cells + 3)
    for spline, weight in enumerate(_spline_weights(position - cell)):
        splines.scatter_(1, (cell + spline)[:, None], weight[:, None])
    bins = torch.linspace(0, num_cells, num_bins, dtype=torch.float64)
    gaussians = torch.exp(-0.5 * ((position[:, None] - bins) / (num_cells * sigma)) ** 2)
    coefficients = torch.linalg.lstsq(splines, gaussians).solution  # (num_cells + 3, num_bins)

    blocks = []
    for block in coefficients.split(_BLOCK, dim=1):
        matter = (block.abs() > 1e-11).any(dim=1).nonzero().flatten().tolist()
        reach = slice(matter[0], matter[-1] + 1)
        blocks.append((reach, block[reach].float().to(device)))
    return blocks


def _check_pixels(pixels: torch.Tensor, region_size: int) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise ValueError(f"`pixels` must be RGB images of shape (B, 3, H, W), got {tuple(pixels.shape)}.")
    if not pixels.is_floating_point():
        raise ValueError(f"`pixels` must be floating point in [-1, 1], got {pixels.dtype}.")
    height, width = pixels.shape[-2:]
    if height % region_size or width % region_size:
        raise ValueError(
            f"the sides of `pixels` must be multiples of the region size {region_size}, got {height}x{width}."
        )
    low, high = torch.aminmax(pixels)
    if not (low >= -1 and high <= 1):  # written so that NaN fails it
        raise ValueError(f"`pixels` must lie in [-1, 1], got values from {low.item():.4g} to {high.item():.4g}.")


# ---------------------------------------------------------------------------------------------------------------------
# From entropy to the grain map
# ---------------------------------------------------------------------------------------------------------------------


def grain_map_from_entropy(entropy: torch.Tensor, thresholds: list[float]) -> torch.Tensor:
    """The grain of every region: a region is finer than grain i when its entropy exceeds threshold T_i (sec. 3.1).

    Args:
        entropy: (B, h, w), nats.
        thresholds: T_0 <= ... <= T_{k-2}, nats, from a data set and never from the batch.

    Returns:
        Grain map (B, h, w), int64, 0 = coarsest.
    """
    return sum((entropy > threshold).long() for threshold in thresholds)


def check_fine_ratio(fine_ratio: float, name: str = "fine_ratio") -> None:
    """Raise a ValueError that names the argument unless it is a number in [0, 1]."""
    if not isinstance(fine_ratio, numbers.Real) or not 0 <= fine_ratio <= 1:
        raise ValueError(f"`{name}` must be a number in [0, 1], got {fine_ratio!r}.")


def check_grain_map(grain_map: torch.Tensor, num_grains: int) -> None:
    """Raise a ValueError unless `grain_map` is an int64 (B, h, w) tensor with values 0 ... num_grains - 1."""
    if not isinstance(grain_map, torch.Tensor):
        raise ValueError(f"`grain_map` must be a torch.Tensor, got {type(grain_map).__name__}.")
    if grain_map.dtype != torch.int64:
        raise ValueError(f"`grain_map` must be int64, got {grain_map.dtype}.")
    if grain_map.ndim != 3 or 0 in grain_map.shape:
        raise ValueError(f"`grain_map` must have shape (B, h, w), got {tuple(grain_map.shape)}.")
    low, high = torch.aminmax(grain_map)
    if low < 0 or high >= num_grains:
        raise ValueError(
            f"`grain_map` must hold grains 0 (coarsest) to {num_grains - 1} (finest), got values from {low.item()} to"
            f" {high.item()}."
        )


def cells_per_region(latents: torch.Tensor, grain_map: torch.Tensor) -> int:
    """R, the number of finest cells along one side of a region, from the shapes of latents and map.

    Raises:
        ValueError: batch sizes differ, or the latents are not R times the map with R a power of two.
    """
    height, width = latents.shape[-2:]
    rows, columns = grain_map.shape[-2:]
    cells = height // rows
    if (height, width) != (rows * cells, columns * cells) or cells & (cells - 1) or cells == 0:
        raise ValueError(
            f"latents of {height}x{width} cells do not match a `grain_map` of {rows}x{columns} regions: the sides must"
            " differ by one power of two."
        )
    if len(latents) != len(grain_map):
        raise ValueError(f"latents and `grain_map` must have one batch size, got {len(latents)} and {len(grain_map)}.")
    return cells


# ---------------------------------------------------------------------------------------------------------------------
# Latents with grains: every region holds 4 ** grain codes, each copied over its cells ("neighbor copying", sec. 3.1)
# ---------------------------------------------------------------------------------------------------------------------


def grain_map_to_cells(grain_map: torch.Tensor, cells: int) -> torch.Tensor:
    """Copy the grain of every region to its cells: (B, h, w) -> (B, h * cells, w * cells)."""
    return repeat(grain_map, "b h w -> b (h p) (w q)", p=cells, q=cells)


def merge(codes: list[torch.Tensor], grain_map: torch.Tensor) -> torch.Tensor:
    """Take each region from the codes of its grain, coarser codes copied to the finest grid.

    Args:
        codes: one tensor per grain, coarsest first: (B, C, h, w), (B, C, 2h, 2w), ... (B, C, hR, wR).
        grain_map: (B, h, w).

    Returns:
        Latents (B, C, hR, wR).
    """
    cells = cells_per_region(codes[-1], grain_map)
    grain_of_cell = grain_map_to_cells(grain_map, cells)[:, None]  # (B, 1, hR, wR)
    latents = codes[-1]
    for grain, code in enumerate(codes[:-1]):
        copies = cells >> grain
        copied = repeat(code, "b c h w -> b c (h p) (w q)", p=copies, q=copies)
        latents = torch.where(grain_of_cell == grain, copied, latents)
    return latents


def split(latents: torch.Tensor, grain_map: torch.Tensor) -> list[torch.Tensor]:
    """The codes of each grain, coarsest first, the inverse of `merge`: `merge(split(z, m), m) == z` for tied z.

    A code is read at its top-left cell. Entries of regions that have another grain hold that region's cell and are
    ignored by `merge`.
    """
    cells = cells_per_region(latents, grain_map)
    num_grains = cells.bit_length()
    return [latents[..., :: cells >> grain, :: cells >> grain] for grain in range(num_grains)]


def tie(latents: torch.Tensor, grain_map: torch.Tensor) -> torch.Tensor:
    """Give every code one value: each cell takes the value of the top-left cell of its code.

    Schedulers step element by element and draw independent noise, so one cell of a coarse code follows exactly the
    process that the whole code should follow. A mean over the cells would shrink the variance of the noise to a
    quarter, and untied cells drift apart without bound, as no network ever predicts their difference.

    Args:
        latents: (B, C, hR, wR), latents or noise.
        grain_map: (B, h, w).
    """
    cells = cells_per_region(latents, grain_map)
    for grain in range(cells.bit_length() - 1):
        codes, chosen = _codes_of_grain(latents, grain_map, cells, grain)
        latents = torch.where(chosen, codes[:, :, :, :1, :, :1], codes).reshape(latents.shape)
    return latents


def average_codes(latents: torch.Tensor, grain_map: torch.Tensor, grain: int) -> torch.Tensor:
    """Give the cells of every code of one grain their mean; other regions stay as they are.

    For predictions, where the mean is the best single value of a code; samples and noise are tied by `tie`.
    """
    cells = cells_per_region(latents, grain_map)
    if cells >> grain == 1:
        return latents
    codes, chosen = _codes_of_grain(latents, grain_map, cells, grain)
    return torch.where(chosen, codes.mean(dim=(3, 5), keepdim=True), codes).reshape(latents.shape)


def _codes_of_grain(
    latents: torch.Tensor, grain_map: torch.Tensor, cells: int, grain: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents as (B, C, rows, side, columns, side) of the codes that a grain has, and where it is the grain, as a mask
    that broadcasts to them.
    """
    side = cells >> grain
    codes = latents.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
    chosen = grain_map == grain
    if grain > 0:
        chosen = grain_map_to_cells(chosen, 1 << grain)
    return codes, chosen[:, None, :, None, :, None]


def check_tied(latents: torch.Tensor, grain_map: torch.Tensor) -> None:
    """Raise a ValueError unless every coarse code of `latents` has one value over its cells."""
    tied = tie(latents, grain_map)
    if torch.equal(latents, tied):
        return
    # Compared as numbers-or-NaN: a NaN is another fault and is reported elsewhere.
    if not torch.equal(torch.nan_to_num(latents), torch.nan_to_num(tied)):
        raise ValueError(
            "latents differ inside a coarse region. Multi-grained diffusion keeps one value for each code: pass noise"
            " through `diffusers_d2it.grains.tie(noise, grain_map)`, and the sample again after every scheduler step."
        )


def code_weights(grain_map: torch.Tensor, num_grains: int) -> torch.Tensor:
    """Share of a code that one cell of each region holds: 1 / 4 ** (k - 1 - grain), the alpha of Eq. 11.

    Args:
        grain_map: (B, h, w) or its cells (B, hR, wR).

    Returns:
        float32 weights of the same shape; over the cells of one code they sum to one.
    """
    return 0.25 ** (num_grains - 1 - grain_map).float()


def fine_share(grain_map: torch.Tensor, num_grains: int) -> torch.Tensor:
    """Share of regions in the finest grain, per image: (B, h, w) -> (B,), float32 in [0, 1]."""
    return (grain_map == num_grains - 1).float().mean(dim=(-2, -1))
