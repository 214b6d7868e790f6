# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Mean and covariance of features: counted in one pass, saved with how they came about, read from files of others."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from ..files.folders import write_durably
from .feature_bank import check_features
from .frechet import check_moments


class FeatureStatistics:
    """Mean and covariance of features in float64, whatever the number of images, in memory for one D x D matrix.

        statistics = FeatureStatistics(num_features=2048)
        for indices, pixels in batches:
            statistics.update(features(pixels)["pool"], indices)
        frechet_distance(statistics.mean, statistics.covariance, reference.mean, reference.covariance)

    Each batch is joined by its own mean and its squares about that mean (Chan, Golub and LeVeque, 1979), so that no
    large numbers cancel: batch size, order and number of processes change the last digits of float64 only.

    Args:
        num_features: D.

    Raises:
        ValueError: `num_features` is not positive.
    """

    def __init__(self, num_features: int):
        if num_features < 1:
            raise ValueError(f"`num_features` must be at least 1, got {num_features}.")
        self.num_features = num_features
        self.num_images = 0
        self._mean = torch.zeros(num_features, dtype=torch.float64)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)  # squares about the mean, summed

    def update(self, features: torch.Tensor, indices: torch.Tensor | None = None) -> None:
        """Add the features of some images.

        Args:
            features: (B, D), float32 or float64; B may be 0.
            indices: (B,), which images they are of, for errors alone.

        Raises:
            ValueError: another shape or dtype, or a value that is not finite; nothing is added then.
        """
        check_features(features, indices, self.num_features)
        if not len(features):
            return
        features = features.detach().to("cpu", torch.float64)
        batch_mean = features.mean(dim=0)
        self._join(len(features), batch_mean, features - batch_mean)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the statistics of other images.

        Raises:
            ValueError: they have another number of features.
        """
        if other.num_features != self.num_features:
            raise ValueError(f"both must have as many features, got {self.num_features} and {other.num_features}.")
        if other.num_images:
            self._join(other.num_images, other._mean, other._mean.new_empty(0, self.num_features))
            self._scatter += other._scatter

    def _join(self, num_images: int, mean: torch.Tensor, centred: torch.Tensor) -> None:
        """Join a part of this mean, the squares of `centred` rows, and those between the two means."""
        total = self.num_images + num_images
        difference = mean - self._mean
        between = difference * (self.num_images / total * num_images) ** 0.5
        rows = torch.cat([centred, between[None]])
        self._scatter.addmm_(rows.T, rows)
        self._mean += difference * (num_images / total)
        self.num_images = total

    def gathered(self, accelerator: Accelerator) -> "FeatureStatistics":
        """The statistics of all processes together, the same on each; all must call it, one without images too."""
        gathered = FeatureStatistics(self.num_features)
        gathered.merge(self)
        if accelerator.num_processes == 1:
            return gathered
        counted = torch.cat([self._mean.new_tensor([self.num_images]), self._mean * self.num_images])
        counted = accelerator.reduce(counted.to(accelerator.device), "sum").cpu()
        gathered.num_images = int(counted[0])  # whole numbers are exact in float64 up to 2^53
        if gathered.num_images:
            gathered._mean = counted[1:] / gathered.num_images
            difference = self._mean - gathered._mean
            gathered._scatter.addr_(difference, difference, alpha=self.num_images)
        gathered._scatter = accelerator.reduce(gathered._scatter.to(accelerator.device), "sum").cpu()
        return gathered

    @property
    def mean(self) -> torch.Tensor:
        """(D,), float64.

        Raises:
            ValueError: there are no images.
        """
        if not self.num_images:
            raise ValueError("a mean needs at least 1 image, got 0.")
        return self._mean.clone()

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D), float64, divided by the number of images less one, as the published scripts do.

        Raises:
            ValueError: there are fewer than two images.
        """
        if self.num_images < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.num_images}.")
        scatter = (self._scatter + self._scatter.T) / 2  # a product is symmetric but for rounding
        return scatter / (self.num_images - 1)

    def save(self, path: str | os.PathLike, protocol: dict, spatial: "FeatureStatistics | None" = None) -> None:
        """Write reference statistics as .npz, whole or not at all: "mu" and "sigma" as ADM names them, "num_images",
        "protocol", and "mu_s" and "sigma_s" of the spatial features. A file of this name is replaced.

        Args:
            path: ends in .npz; folders are made.
            protocol: how the numbers came about, JSON values.
            spatial: the statistics behind sFID, of the same images.

        Raises:
            ValueError: the name ends otherwise, there are fewer than two images, `protocol` is not JSON, or `spatial`
                is of another number of images.
            OSError: the disk is full or failed. What was at `path` is still there.
        """
        path = Path(path).absolute()
        if path.suffix != ".npz":
            raise ValueError(f"statistics are saved as .npz, got {path.name}.")
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy(), "num_images": np.int64(self.num_images)}
        try:
            arrays["protocol"] = np.array(json.dumps(protocol, sort_keys=True))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`protocol` must hold JSON values: {error}") from error
        if spatial is not None:
            if spatial.num_images != self.num_images:
                raise ValueError(
                    f"`spatial` must be of the same images, got {spatial.num_images} beside {self.num_images}."
                )
            arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, lambda staged: np.savez(staged, **arrays))


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean and covariance from a file, and how they came about.

    Args:
        mean: (D,), float64.
        covariance: (D, D), float64.
        num_images: how many images they are of; None where the file does not say.
        protocol: what `FeatureStatistics.save` was given; empty in files of others.
        spatial_mean: (E,), of the features of sFID; None where the file has none.
        spatial_covariance: (E, E), or None.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    num_images: int | None
    protocol: dict
    spatial_mean: torch.Tensor | None = None
    spatial_covariance: torch.Tensor | None = None

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ReferenceStatistics":
        """Read a .npz of `FeatureStatistics.save`, or of ADM or another script, with "mu" and "sigma".

        Other arrays in it, such as the images of ADM's files, are not read, and nothing in it is run.

        Raises:
            ValueError: it is missing or damaged, or holds something else; the error says what.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} is missing: it should be a .npz with mu and sigma.")
        wanted = ("mu", "sigma", "mu_s", "sigma_s", "num_images", "protocol")
        arrays = _read_arrays(path, wanted)
        for name, needed in (
            ("mu", True),
            ("sigma", True),
            ("mu_s", "sigma_s" in arrays),
            ("sigma_s", "mu_s" in arrays),
        ):
            if needed and name not in arrays:
                raise ValueError(
                    f"{path} must hold the arrays mu and sigma, and for sFID mu_s and sigma_s, {name} is not there: it"
                    f" holds {', '.join(_names(path)) or 'nothing'}."
                )
        mean, covariance = _moments(path, arrays, "mu", "sigma")
        spatial = _moments(path, arrays, "mu_s", "sigma_s") if "mu_s" in arrays else (None, None)
        return cls(mean, covariance, _num_images(path, arrays), _protocol(path, arrays), *spatial)


def _names(path: Path) -> list[str]:
    with np.load(path, allow_pickle=False) as archive:
        return list(archive.files)


def _read_arrays(path: Path, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"it is one array of shape {archive.shape}, not an archive of named ones")
        with archive:
            return {name: archive[name] for name in wanted if name in archive.files}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a damaged archive fails in the ways of zip, zlib, and numpy's headers
        raise ValueError(
            f"{path} must be a .npz with arrays of numbers, mu and sigma: {type(error).__name__}: {error}"
        ) from error


def _moments(path: Path, arrays: dict, mean: str, covariance: str) -> tuple[torch.Tensor, torch.Tensor]:
    moments = check_moments(arrays[mean], arrays[covariance], f"{mean} of {path}", f"{covariance} of {path}")
    return torch.from_numpy(moments[0]), torch.from_numpy(moments[1])


def _num_images(path: Path, arrays: dict) -> int | None:
    if "num_images" not in arrays:
        return None
    num_images = arrays["num_images"]
    if num_images.shape != () or num_images.dtype.kind not in "iu" or num_images < 2:
        raise ValueError(f"num_images of {path} must be a whole number, at least 2, got {num_images}.")
    return int(num_images)


def _protocol(path: Path, arrays: dict) -> dict:
    if "protocol" not in arrays:
        return {}
    text = arrays["protocol"]
    try:
        protocol = json.loads(str(text)) if text.shape == () and text.dtype.kind == "U" else None
    except (ValueError, RecursionError):
        protocol = None
    if not isinstance(protocol, dict):
        raise ValueError(f"protocol of {path} must be the text of a JSON object, got {str(text)[:80]!r}.")
    return protocol
