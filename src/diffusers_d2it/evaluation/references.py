# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What samples are compared with: images, or statistics from a file."""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from ..files import on_main_process
from ..files.folders import file_sha256
from ..words import shorten
from .collecting import Collected, device_of, feature_widths, versions
from .features import FeatureExtractor
from .image_sets import ImageSet, open_images
from .statistics import ReferenceStatistics


def open_reference(
    path: str | os.PathLike, resolution: int | None = None, split: str = "train", image_column: str | None = None
) -> ImageSet | Path:
    """What `evaluate` takes as reference: the path itself of a file with statistics, else its images.

    Args:
        path: an .npz with "mu" and "sigma", or whatever `open_images` opens.
        resolution, split, image_column: of `open_images`.

    Raises:
        ValueError: statistics are asked to be resized; or from `open_images`.
    """
    if Path(path).suffix.lower() == ".npz" and "mu.npy" in _members(path):
        if resolution is not None or image_column is not None:
            raise ValueError(f"{path} holds statistics: `resolution` and `image_column` are of data sets.")
        return Path(path)
    return open_images(path, resolution, split, image_column)


def save_statistics(
    path: str | os.PathLike,
    images: ImageSet,
    features: FeatureExtractor,
    *,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    num_workers: int = 0,
) -> None:
    """Write the mean and covariance of reference images with their protocol, for FID and where it can be sFID.

    Args:
        path: ends in .npz; a file of this name is replaced.
        images: the reference.
        features: of which network.
        batch_size: images of a batch and process.
        accelerator: its processes share the images.
        num_workers: processes that decode images, of each process.

    Raises:
        ValueError: there are fewer than two images, some cannot be used, features are not finite, or the name ends
            otherwise.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"statistics are saved as .npz, got {path}.")
    features = features.to(device_of(features, accelerator))
    widths = feature_widths(features, images.size)
    if images.num_images < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {images.num_images} in {images.name}.")
    parts = {(output, "moments") for output in ("pool", "spatial") if output in widths}
    with Collected(images, parts, widths, accelerator) as collected:
        collected.read(features, batch_size, num_workers)
    protocol = {"features": features.describe(), "images": collected.describe(), "versions": versions(features)}
    moments = collected.moments
    on_main_process(accelerator, lambda: moments["pool"].save(path, protocol, moments.get("spatial")))


@dataclass(frozen=True)
class Reference:
    """What a reference is made of, as far as metrics need it: images, statistics from a file, or both.

    Args:
        images: read where there are no statistics, and for metrics that compare images.
        statistics: of `path`.
        path: the file.
    """

    images: ImageSet | None = None
    statistics: ReferenceStatistics | None = None
    path: Path | None = None

    @classmethod
    def open(cls, reference: ImageSet | str | os.PathLike | None, kinds: set[str]) -> "Reference":
        """Open what metrics need.

        Args:
            reference: images, or the path of statistics; None if all that is needed is "scores".
            kinds: what metrics need of a set: "moments", "scores" of its images, "rows" of features.

        Raises:
            ValueError: there is no reference and one is needed, the file is no file of statistics, or images are
                needed that it does not have.
        """
        if kinds <= {"scores"}:
            return cls()
        if reference is None:
            raise ValueError("`reference` must be images or the path of statistics: only the metric 'is' needs none.")
        if isinstance(reference, ImageSet):
            return cls(images=reference)
        path = Path(reference)
        statistics = ReferenceStatistics.load(path)
        if "rows" not in kinds:
            return cls(None, statistics, path)
        if "arr_0.npy" not in _members(path):
            raise ValueError(
                f"{path} holds statistics, and 'precision', 'recall' and 'kid' compare images: pass those of the"
                " reference."
            )
        return cls(open_images(path), statistics if "moments" in kinds else None, path)

    def describe_statistics(self) -> dict:
        """What a protocol says of the statistics: their images if they are known, else their file."""
        if self._protocol:
            return self._protocol["images"]
        file = {"name": self.path.name, "statistics_sha256": file_sha256(self.path)}
        return {**file, "num_images": self.statistics.num_images}

    @property
    def _protocol(self) -> dict:
        """That of `save_statistics`; empty for files of others, whatever they hold."""
        protocol = self.statistics.protocol
        is_ours = all(isinstance(protocol.get(part), dict) for part in ("features", "images"))
        return protocol if is_ours else {}

    def check(self, samples: ImageSet, features: FeatureExtractor, widths: dict[str, int], outputs: set[str]) -> None:
        """Check that the reference and the samples can be compared. What a file does not tell cannot be checked.

        Args:
            samples: the samples.
            features: of the samples.
            widths: of the features.
            outputs: which of them are compared by their moments.

        Raises:
            ValueError: the images have another size, or the statistics are of another network, or lack features.
        """
        if self.images is not None:
            _check_size(self.images.size, samples, self.images.name)
        if self.statistics is None:
            return
        moments = {"pool": self.statistics.mean, "spatial": self.statistics.spatial_mean}
        for output in sorted(outputs):
            if moments[output] is None:
                raise ValueError(f"{self.path} has no mu_s and sigma_s, the statistics of features for 'sfid'.")
        network, described = self._protocol.get("features", {}), features.describe()
        differing = [key for key, value in described.items() if network.get(key, value) != value]
        if differing:
            ours, theirs = (
                ", ".join(f"{key} {shorten(one[key])}" for key in differing) for one in (described, network)
            )
            raise ValueError(f"{self.path} was computed in other features: {theirs}; of the samples: {ours}.")
        for output in sorted(outputs):
            if len(moments[output]) != widths[output]:
                raise ValueError(
                    f"{self.path} was computed in other features: it has {len(moments[output])}, and"
                    f" {features.name!r} has {widths[output]}."
                )
        if self._protocol:
            _check_size(self._protocol["images"]["resolution"], samples, str(self.path))
        elif self.images is None and "arr_0.npy" in _members(self.path):  # the images of ADM's statistics tell theirs
            _check_size(open_images(self.path).size, samples, str(self.path))


def _check_size(size: Sequence[int], samples: ImageSet, name: str) -> None:
    if tuple(size) != samples.size:
        ours, theirs = ("x".join(map(str, one)) for one in (samples.size, size))
        raise ValueError(
            f"samples and reference must be of one size, got {ours} in {samples.name} and {theirs} in {name};"
            " images of a data set are resized to a `resolution` (--resolution)."
        )


def _members(path: str | os.PathLike) -> list[str]:
    """The names in an .npz, empty if it is none: whoever reads it says so."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []
