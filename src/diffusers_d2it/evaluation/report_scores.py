# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Scores of the sets of images that a report compares, all of them with one reference that is read once."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator

from .collecting import Collected, feature_widths, versions
from .evaluation import evaluate
from .features import FeatureExtractor
from .image_sets import ImageSet
from .map_sources import Sampling


def score(
    images: torch.Tensor,
    protocol: dict,
    reference: ImageSet | str | Path,
    metrics: Sequence[str],
    features: FeatureExtractor,
    sampling: Sampling,
    accelerator: Accelerator | None = None,
) -> list[dict]:
    """`evaluate` of images in memory: a dictionary {"metric", "value", "protocol", "deviation"} for each metric.

    Args:
        images: (N, 3, H, W) uint8.
        protocol: what the protocols of the results say of them; "name" is that of the set.
        reference: what they are compared with.
        metrics: of `evaluate`.
        features: in which they are compared.
        sampling: batch size and seed.
        accelerator: joins the processes.

    Raises:
        ValueError: what `evaluate` raises.
    """
    samples = ImageSet.from_tensor(images, protocol["name"])
    samples.protocol = protocol
    results = evaluate(
        samples,
        reference,
        metrics,
        features,
        batch_size=sampling.batch_size,
        accelerator=accelerator,
        seed=sampling.seed,
    )
    return [asdict(result) for result in results]


@contextmanager
def read_once(
    reference: ImageSet | str | Path,
    metrics: Sequence[str],
    features: FeatureExtractor,
    sampling: Sampling,
    accelerator: Accelerator | None = None,
) -> Iterator[ImageSet | str | Path]:
    """A reference that many sets are compared with: its statistics in a temporary file, if no more is needed.

    Args:
        reference: of `evaluate`.
        metrics: of `evaluate`; those other than "fid" and "sfid" need the images.
        features: in which images are compared.
        sampling: batch size.
        accelerator: joins the processes; each has a file of its own.
    """
    if not isinstance(reference, ImageSet) or not {"fid", "sfid"}.issuperset(metrics):
        yield reference
        return
    widths = feature_widths(features, reference.size)
    wanted = ("pool", "spatial") if "sfid" in metrics else ("pool",)
    parts = {(output, "moments") for output in wanted if output in widths}
    with Collected(reference, parts, widths, accelerator) as collected, tempfile.TemporaryDirectory() as folder:
        collected.read(features, sampling.batch_size)
        protocol = {"features": features.describe(), "images": collected.describe(), "versions": versions(features)}
        path = Path(folder) / "reference.npz"
        collected.moments["pool"].save(path, protocol, collected.moments.get("spatial"))
        yield path
