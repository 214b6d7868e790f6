# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""True grain maps for a set of samples: each takes that of a real photograph of its class."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..data.images import UnusableImageError, decode_image, to_pixels
from ..data.source import ImageSource, load_images
from ..grains import grain_map_from_entropy
from ..pipelines.labels import class_of
from ..words import listed, printable
from .sets import SamplePlan


logger = logging.getLogger(__name__)

_THREADS = 4  # that decode photographs


class ReferenceMaps:
    """Grain maps of photographs by their entropy, as Dynamic Grained Coding makes them in training.

        maps = ReferenceMaps("photos", pipe, plan, resolution=256)
        pipe(plan.labels(batch), grain_map=maps(batch), generator=plan.generators(batch))

    Image i takes the map of a photograph of its class, drawn with its own seed from all of them, so some photographs
    are taken several times; for one that cannot be used, the next of its class. Classes are matched by their names,
    or where they are only numbers by their ids.

    Args:
        path: folder of photographs by class, .parquet, WebDataset .tar or name on the Hub, as in training.
        pipe: its autoencoder makes the maps.
        plan: the images, and their classes.
        resolution: photographs are resized and cropped to this side in pixels.
        fine_ratio: share of fine regions over the calibration set; None for the autoencoder's default.

    Raises:
        ValueError: the photographs cannot be read, have no classes, or none of a class that is needed; or the
            autoencoder has not been calibrated.
    """

    def __init__(
        self, path: str, pipe: DiffusionPipeline, plan: SamplePlan, resolution: int, fine_ratio: float | None = None
    ):
        self.vae, self.plan, self.resolution = pipe.vae, plan, resolution
        self.thresholds = pipe.vae.thresholds(fine_ratio)
        self.left_out: dict[str, str] = {}  # why photographs cannot be used
        self.source = load_images(path, labelled=plan.classes is not None)
        if plan.classes is None:
            self._rows = {None: range(self.source.num_rows)}
            return
        self._rows: dict[int | None, list[int]] = {}  # of each class
        classes = classes_of_checkpoint(self.source, pipe)
        for row in range(self.source.num_rows):
            self._rows.setdefault(classes[self.source[row].label], []).append(row)
        lacking = [id for id in plan.classes if id not in self._rows]
        if lacking:
            named = f"{lacking[0]} ({pipe.id2label[lacking[0]]})" if pipe.id2label else str(lacking[0])
            raise ValueError(
                f"{path} has no photograph of class {named}, its classes are"
                f" {listed(self.source.id2label.values(), 10)}: each class of the samples needs one."
            )

    def __call__(self, batch: range) -> torch.Tensor:
        """The maps of a batch of images, (B, h, w) int64.

        Raises:
            ValueError: no photograph of a class can be used; one of them is named.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            pixels = torch.stack(list(pool.map(self._photograph, batch)))
        return grain_map_from_entropy(self.vae.region_entropy(pixels.to(self.vae.device)), self.thresholds)

    def describe(self) -> dict[str, Any]:
        """The part of a protocol that says where the maps come from."""
        rule = (
            "image i: SeedSequence(seed, spawn_key=(2, i)).generate_state(1, uint64) modulo those of its class, or the"
            " next that can be used"
        )
        photographs, fingerprint = self.source.describe(self.resolution), self.source.fingerprint
        return {"photographs": photographs, "fingerprint": fingerprint, "rule": rule}

    def _photograph(self, image: int) -> torch.Tensor:
        candidates = self._rows[self.plan.label(image)]
        first = self.plan.choice(image, len(candidates))
        for row in map(self.source.__getitem__, (*candidates[first:], *candidates[:first])):
            try:
                return to_pixels(decode_image(row.encoded), self.resolution)
            except UnusableImageError as error:
                if row.name not in self.left_out:
                    logger.warning("image %r is left out: %s", printable(row.name), error)
                self.left_out[row.name] = str(error)
        raise ValueError(f"no photograph of the class can be used: {row.name}: {self.left_out[row.name]}.")


def classes_of_checkpoint(source: ImageSource, pipe: DiffusionPipeline) -> dict[int, int | None]:
    """The checkpoint's class of every label of a data set, by `class_of`.

    Raises:
        ValueError: the data set has no classes.
    """
    num_classes = pipe.transformer.config.num_classes
    if source.id2label is None:
        raise ValueError(
            f"{source.name} has no classes, and the checkpoint draws images of {num_classes}: name a `label_column`,"
            " or pass a folder with a sub-folder for each class."
        )
    return {label: class_of(label, name, pipe.id2label, num_classes) for label, name in source.id2label.items()}
