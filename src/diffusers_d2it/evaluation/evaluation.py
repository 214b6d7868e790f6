# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of samples against reference images: FID, sFID, Inception Score, precision, recall and KID, each with protocol.

Shapes:
    N images of a set, D features
"""

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator

from ..files import on_main_process
from .collecting import NUM_SPLITS, Collected, device_of, feature_widths, versions
from .features import FeatureExtractor
from .frechet import frechet_distance
from .image_sets import ImageSet
from .references import Reference
from .results import Result
from .scores import kernel_distance, precision_recall
from .statistics import ReferenceStatistics


# As the published scripts have them
_NUM_NEIGHBOURS, _NUM_SUBSETS = 3, 100


@dataclass(frozen=True)
class _Metric:
    output: str  # the features it is computed from
    part: str  # what of them: "moments", mean and covariance; "scores" of images; or all "rows"
    least: int  # images
    settings: dict = field(default_factory=dict)


_METRICS = {
    "fid": _Metric("pool", "moments", 2),
    "sfid": _Metric("spatial", "moments", 2),
    "is": _Metric("logits", "scores", NUM_SPLITS, {"num_splits": NUM_SPLITS}),
    "precision": _Metric("pool", "rows", _NUM_NEIGHBOURS + 1, {"num_neighbours": _NUM_NEIGHBOURS}),
    "recall": _Metric("pool", "rows", _NUM_NEIGHBOURS + 1, {"num_neighbours": _NUM_NEIGHBOURS}),
    "kid": _Metric("pool", "rows", 2, {"num_subsets": _NUM_SUBSETS}),
}
METRICS = tuple(_METRICS)


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
    """Score samples; each image is read once, whatever is computed.

    Neither the batch size nor the number of processes changes a value by more than rounding. Memory does not depend on
    the number of images: features of all images, which KID, precision and recall compare, lie in a temporary file (for
    processes on several machines TMPDIR must be on a disk that all of them see).

    Args:
        samples: the images to be scored.
        reference: real images, or the path of statistics from `save_statistics` or of others with "mu" and "sigma"
            (ADM's files also have images, for precision, recall and KID). The Inception Score alone needs none.
        metrics: any of `METRICS`. Precision and recall are those of Kynkaanniemi et al. with 3 neighbours, KID is a
            mean over 100 subsets, the Inception Score one over 10 splits.
        features: in which the images are compared. With others than Inception's the metrics are named after them:
            "fd_dinov2" instead of "fid".
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
    if not metrics or len(set(metrics)) < len(metrics) or not set(metrics) <= set(METRICS):
        raise ValueError(f"`metrics` must be some of {', '.join(METRICS)}, each once, got {list(metrics)}.")
    chosen = {name: _METRICS[name] for name in metrics}
    if "kid" in chosen:
        chosen["kid"] = _kid(kid_subset_size, seed)
    features = features.to(device_of(features, accelerator))
    widths = feature_widths(features, samples.size)
    target = Reference.open(reference, {metric.part for metric in chosen.values()})
    _check(chosen, samples, target, features, widths)
    target.check(samples, features, widths, {metric.output for metric in chosen.values() if metric.part == "moments"})

    with ExitStack() as stack:

        def collect(images: ImageSet, parts: set[str]) -> Collected:
            wanted = {(metric.output, metric.part) for metric in chosen.values() if metric.part in parts}
            collected = stack.enter_context(Collected(images, wanted, widths, accelerator))
            collected.read(features, batch_size, num_workers)
            return collected

        ours = collect(samples, {"moments", "scores", "rows"})
        theirs = None
        if target.images is not None:
            theirs = collect(target.images, {"rows"} if target.statistics else {"moments", "rows"})
        values = on_main_process(accelerator, lambda: _values(chosen, ours, theirs, target.statistics))
    results = []
    for (name, metric), (value, deviation) in zip(chosen.items(), values):
        protocol = _protocol(metric, features, widths, ours, theirs, target)
        name = result_name(name, features)
        if protocol.get("rank_deficient") and (accelerator is None or accelerator.is_main_process):
            warnings.warn(
                f"{name}: there are no more images than the {widths[metric.output]} features, so that a covariance"
                " lacks rank. The value is too high: compare it only with others of as many images.",
                stacklevel=2,
            )
        results.append(Result(name, value, protocol, deviation))
    return results


def result_name(metric: str, features: FeatureExtractor) -> str:
    """What a result is called: "fid" in features of Inception, which the name stands for, else such as "fd_dinov2"."""
    if features.name == "inception":
        return metric
    general = {"fid": "fd", "sfid": "sfd", "kid": "kd", "rfid": "rfd"}
    return f"{general.get(metric, metric)}_{features.name}"


def _kid(subset_size: int, seed: int) -> _Metric:
    if subset_size < 2:
        raise ValueError(f"`kid_subset_size` must be at least 2, got {subset_size}.")
    settings = {**_METRICS["kid"].settings, "subset_size": subset_size, "seed": seed}
    return replace(_METRICS["kid"], least=subset_size, settings=settings)


def _check(
    chosen: dict[str, _Metric],
    samples: ImageSet,
    target: Reference,
    features: FeatureExtractor,
    widths: dict[str, int],
) -> None:
    """Raise a ValueError if the features lack what a metric needs, or a set has too few images."""
    for name, metric in chosen.items():
        if metric.output not in widths:
            raise ValueError(
                f"the metric {name!r} needs {metric.output!r}, and the features {features.name!r} have only"
                f" {', '.join(map(repr, widths))}."
            )
        is_read = metric.part == "rows" or (metric.part == "moments" and target.statistics is None)
        hint = " (`kid_subset_size`, --kid_subset_size)" if name == "kid" else ""
        for images in [samples, target.images] if is_read else [samples]:
            if images.num_images < metric.least:
                raise ValueError(
                    f"the metric {name!r} needs at least {metric.least} images{hint}, got {images.num_images} in"
                    f" {images.name}."
                )


def _values(
    chosen: dict[str, _Metric], ours: Collected, theirs: Collected | None, statistics: ReferenceStatistics | None
) -> list[tuple[float, float | None]]:
    """Value and deviation of each metric."""
    values = {}
    if "fid" in chosen:
        real = (statistics.mean, statistics.covariance) if statistics else _moments(theirs, "pool")
        values["fid"] = frechet_distance(*_moments(ours, "pool"), *real), None
    if "sfid" in chosen:
        real = (statistics.spatial_mean, statistics.spatial_covariance) if statistics else _moments(theirs, "spatial")
        values["sfid"] = frechet_distance(*_moments(ours, "spatial"), *real), None
    if "is" in chosen:
        values["is"] = ours.score.compute()
    if "precision" in chosen or "recall" in chosen:
        precision, recall = precision_recall(theirs.rows, ours.rows, _NUM_NEIGHBOURS)
        values |= {"precision": (precision, None), "recall": (recall, None)}
    if "kid" in chosen:
        values["kid"] = kernel_distance(ours.rows, theirs.rows, **chosen["kid"].settings)
    return [values[name] for name in chosen]


def _moments(collected: Collected, output: str) -> tuple[torch.Tensor, torch.Tensor]:
    return collected.moments[output].mean, collected.moments[output].covariance


def _protocol(
    metric: _Metric,
    features: FeatureExtractor,
    widths: dict[str, int],
    ours: Collected,
    theirs: Collected | None,
    target: Reference,
) -> dict:
    """How one metric was measured."""
    protocol = {"features": features.describe(), "samples": ours.describe(), "settings": metric.settings}
    if metric.part == "moments" and target.statistics is not None:
        protocol["reference"] = target.describe_statistics()
    elif metric.part != "scores":
        protocol["reference"] = theirs.describe()
    if metric.part == "moments":
        numbers = [images["num_images"] for images in (protocol["samples"], protocol["reference"])]
        protocol["rank_deficient"] = min(n for n in numbers if n is not None) <= widths[metric.output]
    return {**protocol, "versions": versions(features)}
