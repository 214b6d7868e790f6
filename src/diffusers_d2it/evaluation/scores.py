# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Scores of sets of images from features or logits: Frechet distance, Inception Score, top-1 accuracy, KID, precision
and recall.

Sets are tensors in float32 or float64, or of the Frechet distance mean and covariance. A ValueError says which one has
another shape or dtype, too few images, or values that are not finite or too large, and which number is too small.

Shapes:
    B images of a batch, N M images of two sets, D features, K classes
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import linalg

from ..words import listed


Moments = tuple[torch.Tensor, torch.Tensor]  # a mean (D,) and a covariance (D, D), float64

_SHUFFLE_SEED = 2020  # of torch-fidelity, so that its splits are these
# What sums in float32 leave of symmetry and of eigenvalues that should be zero, over the largest entry or eigenvalue.
# Beyond it the covariance is wrong, or too inexact for a root to mean anything.
_ROUNDING = 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Mean and covariance
# ---------------------------------------------------------------------------------------------------------------------


class FeatureStatistics:
    """Mean and covariance of D features in float64, whatever the number of images, in memory for one D x D matrix.

    Each batch is joined by its own mean and its squares about that mean (Chan, Golub and LeVeque, 1979), so that no
    large numbers cancel: batch size, order and number of processes change the last digits of float64 only.
    """

    def __init__(self, num_features: int):
        self.num_features, self.num_images = num_features, 0
        self._mean = torch.zeros(num_features, dtype=torch.float64)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)  # squares about the mean, summed

    def update(self, features: torch.Tensor, indices: torch.Tensor | None = None) -> None:
        """Add the features (B, D) of some images, float32 or float64; B may be 0, `indices` (B,) names them.

        Raises:
            ValueError: another shape or dtype, or a value that is not finite; nothing is added then.
        """
        check_features(features, indices, self.num_features)
        if len(features):
            features = features.detach().to("cpu", torch.float64)
            mean = features.mean(dim=0)
            centred = features - mean
            self._scatter.addmm_(centred.T, centred)
            self._join(len(features), mean)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the statistics of other images, of as many features."""
        if other.num_images:
            self._scatter += other._scatter
            self._join(other.num_images, other._mean)

    def _join(self, num_images: int, mean: torch.Tensor) -> None:
        """Take up the mean of other images, and the squares between the two means."""
        total, difference = self.num_images + num_images, mean - self._mean
        self._scatter.addr_(difference, difference, alpha=self.num_images / total * num_images)
        self._mean += difference * (num_images / total)
        self.num_images = total

    @property
    def moments(self) -> Moments:
        """Mean (D,) and covariance (D, D), float64, divided by the number of images less one as published scripts do.

        Raises:
            ValueError: there are fewer than two images.
        """
        if self.num_images < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.num_images}.")
        scatter = (self._scatter + self._scatter.T) / 2  # a product is symmetric but for rounding
        return self._mean.clone(), scatter / (self.num_images - 1)


def frechet_distance(
    mean_a: np.ndarray | torch.Tensor,
    covariance_a: np.ndarray | torch.Tensor,
    mean_b: np.ndarray | torch.Tensor,
    covariance_b: np.ndarray | torch.Tensor,
) -> float:
    """Frechet distance (squared 2-Wasserstein distance) of two normal distributions: of FID, sFID and FD-DINOv2.

        d(a, b) = |m_a - m_b|^2 + tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2)

    The last trace is the sum of the singular values of F^T G for any F and G with F F^T = A and G G^T = B: the
    eigenvalues under its root are their squares. So no root of a matrix is formed, and the arguments may change
    places. Singular values are found to within float64's rounding of the largest, where eigenvalues of the product A B
    would leave the root of that rounding, 1e-8, for each direction in which a covariance has nothing: the rule with
    fewer images than features.

    Means are (D,), covariances (D, D), symmetric and positive semi-definite; their rank may be lower than D. What
    rounding leaves below zero, at most some 1e-13 of the traces, is returned as zero.

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


# ---------------------------------------------------------------------------------------------------------------------
# All features, or logits
# ---------------------------------------------------------------------------------------------------------------------


