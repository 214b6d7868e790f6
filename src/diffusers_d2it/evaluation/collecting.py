# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""One pass over a set of images, by one process or several: all that metrics need of its features."""

from importlib import import_module, metadata

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .feature_bank import FeatureBank
from .features import FeatureExtractor
from .image_sets import ImageSet, PixelDigest
from .scores import InceptionScore
from .statistics import FeatureStatistics


NUM_SPLITS = 10  # of an Inception Score, as the published scripts have it


class Collected:
    """What metrics need of a set of images, collected in one pass by all processes.

    Args:
        images: the set.
        parts: pairs of a feature, "pool", "spatial" or "logits", and what of it: "moments", "scores" or "rows".
        widths: of the features, from `feature_widths`.
        accelerator: its processes share the images.
    """

    def __init__(
        self,
        images: ImageSet,
        parts: set[tuple[str, str]],
        widths: dict[str, int],
        accelerator: Accelerator | None = None,
    ):
        self.images = images
        self.accelerator = accelerator
        self.pixels = PixelDigest()
        self.moments = {
            output: FeatureStatistics(widths[output]) for output, kind in sorted(parts) if kind == "moments"
        }
        self.score = self.rows = None
        if ("logits", "scores") in parts:
            self.score = InceptionScore(len(images), NUM_SPLITS)
        if ("pool", "rows") in parts:
            self.rows = FeatureBank(len(images), widths["pool"], accelerator=accelerator)

    def __enter__(self) -> "Collected":
        return self

    def __exit__(self, *error) -> None:
        if self.rows is not None:
            self.rows.close()

    def read(self, features: FeatureExtractor, batch_size: int, num_workers: int = 0) -> None:
        """Read all images, each process its share, and join what the processes have."""
        index, count = place_of(self.accelerator)
        device = device_of(features, self.accelerator)
        batches = self.images.batches(batch_size, index, count, num_workers)
        number = -(-len(self.images) // (batch_size * count))
        for indices, images in tqdm(batches, desc=self.images.name, total=number, disable=index > 0):
            self.pixels.update(images)
            of_images = features(images.to(device))
            for output, statistics in self.moments.items():
                statistics.update(of_images[output], indices)
            if self.score is not None:
                self.score.update(of_images["logits"], indices)
            if self.rows is not None:
                self.rows.write(of_images["pool"], indices)
        self._join()

    def _join(self) -> None:
        if self.rows is not None:
            self.rows.finish()
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return
        self.pixels = self.pixels.gathered()
        self.moments = {output: one.gathered(self.accelerator) for output, one in self.moments.items()}
        if self.score is not None:
            self.score = self.score.gathered(self.accelerator)

    def describe(self) -> dict:
        """What a protocol says of the images that were read."""
        return {**self.images.describe(), "digest": self.pixels.hexdigest()}


def feature_widths(features: FeatureExtractor, size: tuple[int, int]) -> dict[str, int]:
    """The features that a network has for images of a size, and how many of each: {"pool": 2048, ...}."""
    black = torch.zeros(1, 3, *size, dtype=torch.uint8, device=device_of(features, None))
    return {name: feature.shape[1] for name, feature in features(black).items()}


def versions(features: FeatureExtractor | None = None) -> dict[str, str]:
    """Versions for a protocol."""
    packages = ["torch", "numpy", "scipy"]
    if features is not None and features.package is not None:
        packages.append(features.package)
    own = import_module(__package__.partition(".")[0]).__version__
    return {"diffusers_d2it": own} | {package: metadata.version(package) for package in packages}


def device_of(features: FeatureExtractor, accelerator: Accelerator | None) -> torch.device:
    """Where features are computed: with an Accelerator on its device, else where the network is."""
    if accelerator is not None:
        return accelerator.device
    return next((parameter.device for parameter in features.parameters()), torch.device("cpu"))


def place_of(accelerator: Accelerator | None) -> tuple[int, int]:
    """Which process this is, and of how many."""
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)


def compute_exactly() -> None:
    """Keep convolutions in float32 on a GPU, and their order the same: figures must not depend on the batch size."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
