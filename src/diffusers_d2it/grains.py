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
from functools import lru_cache

import torch
from einops import rearrange, reduce, repeat


NUM_BINS = 256
SIGMA = 0.01
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, the single channel Y that Eq. 2 works on
_TAYLOR_ORDER = 4  # 4e-6 nats at this width of slots; 3 would leave 4e-5
_WIDEST_SLOT = 0.4  # in units of sigma
_KERNEL_REACH = 7  # in units of sigma: exp(-7 ** 2 / 2) = 2e-11
_BLOCK = 32  # bins computed by one row of the matrix product


# ---------------------------------------------------------------------------------------------------------------------
# From pixels to entropy (Eqs. 2-3)
# ---------------------------------------------------------------------------------------------------------------------


def region_entropy(
    pixels: torch.Tensor, region_size: int = 16, num_bins: int = NUM_BINS, sigma: float = SIGMA
) -> torch.Tensor:
    """Shannon entropy of the luma of every region, Eqs. 2-3 of arXiv:2504.09454.

    The density of Eq. 2 is a sum of Gaussians around the pixels of a region, evaluated at `num_bins` bins evenly
    spaced on [0, 1]. As printed it does not sum to one; it is divided by its sum before Eq. 3. The pixels are binned
    with the first moments of their distance to the bin, and the Gaussian is expanded around the bins: one small matrix
    product instead of `num_bins` exponentials a pixel, within 2e-5 nats of the direct sum.

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

    luma_weights = torch.tensor(LUMA_WEIGHTS, device=pixels.device)
    luma = torch.einsum("bchw,c->bhw", pixels, luma_weights) * 0.5 + 0.5  # (B, H, W) in [0, 1]
    # Pixels are counted in slots at most _WIDEST_SLOT apart: the bins b_j, and `finer - 1` slots between two of them.
    finer = math.ceil(1 / ((num_bins - 1) * sigma * _WIDEST_SLOT))
    num_steps = (num_bins - 1) * finer
    position = luma.clamp(0, 1) * num_steps  # the clamp only removes the rounding of the weighted sum
    nearest = position.round()
    offset = (position - nearest) / num_steps / sigma

    # Moments sum_i offset_i ** n of the pixels of each region in each slot, with empty slots on both sides.
    reach = math.ceil(_KERNEL_REACH * sigma * num_steps)
    num_blocks = math.ceil(num_bins / _BLOCK)
    num_slots = num_blocks * _BLOCK * finer + 2 * reach
    num_regions = batch * rows * columns
    region = torch.arange(num_regions, device=pixels.device).view(batch, rows, 1, columns, 1)
    slot = region * num_slots + reach + rearrange(nearest.long(), "b (r p) (c q) -> b r p c q", r=rows, c=columns)
    slot, offset = slot.flatten(), offset.flatten()
    terms = _TAYLOR_ORDER + 1
    moments = offset.new_zeros(num_regions * num_slots, terms)
    power = torch.ones_like(offset)
    for order in range(terms):
        moments[:, order].scatter_add_(0, slot, power)
        power = power * offset

    # Eq. 2: every block of bins sees the same stretch of the kernel, so the sum over pixels is one matrix product.
    kernel = _gaussian_taylor_terms(sigma * num_steps, finer, reach, pixels.device)
    window = _BLOCK * finer + 2 * reach
    windows = moments.view(num_regions, num_slots * terms).unfold(1, window * terms, _BLOCK * finer * terms)
    density = (windows @ kernel).flatten(1)[:, :num_bins].clamp_min_(0)  # (B * h * w, num_bins)
    density = density / density.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(density).sum(dim=-1)  # Eq. 3, with 0 log 0 = 0
    return entropy.view(batch, rows, columns)


@lru_cache(maxsize=8)
def _gaussian_taylor_terms(sigma: float, finer: int, reach: int, device: torch.device) -> torch.Tensor:
    """Taylor terms g^(n)(b_i - b_j) / n! of the kernel, from the slots of a window (times n) to a block of bins.

    `sigma` and `reach` are counted in slots, and a bin stands at every `finer`-th slot.
    """
    source = torch.arange(_BLOCK * finer + 2 * reach, dtype=torch.float64)[:, None, None] - reach
    target = torch.arange(_BLOCK, dtype=torch.float64) * finer
    u = (source - target) / sigma
    hermite = [torch.ones_like(u), -u]  # d^n/du^n exp(-u^2 / 2), over exp(-u^2 / 2)
    for n in range(1, _TAYLOR_ORDER):
        hermite.append(-u * hermite[n] - n * hermite[n - 1])
    factorial = torch.tensor([math.factorial(n) for n in range(_TAYLOR_ORDER + 1)])[:, None]
    return (torch.cat(hermite, dim=1) * torch.exp(-0.5 * u**2) / factorial).flatten(0, 1).float().to(device)


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


def check_fine_ratio(fine_ratio: float) -> None:
    """Raise a ValueError unless `fine_ratio` is a number in [0, 1]."""
    if not isinstance(fine_ratio, numbers.Real) or not 0 <= fine_ratio <= 1:
        raise ValueError(f"`fine_ratio` must be a number in [0, 1], got {fine_ratio!r}.")


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
    return merge(split(latents, grain_map), grain_map)


def average_codes(latents: torch.Tensor, grain_map: torch.Tensor, grain: int) -> torch.Tensor:
    """Give the cells of every code of one grain their mean; other regions stay as they are.

    For predictions, where the mean is the best single value of a code; samples and noise are tied by `tie`.
    """
    cells = cells_per_region(latents, grain_map)
    side = cells >> grain
    if side == 1:
        return latents
    means = reduce(latents, "b c (h p) (w q) -> b c h w", "mean", p=side, q=side)
    means = repeat(means, "b c h w -> b c (h p) (w q)", p=side, q=side)
    return torch.where(grain_map_to_cells(grain_map, cells)[:, None] == grain, means, latents)


def check_tied(latents: torch.Tensor, grain_map: torch.Tensor) -> None:
    """Raise a ValueError unless every coarse code of `latents` has one value over its cells."""
    # Compared as numbers-or-NaN: a NaN is another fault and is reported elsewhere.
    tied = tie(latents, grain_map)
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
