# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Scores of sets of images from their features or logits: Inception Score, KID, precision and recall."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator

from .feature_bank import FeatureBank, ImageTally, check_features


Features = torch.Tensor | np.ndarray | FeatureBank

_SHUFFLE_SEED = 2020  # of torch-fidelity, so that its splits are these


class InceptionScore:
    """exp of the mean Kullback-Leibler divergence between p(class | image) and p(class) (Salimans et al., 2016).

        score = InceptionScore(len(images))
        for indices, pixels in batches:
            score.update(features(pixels)["logits"], indices)
        mean, std = score.compute()

    The images are dealt to the splits by a fixed permutation of their indices, that of torch-fidelity: neither the
    order in which they arrive counts, nor that images of one class may lie beside one another in a folder.

    Args:
        num_images: N, of the whole set.
        num_splits: parts that are scored by themselves.

    Raises:
        ValueError: `num_splits` is not positive, or there are fewer images than splits.
    """

    def __init__(self, num_images: int, num_splits: int = 10):
        if num_splits < 1:
            raise ValueError(f"`num_splits` must be at least 1, got {num_splits}.")
        if num_images < num_splits:
            raise ValueError(
                f"an Inception Score over {num_splits} splits needs at least {num_splits} images, got {num_images}."
            )
        self.num_images = num_images
        self.num_splits = num_splits
        self._tally = ImageTally(num_images)
        # The stream of RandomState is frozen for ever, that of numpy's newer generators is not
        order = np.random.RandomState(_SHUFFLE_SEED).permutation(num_images)
        position = torch.empty(num_images, dtype=torch.int64)
        position[torch.from_numpy(order)] = torch.arange(num_images)
        self._split = ((position + 1) * num_splits - 1) // num_images  # split s ends before s * N // num_splits
        self._probabilities = torch.zeros(num_splits, 0, dtype=torch.float64)  # (S, K) sums over the images of a split
        self._log_likelihood = torch.zeros(num_splits, dtype=torch.float64)  # of p log p, over classes too

    def update(self, logits: torch.Tensor, indices: torch.Tensor) -> None:
        """Add some images.

        Args:
            logits: (B, K), float32 or float64.
            indices: (B,), int64, which images they are of.

        Raises:
            ValueError: another shape or dtype, a value that is not finite, an index outside the set or one that came
                before; nothing is added then.
        """
        check_features(logits, indices, self._probabilities.shape[1] or None)
        self._tally.add(indices)
        if not len(logits):
            return
        if not self._probabilities.shape[1]:
            self._probabilities = self._probabilities.new_zeros(self.num_splits, logits.shape[1])
        log_probabilities = logits.detach().to("cpu", torch.float64).log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        split = self._split[indices.cpu()]
        self._probabilities.index_add_(0, split, probabilities)
        self._log_likelihood.index_add_(0, split, (probabilities * log_probabilities).sum(dim=1))

    def merge(self, other: "InceptionScore") -> None:
        """Add other images of the same set.

        Raises:
            ValueError: the sets, splits or classes differ, or both have an image.
        """
        if (other.num_images, other.num_splits) != (self.num_images, self.num_splits):
            raise ValueError(
                f"both scores must be of one set, got {self.num_images} images in {self.num_splits} splits and"
                f" {other.num_images} in {other.num_splits}."
            )
        classes = {score._probabilities.shape[1] for score in (self, other)} - {0}
        if len(classes) > 1:
            raise ValueError(f"both scores must have as many classes, got {min(classes)} and {max(classes)}.")
        self._tally.merge(other._tally)
        if other._probabilities.shape[1]:
            sums = self._probabilities if self._probabilities.shape[1] else 0.0
            self._probabilities = sums + other._probabilities
            self._log_likelihood = self._log_likelihood + other._log_likelihood

    def gathered(self, accelerator: Accelerator) -> "InceptionScore":
        """The score of the images of all processes, the same on each; all must call it, one without images too.

        Raises:
            ValueError: processes have other numbers of classes.
        """
        total = InceptionScore(self.num_images, self.num_splits)
        num_classes = torch.tensor([self._probabilities.shape[1]], device=accelerator.device)
        classes = set(accelerator.gather(num_classes).tolist()) - {0}
        if len(classes) > 1:
            raise ValueError(f"all processes must have as many classes, got {sorted(classes)}.")
        sums = self._probabilities
        if classes and not sums.shape[1]:
            sums = sums.new_zeros(self.num_splits, *classes)
        sums = torch.cat([sums, self._log_likelihood[:, None]], dim=1)
        if accelerator.num_processes > 1:  # some devices have no float64
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        total._probabilities, total._log_likelihood = sums[:, :-1].clone(), sums[:, -1].clone()
        total._tally = self._tally.gathered(accelerator)
        return total

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation (divided by their number) of the scores of the splits.

        Raises:
            ValueError: an image is missing, or came from two processes.
        """
        self._tally.check_complete()
        counts = torch.bincount(self._split, minlength=self.num_splits)
        marginal = self._probabilities / counts[:, None]
        scores = (self._log_likelihood / counts + torch.special.entr(marginal).sum(dim=1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distance
# ---------------------------------------------------------------------------------------------------------------------


def kernel_distance(
    a: Features, b: Features, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, the KID of Binkowski et al., 2018.

    Each subset gives the unbiased estimate for so many images of either set, drawn without repetition. Memory is that
    of a subset. The subsets are those of torch-fidelity for the same seed, whose own is 2020.

    Args:
        a: features of one set, (N, D).
        b: features of the other, (M, D).
        subset_size: images of each set in a subset.
        num_subsets: how many are averaged.
        seed: of the draws.

    Returns:
        Mean and standard deviation (divided by their number) over the subsets. The mean may be slightly below zero
        for sets that are alike.

    Raises:
        ValueError: a set has too few images, another shape or dtype, or values that are not finite; a number is too
            small.
    """
    if subset_size < 2 or num_subsets < 1:
        raise ValueError(
            f"`subset_size` must be at least 2 and `num_subsets` at least 1, got {subset_size} and {num_subsets}."
        )
    _check_sets({"a": a, "b": b}, subset_size, f"a kernel distance over subsets of {subset_size}")
    generator = np.random.RandomState(seed)
    estimates = []
    for _ in range(num_subsets):
        rows = [generator.choice(len(features), subset_size, replace=False) for features in (a, b)]
        estimates.append(_unbiased_discrepancy(_read(a, np.sort(rows[0]), "a"), _read(b, np.sort(rows[1]), "b")))
    _check_finite(torch.tensor(estimates), "a` and `b")
    return float(np.mean(estimates)), float(np.std(estimates))


