# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a set of samples is: the class and the seeds of each image, and the protocol that tells how it was drawn.

All that is decided about image i follows from the seed, i and the classes: neither the number of images nor batches
nor processes have a part in it, and image i of a larger set is image i of a smaller one.

A protocol (`protocol.json`) is a dictionary of JSON values:
    version           of this form
    complete          whether all images are there
    sampling          all that decides what the images are: checkpoint, classes, seed, scheduler, steps, guidance ...
    environment       device and versions, which decide about their last bits
    run               how it went: name of the checkpoint, processes, batch sizes, seconds ...; no part in the images
                      but by rounding
    mean_fine_share   of the grain maps of all images, once it is complete; of DC-DiT mean_token_share, of their cells
"""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import diffusers
import torch

from ..draws import NUM_SEEDS, generators_of, random_word
from ..files.folders import digest, file_sha256, read_json
from ..files.source import public_config
from ..files.weights import weight_files
from ..limits import check_values
from ..pipelines.base import StrictPipeline
from ..words import listed, without_paths


PROTOCOL = "protocol.json"

_VERSION = 1
_NOISE, _LABELS, _PHOTOGRAPHS = range(3)  # what a seed is for: they are independent of one another
_LIMITS = {"num_images": (1, NUM_SEEDS), "batch_size": (1, math.inf), "seed": (0, math.inf)}
_LABEL_RULES = {
    "balanced": "image i has class i modulo K of the K classes: the first N modulo K of them have one image more",
    "random": "image i has class SeedSequence(seed, spawn_key=(1, i)).generate_state(1, uint64) modulo K",
}
LABEL_SCHEMES = tuple(_LABEL_RULES)


@dataclass(frozen=True)
class SamplePlan:
    """The images of a set: which of them are drawn together, their classes and their seeds.

    Raises:
        ValueError: a number is out of range, a class stands there twice, or the scheme is unknown.
    """

    num_images: int
    batch_size: int  # images of a call of the pipeline, consecutive ones
    seed: int = 0  # another one draws another set
    classes: tuple[int, ...] | None = None  # ids, in the order in which they take turns; None: an unconditional model
    scheme: str = "balanced"  # or "random": whether images get their classes in turns, or independently of each other

    def __post_init__(self) -> None:
        check_values(vars(self), get_type_hints(SamplePlan), _LIMITS, exact=False)
        if self.scheme not in LABEL_SCHEMES:
            raise ValueError(f"`scheme` must be {' or '.join(LABEL_SCHEMES)}, got {self.scheme!r}.")
        if self.classes is not None and len(self.classes) > len(set(self.classes)):
            raise ValueError(f"`classes` must name each class once, got {list(self.classes)}.")

    def batches(self) -> list[range]:
        """The numbers of the images of each batch; the last one may have fewer."""
        starts = range(0, self.num_images, self.batch_size)
        return [range(start, min(start + self.batch_size, self.num_images)) for start in starts]

    def label(self, image: int) -> int | None:
        """The class of an image, None for an unconditional model."""
        if self.classes is None:
            return None
        turn = image if self.scheme == "balanced" else random_word(self.seed, _LABELS, image)
        return self.classes[turn % len(self.classes)]

    def labels(self, batch: range) -> list[int] | None:
        """The classes of a batch, as the pipeline takes them."""
        return None if self.classes is None else [self.label(image) for image in batch]

    def noise_seed(self, image: int) -> int:
        """The seed of the noise of an image: no two images of a set have the same."""
        return (random_word(self.seed, _NOISE) + image) % NUM_SEEDS

    def generators(self, batch: range) -> list[torch.Generator]:
        """`generators_of` the images of a batch."""
        return generators_of(batch, self.seed, _NOISE)

    def choice(self, image: int, num_choices: int) -> int:
        """A number below `num_choices` for an image, uniform: which photograph it takes its grain map from."""
        return random_word(self.seed, _PHOTOGRAPHS, image) % num_choices

    def describe(self) -> dict[str, Any]:
        """The part of a protocol that the plan decides."""
        labels = None
        if self.classes is not None:
            labels = {"scheme": self.scheme, "rule": _LABEL_RULES[self.scheme], "classes": list(self.classes)}
        noise = {"first": self.noise_seed(0), "rule": "image i: torch.Generator().manual_seed((first + i) % 2**32)"}
        return {"num_images": self.num_images, "seed": self.seed, "noise_seeds": noise, "labels": labels}


# ---------------------------------------------------------------------------------------------------------------------
# The protocol
# ---------------------------------------------------------------------------------------------------------------------


def new_protocol(sampling: Mapping[str, Any], device: torch.device, checkpoint: str) -> dict[str, Any]:
    """The protocol of a set of which nothing has been drawn yet, as it will be read back.

    `sampling` is all that decides what the images are. Of a checkpoint that is an absolute path the last part is kept.
    """
    protocol = {
        "version": _VERSION,
        "complete": False,
        "sampling": sampling,
        "environment": {
            "device": device.type,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "diffusers_d2it": import_module(__package__.partition(".")[0]).__version__,
        },
        "run": {"checkpoint": without_paths(checkpoint)},
    }
    return json.loads(json.dumps(protocol))


def read_protocol(folder: str | Path) -> dict[str, Any]:
    """The protocol of a folder of samples.

    Raises:
        ValueError: it is missing, damaged, or of another form.
    """
    path = Path(folder) / PROTOCOL
    protocol = read_json(path)
    parts = [protocol.get(name) for name in ("sampling", "environment", "run")]
    if protocol.get("version") != _VERSION or not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            f"{path} is no protocol of samples, version {_VERSION}: it holds {listed(protocol) or 'nothing'}."
        )
    return protocol


def describe_checkpoint(folder: str | Path, pipe: StrictPipeline) -> dict[str, Any]:
    """A checkpoint by its contents, wherever it lies: a folder, and the pipeline that was loaded from there.

    Returns:
        {"weights_sha256", "configs_sha256"} of each model. For weights in one file it is the SHA-256 of that file, for
        shards that of their names and hashes.
    """
    weights, configs = {}, {}
    for component in pipe._models:
        if (model := getattr(pipe, component)) is not None:
            files = weight_files(Path(folder, component))
            hashes = {path.name: file_sha256(path) for path in files if path.suffix == ".safetensors"}
            weights[component] = next(iter(hashes.values())) if len(hashes) == 1 else digest(hashes)
            configs[component] = digest(public_config(model.config))
    return {"weights_sha256": weights, "configs_sha256": configs}


def describe_scheduler(scheduler: Any) -> dict[str, Any]:
    """Class and configuration of a scheduler."""
    return {"class": type(scheduler).__name__, "config": public_config(scheduler.config)}
