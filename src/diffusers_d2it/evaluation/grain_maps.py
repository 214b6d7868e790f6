# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How good grain maps are: their share of fine regions, their coherence, their agreement, errors by grain.

Shapes:
    N maps, h w sides of a map in regions, k grains
"""

import math

import torch
from scipy.stats import wasserstein_distance

from ..grains import check_grain_map, fine_share


def fine_ratio_error(predicted: torch.Tensor, real: torch.Tensor, num_grains: int) -> dict[str, float]:
    """How the fine shares of predicted maps differ from those of real maps.

    The sets need not be paired, nor of one size: compared are the mean share, and the distribution of the share over
    the images.

    Args:
        predicted: (N, h, w) int64, 0 = coarsest.
        real: (M, h, w) int64.
        num_grains: k; the finest grain is k - 1.

    Returns:
        "fine_share" and "fine_share_real", means over the images; "error", the first minus the second; "std" and
        "std_real", standard deviations over the images (population); "std_error", the first minus the second;
        "wasserstein", the 1-D Wasserstein distance between both distributions of the share: how far, on average, the
        shares of one set must be moved to become those of the other. It is at least the size of "error", and equal to
        it where one set is the other shifted.

    Raises:
        ValueError: maps of a wrong type, dtype, shape or value, or of two sizes.
    """
    _check_maps({"predicted": predicted, "real": real}, num_grains)
    if predicted.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"`predicted` and `real` must be maps of one size, got {_size(predicted)} and {_size(real)} regions."
        )
    shares, real_shares = (fine_share(maps, num_grains).double().cpu() for maps in (predicted, real))
    mean, real_mean = shares.mean().item(), real_shares.mean().item()
    std, real_std = shares.std(correction=0).item(), real_shares.std(correction=0).item()
    return {
        "fine_share": mean,
        "fine_share_real": real_mean,
        "error": mean - real_mean,
        "std": std,
        "std_real": real_std,
        "std_error": std - real_std,
        "wasserstein": float(wasserstein_distance(shares.numpy(), real_shares.numpy())),
    }


def map_accuracy(predicted: torch.Tensor, true: torch.Tensor, num_grains: int) -> dict[str, float]:
    """Share of regions that have the same grain in both maps of a pair, beside that of chance.

    Args:
        predicted: (N, h, w) int64, 0 = coarsest.
        true: (N, h, w) int64; map i belongs to map i of `predicted`.
        num_grains: k.

    Returns:
        "accuracy"; "chance", that of maps whose regions are drawn independently with the shares that the grains have
        over all of `predicted`: the sum over the grains of the share in one set times the share in the other;
        "above_chance", (accuracy - chance) / (1 - chance), 0 for chance and 1 for equal maps (Cohen's kappa): NaN if
        both sets hold one and the same grain.

    Raises:
        ValueError: maps of a wrong type, dtype, shape or value, or of two shapes.
    """
    _check_maps({"predicted": predicted, "true": true}, num_grains)
    if predicted.shape != true.shape:
        raise ValueError(
            f"`predicted` and `true` must have one shape, got {tuple(predicted.shape)} and {tuple(true.shape)}."
        )
    accuracy = (predicted == true.to(predicted.device)).double().mean().item()
    chance = (_shares(predicted, num_grains) * _shares(true, num_grains)).sum().item()
    return {"accuracy": accuracy, "chance": chance, "above_chance": _above(accuracy, chance)}


def spatial_coherence(maps: torch.Tensor, num_grains: int) -> dict[str, float]:
    """How often neighbouring regions have the same grain, beside chance.

    Chance is the same map with its regions in a random order. So only where regions stand counts, and not how many of
    them are fine in an image, or how much that differs from image to image: `fine_ratio_error` is about that.

    Args:
        maps: (N, h, w) int64, 0 = coarsest.
        num_grains: k.

    Returns:
        "agreement", the share of pairs of neighbours, to the right and below, with one grain; "chance", the same for
        two regions of a map drawn without replacement, n_g (n_g - 1) / (n (n - 1)) summed over the grains, mean over
        the maps; "coherence", (agreement - chance) / (1 - chance): 0 for independent regions, near 1 for few large
        patches, negative where equal grains avoid one another. Constant maps agree by chance too and weigh nothing;
        if all maps are constant, the coherence is 1 by convention.

    Raises:
        ValueError: maps of a wrong type, dtype, shape or value, or of a single region.
    """
    _check_maps({"maps": maps}, num_grains)
    num_regions = maps.shape[1] * maps.shape[2]
    if num_regions < 2:
        raise ValueError(f"`maps` must have two regions at least, to have neighbours, got {_size(maps)}.")
    right = (maps[:, :, 1:] == maps[:, :, :-1]).flatten()
    below = (maps[:, 1:] == maps[:, :-1]).flatten()
    agreement = torch.cat([right, below]).double().mean().item()
    counts = torch.stack([(maps == grain).sum(dim=(1, 2)) for grain in range(num_grains)]).double()  # (k, N)
    chance = (counts * (counts - 1)).sum(dim=0).mean().item() / (num_regions * (num_regions - 1))
    coherence = _above(agreement, chance)
    return {"agreement": agreement, "chance": chance, "coherence": 1.0 if math.isnan(coherence) else coherence}


def region_means(values: torch.Tensor, grain_map: torch.Tensor) -> torch.Tensor:
    """The mean of an image-like quantity over every region.

    Args:
        values: (N, C, h * R, w * R) with a whole number R: squared errors of pixels, of latent cells, ...
        grain_map: (N, h, w), for the size of a region.

    Returns:
        (N, h, w), float64.

    Raises:
        ValueError: `values` are not R times the map.
    """
    if values.ndim != 4 or grain_map.ndim != 3 or len(values) != len(grain_map):
        raise ValueError(
            f"`values` (N, C, H, W) and `grain_map` (N, h, w) must be of equally many images, got"
            f" {tuple(values.shape)} and {tuple(grain_map.shape)}."
        )
    rows, columns = grain_map.shape[1:]
    side = values.shape[2] // rows
    if side == 0 or values.shape[2:] != (rows * side, columns * side):
        raise ValueError(
            f"the sides of `values` must be a multiple of those of `grain_map`, got {tuple(values.shape[2:])} and"
            f" {(rows, columns)}."
        )
    per_region = values.double().unflatten(3, (columns, side)).unflatten(2, (rows, side))
    return per_region.mean(dim=(1, 3, 5))


def mean_by_grain(values: torch.Tensor, grain_map: torch.Tensor, num_grains: int) -> list[float]:
    """The mean of a value per region over all regions of a grain, of whichever image.

    Args:
        values: (N, h, w), one value for each region.
        grain_map: (N, h, w) int64, 0 = coarsest.
        num_grains: k.

    Returns:
        A mean for each grain, coarsest first: NaN where no region has it.

    Raises:
        ValueError: the map has a wrong type, dtype, shape or value, or the values another shape.
    """
    _check_maps({"grain_map": grain_map}, num_grains)
    if values.shape != grain_map.shape:
        raise ValueError(f"`values` must be one for each region, {tuple(grain_map.shape)}, got {tuple(values.shape)}.")
    values = values.double()
    return [values[grain_map == grain].mean().item() for grain in range(num_grains)]


def psnr_by_grain(
    pixels: torch.Tensor, reconstruction: torch.Tensor, grain_map: torch.Tensor, num_grains: int
) -> list[float]:
    """Peak signal-to-noise ratio of the regions of each grain: of their mean squared error, not a mean of ratios.

    Args:
        pixels: (N, 3, H, W) in [-1, 1].
        reconstruction: (N, 3, H, W); what lies beyond [-1, 1] is cut off, as in an image file.
        grain_map: (N, h, w) int64, 0 = coarsest.
        num_grains: k.

    Returns:
        dB for each grain, coarsest first: NaN where no region has it, infinity for regions without an error.

    Raises:
        ValueError: shapes do not fit one another, or the map has a wrong type, dtype or value.
    """
    if pixels.shape != reconstruction.shape:
        raise ValueError(
            f"`pixels` and `reconstruction` must have one shape, got {tuple(pixels.shape)} and"
            f" {tuple(reconstruction.shape)}."
        )
    squared_errors = (reconstruction.double().clamp(-1, 1) - pixels.double()).square()
    errors = mean_by_grain(region_means(squared_errors, grain_map), grain_map, num_grains)
    return [psnr_of_error(error) for error in errors]


def psnr_of_error(mean_squared_error: float) -> float:
    """dB of a mean squared error of pixels in [-1, 1]; infinity without an error, NaN of NaN."""
    if mean_squared_error == 0:
        return math.inf
    return 10 * math.log10(4 / mean_squared_error)


def _shares(maps: torch.Tensor, num_grains: int) -> torch.Tensor:
    """Share of each grain over all regions of all maps, (k,), float64."""
    return torch.bincount(maps.flatten(), minlength=num_grains).double().cpu() / maps.numel()


def _above(value: float, chance: float) -> float:
    """0 at chance, 1 at 1; NaN where chance is 1."""
    return (value - chance) / (1 - chance) if chance < 1 else math.nan


def _check_maps(maps: dict[str, torch.Tensor], num_grains: int) -> None:
    """Raise a ValueError that names the argument unless all are maps of `num_grains` grains."""
    if not isinstance(num_grains, int) or num_grains < 2:
        raise ValueError(f"`num_grains` must be a whole number, 2 or more, got {num_grains!r}.")
    for name, grain_map in maps.items():
        try:
            check_grain_map(grain_map, num_grains)
        except ValueError as error:
            raise ValueError(str(error).replace("`grain_map`", f"`{name}`")) from None


def _size(maps: torch.Tensor) -> str:
    return f"{maps.shape[1]}x{maps.shape[2]}"
