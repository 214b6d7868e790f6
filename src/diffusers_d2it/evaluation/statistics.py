# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Mean and covariance of features: counted in one pass, saved with how they came about, read from files of others."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..files import durable_file
from ..words import listed, shown
from .frechet import check_moments


Moments = tuple[torch.Tensor, torch.Tensor]  # a mean (D,) and a covariance (D, D), float64

_ARRAYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # as ADM names them


class FeatureStatistics:
    """Mean and covariance of features in float64, whatever the number of images, in memory for one D x D matrix.

    Each batch is joined by its own mean and its squares about that mean (Chan, Golub and LeVeque, 1979), so that no
    large numbers cancel: batch size, order and number of processes change the last digits of float64 only.

    Args:
        num_features: D.
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


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceStatistics:
    """Means and covariances from a file, and how they came about."""

    moments: dict[str, Moments]  # of "pool", and where the file has them of "spatial", the features of sFID
    num_images: int | None  # that they are of; None where the file does not say
    protocol: dict  # what `write_statistics` was given; empty in files of others


def write_statistics(path: str | os.PathLike, moments: dict[str, Moments], num_images: int, protocol: dict) -> None:
    """Write statistics as .npz, whole or not at all: those of "pool", and perhaps of "spatial", as ADM names them.

    Args:
        path: ends in .npz; folders are made, a file of this name is replaced.
        moments: by the names of the features.
        num_images: how many images they are of.
        protocol: how the numbers came about, JSON values.

    Raises:
        OSError: the disk is full or failed. What was at `path` is still there.
    """
    path = Path(path)
    arrays = {key: moment.numpy() for name, pair in moments.items() for key, moment in zip(_ARRAYS[name], pair)}
    arrays |= {"num_images": np.int64(num_images), "protocol": np.array(json.dumps(protocol, sort_keys=True))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable_file(path) as staged:
        np.savez(staged, **arrays)


def read_statistics(path: str | os.PathLike) -> ReferenceStatistics:
    """Read a .npz of `write_statistics`, or of ADM or another script, with "mu" and "sigma".

    Other arrays in it, such as the images of ADM's files, are not read, and nothing in it is run.

    Raises:
        ValueError: it is missing or damaged, or holds something else; the error says what.
    """
    wanted = ("mu", "sigma", "mu_s", "sigma_s", "num_images", "protocol")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names, arrays = archive.files, {name: archive[name] for name in wanted if name in archive.files}
    except Exception as error:  # a damaged archive fails in the ways of zip, zlib, and numpy's headers
        raise ValueError(
            f"{path} must be a .npz with arrays of numbers, mu and sigma: {type(error).__name__}: {error}"
        ) from error
    moments = {}
    for output, keys in _ARRAYS.items():
        missing = [key for key in keys if key not in arrays]
        if missing and (output == "pool" or len(missing) == 1):
            raise ValueError(
                f"{path} must hold the arrays mu and sigma, and for sFID mu_s and sigma_s, {missing[0]} is not there:"
                f" it holds {', '.join(names) or 'nothing'}."
            )
        if not missing:
            found = check_moments(*(arrays[key] for key in keys), *(f"{key} of {path}" for key in keys))
            moments[output] = tuple(map(torch.from_numpy, found))
    num_images, text = arrays.get("num_images"), str(arrays.get("protocol", "{}"))
    if num_images is not None and (num_images.shape or num_images.dtype.kind not in "iu" or num_images < 2):
        raise ValueError(f"num_images of {path} must be a whole number, at least 2, got {num_images}.")
    try:
        protocol = json.loads(text)
    except (ValueError, RecursionError):
        protocol = None
    if not isinstance(protocol, dict):
        raise ValueError(f"protocol of {path} must be the text of a JSON object, got {shown(text)}.")
    return ReferenceStatistics(moments, None if num_images is None else int(num_images), protocol)
