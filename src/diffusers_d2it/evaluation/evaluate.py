# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of samples against reference images: FID, sFID, precision, recall, KID, and by themselves: IS, top-1 accuracy.

Shapes:
    B images of a batch, N of a set, D features
"""

import os
import warnings
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from pathlib import Path

import torch
from accelerate import Accelerator

from ..files import gather, on_main_process, place_of
from ..words import counted, differences, listed
from .features import FeatureExtractor
from .images import ImageSet, hash_pixels, open_images, pixel_digest
from .results import ReferenceStatistics, Result, read_statistics, write_statistics
from .scores import (
    FeatureStatistics,
    Moments,
    check_features,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    top1_accuracy,
)


# As the published scripts have them
_NUM_SPLITS, _NUM_NEIGHBOURS, _NUM_SUBSETS = 10, 3, 100


@dataclass(frozen=True)
class _Metric:
    output: str  # the features it is computed from
    part: str  # what of them: "moments", mean and covariance; "rows", all of them; "scores", all but of no reference
    least: int  # images
    settings: dict = field(default_factory=dict)


_METRICS = {
    "fid": _Metric("pool", "moments", 2),
    "sfid": _Metric("spatial", "moments", 2),
    "is": _Metric("logits", "scores", _NUM_SPLITS, {"num_splits": _NUM_SPLITS}),
    "precision": _Metric("pool", "rows", _NUM_NEIGHBOURS + 1, {"num_neighbours": _NUM_NEIGHBOURS}),
    "recall": _Metric("pool", "rows", _NUM_NEIGHBOURS + 1, {"num_neighbours": _NUM_NEIGHBOURS}),
    "kid": _Metric("pool", "rows", 2, {"num_subsets": _NUM_SUBSETS}),
    "top1": _Metric("imagenet", "scores", 1),
}
METRICS = tuple(_METRICS)
METRIC_MINIMUM = {name: metric.least for name, metric in _METRICS.items()}  # images of a set


def evaluate(
    samples: ImageSet,
    reference: ImageSet | str | os.PathLike | None,
    metrics: Sequence[str],
    features: FeatureExtractor,
    *,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    kid_subset_size: int = 1000,
    num_workers: int = 0,
) -> list[Result]:
    """Score samples; each image is read once, and batch size and processes change a value by no more than rounding.

    For Frechet distances memory does not depend on the number of images. The other metrics keep the features of all
    images: 0.4 GB for 50,000 of 2048 features.

    Args:
        samples: the images to be scored.
        reference: real images, or the path of statistics from `save_statistics` or of others with "mu" and "sigma"
            (ADM's files also have images, for precision, recall and KID). "is" and "top1" need none.
        metrics: any of `METRICS`: precision and recall with 3 neighbours, KID over 100 subsets, the Inception Score
            over 10 splits, top1 among the classes of the samples with features of a classifier of ImageNet.
        features: in which images are compared. With others than Inception's metrics are named "fd_dinov2", not "fid".
        batch_size: images of a batch and process.
        accelerator: its processes share the images; all of them get the results.
        seed: of the subsets of KID.
        kid_subset_size: images of each set in a subset of KID.
        num_workers: processes that decode images, of each process.

    Returns:
        A result for each metric.

    Raises:
        ValueError: a metric is unknown, given twice, or needs what the features or the reference do not have; a set
            has too few images; the images differ in size; the statistics are of another network or resolution; images
            cannot be used; or features are not finite.
    """
    reading = {"batch_size": batch_size, "num_workers": num_workers, "accelerator": accelerator}
    return Evaluator(reference, metrics, features, seed=seed, kid_subset_size=kid_subset_size, **reading)(samples)


class Evaluator:
    """`evaluate`, with its arguments, for several sets of samples: evaluator(samples) reads the reference once."""

    def __init__(
        self,
        reference: ImageSet | str | os.PathLike | None,
        metrics: Sequence[str],
        features: FeatureExtractor,
        *,
        seed: int = 0,
        kid_subset_size: int = 1000,
        accelerator: Accelerator | None = None,
        **reading: int,
    ):
        check_metrics(metrics, METRICS)
        if kid_subset_size < 2:
            raise ValueError(f"`kid_subset_size` must be at least 2, got {kid_subset_size}.")
        self.metrics = {name: _METRICS[name] for name in metrics}
        if "kid" in metrics:
            settings = {**_METRICS["kid"].settings, "subset_size": kid_subset_size, "seed": seed}
            self.metrics["kid"] = replace(_METRICS["kid"], least=kid_subset_size, settings=settings)
        self.features = features if accelerator is None else features.to(accelerator.device)
        self.accelerator, self.reading = accelerator, {"accelerator": accelerator, **reading}
        self.images: ImageSet | None = None
        self.statistics: ReferenceStatistics | None = None
        self._theirs: ReadImages | None = None
        self._parts = {metric.part for metric in self.metrics.values()} - {"scores"}  # to be read of the reference
        if self._parts and reference is None:
            raise ValueError("`reference` must be images or the path of statistics: only 'is' and 'top1' need none.")
        if self._parts and isinstance(reference, ImageSet):
            self.images = reference
        elif self._parts:
            self.statistics = read_statistics(reference)
            self.images = open_images(reference) if "arr_0.npy" in _members(reference) else None
            self._parts -= {"moments"}
            if self._parts and self.images is None:
                raise ValueError(f"{reference} holds statistics, and 'precision', 'recall' and 'kid' compare images.")

    def __call__(self, samples: ImageSet) -> list[Result]:
        """A result for each metric. Raises what `evaluate` raises."""
        widths = self.features.widths(samples.size)
        self._check(samples, widths)
        labels = samples.labels if "top1" in self.metrics else None  # an error before all images are read
        ours = self._read(samples, {"moments", "rows", "scores"})
        if self._parts and self._theirs is None:
            self._theirs = self._read(self.images, self._parts)
        labels = None if labels is None else labels[ours.places]
        values = on_main_process(self.accelerator, lambda: self._values(ours, labels))
        described, results = {**samples.describe(), "digest": ours.digest}, []
        for name, metric in self.metrics.items():
            protocol = self._protocol(metric, described, widths)
            if name == "top1":
                protocol["settings"] = {"classes": labels.unique().tolist()}
            shown = result_name(name, self.features)
            if protocol.get("rank_deficient") and place_of(self.accelerator)[0] == 0:
                warnings.warn(
                    f"{shown}: there are no more images than the {widths[metric.output]} features, so the covariance"
                    " is rank-deficient. The value is too high: compare it only with others of as many images.",
                    stacklevel=2,
                )
            value, deviation = values[name]
            results.append(Result(shown, value, protocol, deviation))
        return results

    def _check(self, samples: ImageSet, widths: dict[str, int]) -> None:
        """Raise a ValueError if samples and reference cannot be compared. What a file does not tell is not checked."""
        for name, metric in self.metrics.items():
            if metric.output not in widths:
                raise ValueError(
                    f"the metric {name!r} needs {metric.output!r}, and the features {self.features.name!r} have only"
                    f" {', '.join(map(repr, widths))}."
                )
            hint = " (`kid_subset_size`)" if name == "kid" else ""
            for images in [samples, self.images] if metric.part in self._parts else [samples]:
                if len(images) < metric.least:
                    raise ValueError(
                        f"the metric {name!r} needs at least {counted(metric.least, 'image')}{hint}, got"
                        f" {len(images)} in {images.name}."
                    )
        file = self.statistics
        size, name = (samples.size, "") if self.images is None else (self.images.size, self.images.name)
        if file is not None and "resolution" in file.images:
            size, name = tuple(file.images["resolution"]), file.path
        if size != samples.size:
            ours, theirs = ("x".join(map(str, one[::-1])) for one in (samples.size, size))
            raise ValueError(
                f"samples and reference must be of one size, got {ours} in {samples.name} and {theirs} in {name};"
                " images of a data set are resized to a `resolution`."
            )
        if file is not None:
            outputs = sorted({metric.output for metric in self.metrics.values() if metric.part == "moments"})
            if not set(outputs) <= set(file.moments):
                raise ValueError(f"{file.path} has no mu_s and sigma_s, the statistics of features for 'sfid'.")
            ours = self.features.describe()
            known = {key: file.features.get(key, value) for key, value in ours.items()}
            known |= {f"number for {output!r}": len(file.moments[output][0]) for output in outputs}
            ours |= {f"number for {output!r}": widths[output] for output in outputs}
            if found := differences(known, ours):
                raise ValueError(f"{file.path} was computed in other features than the samples: {'; '.join(found)}.")

    def _read(self, images: ImageSet, parts: set[str]) -> "ReadImages":
        wanted = [metric for metric in self.metrics.values() if metric.part in parts]
        rows = {metric.output for metric in wanted if metric.part != "moments"}
        moments = {metric.output for metric in wanted if metric.part == "moments"}
        return read_images(images, self.features, rows, moments, **self.reading)

    def _values(self, ours: "ReadImages", labels: torch.Tensor | None) -> dict[str, tuple[float, float | None]]:
        theirs, values = self._theirs, {}
        for name, metric in self.metrics.items():
            if metric.part == "moments":
                known = (self.statistics or theirs).moments[metric.output]
                values[name] = frechet_distance(*ours.moments[metric.output], *known), None
        if "is" in self.metrics:
            values["is"] = inception_score(ours.rows["logits"], **self.metrics["is"].settings)
        if "top1" in self.metrics:
            values["top1"] = top1_accuracy(ours.rows["imagenet"], labels)
        if "precision" in self.metrics or "recall" in self.metrics:
            precision, recall = precision_recall(theirs.rows["pool"], ours.rows["pool"], _NUM_NEIGHBOURS)
            values |= {"precision": (precision, None), "recall": (recall, None)}
        if "kid" in self.metrics:
            settings = self.metrics["kid"].settings
            values["kid"] = kernel_distance(ours.rows["pool"], theirs.rows["pool"], **settings)
        return values

    def _protocol(self, metric: _Metric, samples: dict, widths: dict[str, int]) -> dict:
        protocol = {"features": self.features.describe(), "samples": samples, "settings": metric.settings}
        if metric.part == "moments" and self.statistics is not None:
            protocol["reference"] = self.statistics.images
        elif metric.part != "scores":
            protocol["reference"] = {**self.images.describe(), "digest": self._theirs.digest}
        if metric.part == "moments":
            numbers = [images["num_images"] for images in (samples, protocol["reference"])]
            protocol["rank_deficient"] = min(n for n in numbers if n is not None) <= widths[metric.output]
        return {**protocol, "versions": versions(self.features)}


def check_metrics(metrics: Sequence[str], known: Sequence[str]) -> None:
    """Raise a ValueError unless metrics are some of those known, each once."""
    if not metrics or len(set(metrics)) < len(metrics) or not set(metrics) <= set(known):
        raise ValueError(f"`metrics` must be some of {', '.join(known)}, each once, got {list(metrics)}.")


def result_name(metric: str, features: FeatureExtractor) -> str:
    """What a result is called: "fid" in features of Inception, which the name stands for, else such as "fd_dinov2"."""
    if features.name == "inception":
        return metric
    general = {"fid": "fd", "sfid": "sfd", "kid": "kd", "rfid": "rfd"}
    return f"{general.get(metric, metric)}_{features.name}"


def versions(features: FeatureExtractor | None = None) -> dict[str, str]:
    """Versions for a protocol."""
    packages = ["torch", "numpy", "scipy"]
    if features is not None and features.package is not None:
        packages.append(features.package)
    own = import_module(__package__.partition(".")[0]).__version__
    return {"diffusers_d2it": own} | {package: metadata.version(package) for package in packages}


def compute_exactly() -> None:
    """Keep convolutions in float32 on a GPU, and their order the same: results must not depend on the batch size."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadImages:
    """What metrics need of the images of a set."""

    places: torch.Tensor  # int64 (N,), those of the images that were read; others were left out
    digest: str  # of the pixels
    rows: dict[str, torch.Tensor]  # what is kept of all images, (N, ...), in the order of the set
    moments: dict[str, Moments]  # of features, by their names


class Reading:
    """A set while it is read: each process adds its batches, and `joined` is what all of them have added."""

    def __init__(self):
        self._places: list[torch.Tensor] = []
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._statistics: dict[str, FeatureStatistics] = {}
        self._hashes = 0

    def add(
        self,
        places: torch.Tensor,
        pixels: torch.Tensor,
        rows: dict[str, torch.Tensor],
        counted: dict[str, torch.Tensor],
    ) -> None:
        """Images uint8 (B, 3, H, W) and their places; `rows` are kept, features `counted` for mean and covariance."""
        self._places.append(places)
        self._hashes += hash_pixels(pixels)
        for name, values in rows.items():
            self._rows.setdefault(name, []).append(values.cpu())
        for name, features in counted.items():
            if name not in self._statistics:
                self._statistics[name] = FeatureStatistics(features.shape[1])
            self._statistics[name].update(features, places)

    def joined(self, accelerator: Accelerator | None = None) -> ReadImages:
        """What all processes have read, the same on each; it must not be nothing."""
        first, *others = parts = [part for part in gather(accelerator, self) if part._places]
        for name, statistics in first._statistics.items():
            for part in others:
                statistics.merge(part._statistics[name])
        places = torch.cat([batch for part in parts for batch in part._places])
        order = places.argsort()
        rows = {name: torch.cat([batch for part in parts for batch in part._rows[name]]) for name in first._rows}
        return ReadImages(
            places[order],
            pixel_digest(len(places), sum(part._hashes for part in parts)),
            {name: values[order] for name, values in rows.items()},
            {name: statistics.moments for name, statistics in first._statistics.items()},
        )


def read_images(
    images: ImageSet,
    features: FeatureExtractor,
    rows: Collection[str],
    moments: Collection[str],
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    num_workers: int = 0,
) -> ReadImages:
    """Read all images once, each process its share: `rows` of their features are kept, `moments` of others."""
    reading, place = Reading(), place_of(accelerator)
    for places, pixels in images.batches(batch_size, *place, num_workers, progress=place[0] == 0):
        found = features(pixels.to(features.device))
        for name in rows:
            check_features(found[name], places, name=f"features {name}")
        reading.add(places, pixels, {name: found[name] for name in rows}, {name: found[name] for name in moments})
    images.share_left_out(accelerator)
    read = reading.joined(accelerator)
    times = torch.bincount(read.places, minlength=len(images))
    missing = times == 0
    if missing.sum() == len(images.left_out):
        missing[:] = False
    for fault, wrong in (("missing", missing), ("read more than once", times > 1)):
        if wrong.any():
            found = listed(wrong.nonzero().flatten().tolist(), most=8)
            raise ValueError(f"each of the {len(images)} images of {images.name} must be read once, {fault}: {found}.")
    return read


# ---------------------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------------------


def open_reference(
    path: str | os.PathLike, resolution: int | None = None, split: str | None = None, image_column: str | None = None
) -> ImageSet | Path:
    """What `evaluate` takes as reference: the path itself of a file with statistics, else its images.

    Args:
        path: an .npz with "mu" and "sigma", or whatever `open_images` opens.
        resolution, split, image_column: of `open_images`.

    Raises:
        ValueError: statistics are asked to be resized; or from `open_images`.
    """
    if Path(path).suffix.lower() == ".npz" and "mu.npy" in _members(path):
        if not (resolution is split is image_column is None):
            raise ValueError(f"{path} holds statistics: `resolution`, `split` and `image_column` are of data sets.")
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
) -> int:
    """Write the mean and covariance of reference images with their protocol, for FID and where it can be sFID.

    Args:
        path: ends in .npz; a file of this name is replaced.
        images: the reference.
        features, batch_size, accelerator, num_workers: of `evaluate`.

    Returns:
        How many images they are of.

    Raises:
        ValueError: there are fewer than two images, some cannot be used, features are not finite, or the name ends
            otherwise.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"`path` of statistics must end in .npz, got {path}.")
    features = features if accelerator is None else features.to(accelerator.device)
    moments = [output for output in ("pool", "spatial") if output in features.widths(images.size)]
    read = read_images(images, features, (), moments, batch_size, accelerator, num_workers)
    described = {**images.describe(), "digest": read.digest}
    protocol = {"features": features.describe(), "images": described, "versions": versions(features)}
    on_main_process(accelerator, lambda: write_statistics(path, read.moments, len(read.places), protocol))
    return len(read.places)


def _members(path: str | os.PathLike) -> list[str]:
    """The names in an .npz, empty if it is none: whoever reads it says so."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []
