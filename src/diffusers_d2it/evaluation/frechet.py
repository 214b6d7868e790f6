# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Frechet distance between two normal distributions, the number behind FID, sFID and FD-DINOv2.

    d(a, b) = |m_a - m_b|^2 + tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2)

The last trace is the sum of the singular values of F^T G for any F and G with F F^T = A and G G^T = B: the eigenvalues
under its root are their squares. So no root of a matrix is formed, no complex number appears, and the arguments may
change places. Singular values are found to within float64's rounding of the largest, where eigenvalues of the product
A B would leave the root of that rounding, 1e-8, for each direction in which a covariance has nothing. Such
directions are the rule, not the exception, with fewer images than features.
"""

import math

import numpy as np
import torch
from scipy import linalg


# What sums in float32 leave of symmetry and of eigenvalues that should be zero, over the largest entry or eigenvalue.
# Beyond it the covariance is wrong, or too inexact for a root to mean anything.
_ROUNDING = 1e-6


def frechet_distance(
    mean_a: np.ndarray | torch.Tensor,
    covariance_a: np.ndarray | torch.Tensor,
    mean_b: np.ndarray | torch.Tensor,
    covariance_b: np.ndarray | torch.Tensor,
) -> float:
    """Frechet distance (squared 2-Wasserstein distance) of two normal distributions, in float64.

    Args:
        mean_a: (D,), float32 or float64.
        covariance_a: (D, D), symmetric and positive semi-definite; its rank may be lower than D.
        mean_b: (D,).
        covariance_b: (D, D).

    Returns:
        The distance. What rounding leaves below zero, at most some 1e-13 of the traces, is returned as zero.

    Raises:
        ValueError: an array has another shape or dtype, is not finite or so large that the distance is not; a
            covariance is not symmetric or has a negative eigenvalue, by more than float32 can explain.
    """
    mean_a, covariance_a = check_moments(mean_a, covariance_a, "`mean_a`", "`covariance_a`")
    mean_b, covariance_b = check_moments(mean_b, covariance_b, "`mean_b`", "`covariance_b`")
    if len(mean_a) != len(mean_b):
        raise ValueError(f"both sets must have as many features, got {len(mean_a)} and {len(mean_b)}.")
    product = _factor(covariance_a, "`covariance_a`").T @ _factor(covariance_b, "`covariance_b`")
    overlap = linalg.svdvals(product).sum() if product.size else 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.square(mean_a - mean_b).sum()
        distance = float(difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap)
    if not math.isfinite(distance):
        raise ValueError(f"the moments must be small enough for a distance in float64, it came out as {distance}.")
    return max(distance, 0.0)


def check_moments(
    mean: np.ndarray | torch.Tensor, covariance: np.ndarray | torch.Tensor, mean_name: str, covariance_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, the covariance exactly symmetric, after all checks but that of eigenvalues."""
    mean, covariance = _to_float64(mean, mean_name), _to_float64(covariance, covariance_name)
    if mean.ndim != 1 or not len(mean):
        raise ValueError(f"{mean_name} must be (D,) with D features, got {mean.shape}.")
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{covariance_name} must be {(len(mean), len(mean))}, as {mean_name} has {len(mean)} features, got"
            f" {covariance.shape}."
        )
    for values, name in ((mean, mean_name), (covariance, covariance_name)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(values))} NaN or Inf.")
    transposed = covariance.T
    asymmetry, largest = np.abs(covariance - transposed).max(), np.abs(covariance).max()
    if asymmetry > _ROUNDING * largest:
        raise ValueError(
            f"{covariance_name} must be symmetric, got entries that differ from their mirror image by up to"
            f" {asymmetry:.3g}, the largest being {largest:.3g}."
        )
    return mean, covariance / 2 + transposed / 2


def _to_float64(values: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    if str(values.dtype).removeprefix("torch.") not in ("float32", "float64"):
        raise ValueError(f"{name} must be float32 or float64, got {values.dtype}.")
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    return array.astype(np.float64)


def _factor(covariance: np.ndarray, name: str) -> np.ndarray:
    """F (D, r) with F F^T = covariance and r its rank, as far as float64 can tell."""
    try:
        return linalg.cholesky(covariance, lower=True)  # ten times as fast, and there is one if the rank is full
    except linalg.LinAlgError:
        eigenvalues, eigenvectors = linalg.eigh(covariance)
    lowest, highest = eigenvalues[0], eigenvalues[-1]
    if lowest < -_ROUNDING * max(highest, 0.0):
        raise ValueError(
            f"{name} must be positive semi-definite, got eigenvalues from {lowest:.3g} to {highest:.3g}: it is no"
            " covariance, or was summed with too few digits."
        )
    # Rounding is as likely above zero as below it, and its root is not small: neither is a direction of the data
    kept = eigenvalues > len(covariance) * np.finfo(np.float64).eps * highest
    return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])
