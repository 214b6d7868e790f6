# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Scores of sets of images from features or logits: Inception Score, top-1 accuracy, KID, precision and recall.

Sets are tensors in float32 or float64. A ValueError says which one has another shape or dtype, too few images, or
values that are not finite or too large, and which number is too small.

Shapes:
    N M images of two sets, D features, K classes
"""

from collections.abc import Iterator

import numpy as np
import torch

from .statistics import check_features


_SHUFFLE_SEED = 2020  # of torch-fidelity, so that its splits are these


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