def inception_score(logits: torch.Tensor, num_splits: int = 10) -> tuple[float, float]:
    """exp of the mean Kullback-Leibler divergence between p(class | image) and p(class) (Salimans et al., 2016).

    A fixed permutation, that of torch-fidelity, deals the images to the splits: images of one class may lie side by
    side in a folder.

    Args:
        logits: (N, K), in the order of the set.
        num_splits: parts that are scored by themselves.

    Returns:
        Mean and standard deviation (divided by their number) of the scores of the splits.
    """
    _check_numbers(1, num_splits=num_splits)
    _check_sets({"logits": logits}, num_splits, f"an Inception Score over {num_splits} splits")
    # The stream of RandomState is frozen for ever, that of numpy's newer generators is not
    order = torch.from_numpy(np.random.RandomState(_SHUFFLE_SEED).permutation(len(logits)))
    scores = []
    for split in range(num_splits):
        part = order[split * len(logits) // num_splits : (split + 1) * len(logits) // num_splits]
        log_probabilities = logits[part].double().log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        log_likelihood = (probabilities * log_probabilities).sum() / len(part)
        scores.append((log_likelihood + torch.special.entr(probabilities.mean(dim=0)).sum()).exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def top1_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Share of images that a classifier finds in their class, where it has only the classes of the set to choose from.

    Args:
        logits: (N, K).
        labels: classes (N,) int64, columns of the logits.

    Returns:
        The share, and its standard error as that of independent images.
    """
    _check_sets({"logits": logits}, 1, "a top-1 accuracy")
    classes = labels.unique()
    if classes[0] < 0 or classes[-1] >= logits.shape[1]:
        raise ValueError(f"`labels` must be below the {logits.shape[1]} classes, got {classes[0]} to {classes[-1]}.")
    share = classifies(logits, labels, classes).double().mean().item()
    return share, (share * (1 - share) / len(labels)) ** 0.5


def classifies(logits: torch.Tensor, labels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Whether of the logits (N, K) of some classes that of the label (N,) is the largest: (N,) bool."""
    return classes[logits[:, classes].argmax(dim=1)] == labels


def kernel_distance(
    a: torch.Tensor, b: torch.Tensor, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, the KID of Binkowski et al., 2018.

    Each subset gives the unbiased estimate for so many images of either set, drawn without repetition. The subsets are
    those of torch-fidelity for the same seed, whose own is 2020.

    Args:
        a, b: features of two sets, (N, D) and (M, D).
        subset_size: images of each set in a subset.
        num_subsets: how many are averaged.
        seed: of the draws.

    Returns:
        Mean and standard deviation (divided by their number) over the subsets. The mean may be slightly below zero
        for sets that are alike.
    """
    _check_numbers(2, subset_size=subset_size)
    _check_numbers(1, num_subsets=num_subsets)
    _check_sets({"a": a, "b": b}, subset_size, f"a kernel distance over subsets of {subset_size}")
    generator = np.random.RandomState(seed)
    estimates = []
    for _ in range(num_subsets):
        rows = [np.sort(generator.choice(len(one), subset_size, replace=False)) for one in (a, b)]
        estimates.append(_unbiased_discrepancy(a[rows[0]].double(), b[rows[1]].double()))
    _check_finite(torch.tensor(estimates), "a` and `b")
    return float(np.mean(estimates)), float(np.std(estimates))


def _unbiased_discrepancy(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of as many rows (n, D) each: the mean kernel within the sets, a row with itself left out, less that between."""
    within = sum(_kernel(x, x).fill_diagonal_(0).sum() for x in (a, b)) / (len(a) * (len(a) - 1))
    return (within - 2 * _kernel(a, b).mean()).item()


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


def precision_recall(
    real: torch.Tensor, fake: torch.Tensor, k: int = 3, block_size: int = 2048
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019).

    A ball lies around each image of a set and reaches to its k-th nearest other image of that set. Precision is the
    share of fake images inside a ball of a real one, recall that of real images inside a ball of a fake one. Balls are
    closed: an image at their edge, or a copy where they have no extent, is inside as far as float64 can tell.

    Args:
        real, fake: features (N, D) and (M, D).
        k: neighbours; an image is not its own, a copy of it is.
        block_size: rows of either set that are compared at once. Memory grows with its square, not with N or M.

    Returns:
        Precision and recall in [0, 1].
    """
    _check_numbers(1, k=k, block_size=block_size)
    _check_sets({"real": real, "fake": fake}, k + 1, f"precision and recall with k = {k}")
    # Distances do not change under a shift, and of smaller numbers less is lost
    shift = real[:block_size].double().mean(dim=0)
    radii_real = _squared_radii(real, "real", k, block_size, shift)
    radii_fake = _squared_radii(fake, "fake", k, block_size, shift)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=shift.device)
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=shift.device)
    for rows, some_real in _blocks(real, block_size, shift):
        for columns, some_fake in _blocks(fake, block_size, shift):
            lowest = _squared_distances(some_real, some_fake, rounding=-1)
            fake_inside[columns] |= (lowest <= radii_real[rows, None]).any(dim=0)
            real_inside[rows] |= (lowest <= radii_fake[columns]).any(dim=1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def _squared_radii(features: torch.Tensor, name: str, k: int, block_size: int, shift: torch.Tensor) -> torch.Tensor:
    """(N,): squared distance of each row to its k-th nearest other row."""
    radii = shift.new_empty(len(features))
    for rows, some in _blocks(features, block_size, shift):
        nearest = some.new_full((len(some), k), torch.inf)
        for columns, others in _blocks(features, block_size, shift):
            squared = _squared_distances(some, others)
            if rows == columns:
                squared.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squared], dim=1).topk(k, largest=False).values
        radii[rows] = nearest[:, -1]
    _check_finite(radii, name)
    return radii


def _squared_distances(a: torch.Tensor, b: torch.Tensor, rounding: int = 0) -> torch.Tensor:
    """Squared distances (A, B) of rows, moved by `rounding` times what the subtraction of large numbers may lose."""
    squares = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    bound = 4 * (a.shape[1] + 2) * torch.finfo(torch.float64).eps  # for each of the two distances that are compared
    return squares.mul_(1 + rounding * bound).addmm_(a, b.T, alpha=-2)


def _blocks(features: torch.Tensor, block_size: int, shift: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    for start in range(0, len(features), block_size):
        rows = slice(start, min(start + block_size, len(features)))
        yield rows, features[rows].double() - shift


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def check_features(
    features: torch.Tensor, indices: torch.Tensor | None = None, width: int | None = None, name: str = "features"
) -> None:
    """Raise a ValueError unless features are (B, D), float32 or float64, and finite; `indices` (B,) names images."""
    if features.ndim != 2 or features.shape[1] != (width or features.shape[1]) or not features.shape[1]:
        raise ValueError(f"`{name}` must be (B, {width or 'D'}), got {tuple(features.shape)}.")
    if features.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`{name}` must be float32 or float64, got {features.dtype}.")
    wrong = (~features.isfinite().all(dim=1)).nonzero().flatten().cpu()
    if len(wrong):
        numbers = (wrong if indices is None else indices.cpu()[wrong]).tolist()
        raise ValueError(f"`{name}` must be finite, those of images {listed(numbers, most=8)} are not.")


def _check_numbers(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"`{name}` must be at least {least}, got {number}.")


def _check_sets(sets: dict[str, torch.Tensor], num_images: int, purpose: str) -> None:
    for name, features in sets.items():
        check_features(features, name=name)
        if len(features) < num_images:
            raise ValueError(f"{purpose} needs at least {num_images} images, got {len(features)} in `{name}`.")
    widths = [features.shape[1] for features in sets.values()]
    if len(set(widths)) > 1:
        raise ValueError(f"both sets must have as many features, got {widths[0]} and {widths[1]}.")


def _check_finite(values: torch.Tensor, name: str) -> None:
    if not values.isfinite().all():
        raise ValueError(f"features of `{name}` must be small enough for their squares in float64, they overflow.")