def _unbiased_discrepancy(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of as many rows (n, D) each: the mean kernel within the sets, a row with itself left out, less that between."""
    within = sum(_kernel(x, x).fill_diagonal_(0).sum() for x in (a, b)) / (len(a) * (len(a) - 1))
    return (within - 2 * _kernel(a, b).mean()).item()


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall
# ---------------------------------------------------------------------------------------------------------------------


def precision_recall(real: Features, fake: Features, k: int = 3, block_size: int = 2048) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019).

    A ball lies around each image of a set and reaches to its k-th nearest other image of that set. Precision is the
    share of fake images inside a ball of a real one, recall that of real images inside a ball of a fake one. Balls are
    closed: an image at their edge, or a copy where they have no extent, is inside as far as float64 can tell.

    Args:
        real: features (N, D).
        fake: features (M, D).
        k: neighbours; an image is not its own, a copy of it is.
        block_size: rows of either set that are compared at once. Memory grows with its square, not with N or M.

    Returns:
        Precision and recall in [0, 1].

    Raises:
        ValueError: a set has too few images, another shape or dtype, or values that are not finite; a number is too
            small.
    """
    if k < 1 or block_size < 1:
        raise ValueError(f"`k` and `block_size` must be at least 1, got {k} and {block_size}.")
    _check_sets({"real": real, "fake": fake}, k + 1, f"precision and recall with k = {k}")
    # Distances do not change under a shift, and of smaller numbers less is lost
    shift = _read(real, slice(0, min(block_size, len(real))), "real").mean(dim=0)
    radii_real = _squared_radii(real, "real", k, block_size, shift)
    radii_fake = _squared_radii(fake, "fake", k, block_size, shift)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=shift.device)
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=shift.device)
    for rows, some_real in _blocks(real, "real", block_size, shift):
        for columns, some_fake in _blocks(fake, "fake", block_size, shift):
            lowest = _squared_distances(some_real, some_fake, rounding=-1)
            fake_inside[columns] |= (lowest <= radii_real[rows, None]).any(dim=0)
            real_inside[rows] |= (lowest <= radii_fake[columns]).any(dim=1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def _squared_radii(features: Features, name: str, k: int, block_size: int, shift: torch.Tensor) -> torch.Tensor:
    """(N,): squared distance of each row to its k-th nearest other row."""
    radii = shift.new_empty(len(features))
    for rows, some in _blocks(features, name, block_size, shift):
        nearest = some.new_full((len(some), k), torch.inf)
        for columns, others in _blocks(features, name, block_size, shift):
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


def _blocks(
    features: Features, name: str, block_size: int, shift: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    for start in range(0, len(features), block_size):
        rows = slice(start, min(start + block_size, len(features)))
        yield rows, _read(features, rows, name) - shift


# ---------------------------------------------------------------------------------------------------------------------
# Sets of features
# ---------------------------------------------------------------------------------------------------------------------


def _check_sets(sets: dict[str, Features], num_images: int, purpose: str) -> None:
    """Raise a ValueError unless both sets are (N, D) with one D and have enough images."""
    for name, features in sets.items():
        if len(features.shape) != 2 or not features.shape[1]:
            raise ValueError(f"`{name}` must be features (N, D), got {tuple(features.shape)}.")
        if len(features) < num_images:
            raise ValueError(f"{purpose} needs at least {num_images} images, got {len(features)} in `{name}`.")
    widths = [features.shape[1] for features in sets.values()]
    if len(set(widths)) > 1:
        raise ValueError(f"both sets must have as many features, got {widths[0]} and {widths[1]}.")


def _check_finite(values: torch.Tensor, name: str) -> None:
    if not values.isfinite().all():
        raise ValueError(f"features of `{name}` must be small enough for their squares in float64, they overflow.")


def _read(features: Features, rows: slice | np.ndarray, name: str) -> torch.Tensor:
    """Some rows in float64."""
    block = features[rows]
    if isinstance(block, np.ndarray):
        block = torch.tensor(block)
    try:
        numbers = np.arange(len(features))[rows] if not isinstance(rows, np.ndarray) else rows
        check_features(block, torch.from_numpy(np.asarray(numbers)))
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None
    return block.double()
