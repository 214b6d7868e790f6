# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What both reports on checkpoints start from: these, real images with its classes, and the metrics."""

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from checkpoint_kinds import Pipeline, find_checkpoint

from diffusers_d2it import D2iTPipeline, bundled_checkpoint, load_sampler
from diffusers_d2it.data import BadImages, ImageSource, load_images
from diffusers_d2it.data.images import check_resolution, to_pixels
from diffusers_d2it.data.loaders import usable_images
from diffusers_d2it.evaluation import (
    METRIC_MINIMUM,
    Drawing,
    Evaluator,
    FeatureExtractor,
    ImageSet,
    compute_exactly,
    load_features,
)
from diffusers_d2it.pixels import to_uint8
from diffusers_d2it.sampling import describe_checkpoint, describe_scheduler
from diffusers_d2it.sampling.reference_maps import classes_of_checkpoint
from diffusers_d2it.words import counted, listed
from flags import image_arguments


_NUM_IMAGES = 1000, 5000  # of a report, and those it compares with


@dataclass(frozen=True)
class ReportInputs:
    """What `prepare` makes of the flags of `add_report_arguments`.

    Attributes:
        accelerator: joins the processes.
        drawings: how images are drawn, by checkpoint.
        images: real ones (N, 3, R, R) uint8.
        description: the data set that they are of, in words.
        bad_images: what could not be used.
        evaluator: metrics and reference.
        real: results of the real images in the place of samples: what perfect samples would get.
    """

    accelerator: Accelerator
    drawings: dict[str, Drawing]
    images: torch.Tensor
    description: str
    bad_images: BadImages
    evaluator: Evaluator
    real: list[dict]

    def describe(self) -> dict[str, Any]:
        """The protocol of a whole report; what is of a checkpoint, its drawing describes."""
        return {"data": self.description, "num_images": len(self.images)}


def load_checkpoint(args: argparse.Namespace, name: str, accelerator: Accelerator) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline of a --checkpoint on the device, D2iT's with a grain model; and what a protocol says of it.

    Raises:
        ValueError: it cannot be loaded, or has no grain model.
    """
    try:
        with accelerator.main_process_first():
            kind, folder = find_checkpoint(name)
        pipe = kind.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        raise ValueError(f"--checkpoint {name} cannot be loaded: {error}") from error
    draws_maps = isinstance(pipe, D2iTPipeline)
    if draws_maps and pipe.grain_model is None:
        raise ValueError(f"--checkpoint {name} has no grain model, which predicts maps.")
    if args.scheduler is not None:
        pipe.scheduler = load_sampler(args.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    protocol = {"checkpoint": describe_checkpoint(folder, pipe), "dtype": args.dtype}
    protocol["scheduler"] = describe_scheduler(pipe.scheduler)
    if draws_maps:
        protocol["grain_scheduler"] = describe_scheduler(pipe.grain_scheduler)
    return pipe.to(accelerator.device), protocol


def load_report_features(args: argparse.Namespace, accelerator: Accelerator) -> FeatureExtractor:
    """The network of --features. Raises a ValueError that names the flag."""
    sys.path.append(os.getcwd())  # where the module of --features module:callable may lie
    try:
        with accelerator.main_process_first():  # which downloads
            return load_features(args.features, args.weights)
    except ValueError as error:
        raise ValueError(f"--features {args.features}: {error}") from error


def prepare(args: argparse.Namespace, bad_images: Path) -> ReportInputs:
    """Load all that a report needs. What a metric lacks is said here, before hours of sampling.

    Args:
        args: flags of `add_report_arguments`.
        bad_images: file that notes images which cannot be used.

    Raises:
        ValueError: a flag cannot be used, or does not suit the others.
    """
    compute_exactly()
    names = args.checkpoint or [bundled_checkpoint()]
    if len(set(names)) < len(names):
        raise ValueError(f"--checkpoint must name different ones, got {' '.join(names)}.")
    # The others wait while the main process compares features
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))])
    loaded = {name: load_checkpoint(args, name, accelerator) for name in names}
    pipes = [pipe for pipe, _ in loaded.values()]
    features = load_report_features(args, accelerator)
    args.resolution = args.resolution or pipes[0].trained_side
    if accelerator.is_main_process:
        bad_images.unlink(missing_ok=True)  # of an earlier report
    accelerator.wait_for_everyone()
    args.unconditional |= any(pipe.transformer.config.num_classes is None for pipe in pipes)
    noted = BadImages(bad_images)
    with accelerator.main_process_first():
        source = load_images(**image_arguments(args))
    numbers = args.num_images, args.num_reference_images
    accelerator.print(source)
    least = max(2, *(METRIC_MINIMUM[metric] for metric in args.metrics))
    classes = {name: known_classes(source, pipe) for name, (pipe, _) in loaded.items()}
    for pipe in pipes:
        check_resolution(args.resolution, pipe.vae_scale_factor * pipe.transformer.patch_size)
    # The same images for all of them; each has ids of its own for the classes
    images, labels, others = draw_images(source, *numbers, noted, args.resolution, args.seed, least)
    args.num_images, args.num_reference_images = len(images), len(others)
    if None in numbers:
        accelerator.print(
            f"{counted(args.num_images, 'image')} a row, compared with {counted(args.num_reference_images, 'other')}"
        )
    names = ("num_inference_steps", "guidance_scale", "grain_num_inference_steps", "batch_size", "seed")
    settings = {name: getattr(args, name) for name in names} | {"accelerator": accelerator}
    drawings = {}
    for name, (pipe, protocol) in loaded.items():
        ids = None if classes[name] is None else torch.tensor([classes[name][label] for label in labels])
        drawings[name] = Drawing(pipe, ids, **settings, checkpoint=protocol)
    description = source.describe(args.resolution)
    reading = {"batch_size": args.batch_size, "accelerator": accelerator, "seed": args.seed}
    evaluator = Evaluator(ImageSet.from_tensor(others, description), args.metrics, features, **reading)
    real = evaluator(ImageSet.from_tensor(images, f"other images of {description}"))
    real = [asdict(result) for result in real]
    return ReportInputs(accelerator, drawings, images, description, noted, evaluator, real)


def known_classes(source: ImageSource, pipe: Pipeline) -> dict[int, int] | None:
    """Ids of a checkpoint's classes by the labels of a data set; None for an unconditional one.

    Raises:
        ValueError: the data set has classes that the checkpoint does not have, or none.
    """
    if pipe.transformer.config.num_classes is None:
        return None
    classes = classes_of_checkpoint(source, pipe)
    missing = [repr(source.id2label[label]) for label, id in classes.items() if id is None]
    if missing:
        known = sorted((pipe.id2label or dict(enumerate(range(pipe.transformer.config.num_classes)))).items())
        raise ValueError(
            f"{source.name} has classes that the checkpoint does not have: {listed(missing, most=10)}. It has"
            f" {listed((repr(name) for _, name in known), most=10)}. `label_column` names another column, `id2label`"
            " the classes of one."
        )
    return classes


def draw_images(
    source: ImageSource,
    num_images: int | None,
    num_reference_images: int | None,
    bad_images: BadImages,
    resolution: int,
    seed: int,
    least: int,
) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Images of a data set at random, their labels, and others of it to compare with, both (N, 3, R, R) uint8.

    Others, because images whose own maps are asked for would be compared with themselves.

    Args:
        source: the data set.
        num_images, num_reference_images: of both; None for 1000 and 5000, or of a smaller set all that it has, in this
            ratio.
        bad_images: notes what cannot be used.
        resolution: R.
        seed: fixes which images are taken, and their order.
        least: images of a set that the metrics need.

    Raises:
        ValueError: the data set has too few images.
    """
    asked = num_images, num_reference_images
    number, others = (default if one is None else one for one, default in zip(asked, _NUM_IMAGES))
    images, labels = [], []
    for row, image in islice(usable_images(source.shuffled(seed).rows(), resolution, bad_images), number + others):
        images.append(to_uint8(to_pixels(image, resolution)))
        labels.append(row.label)
    found = len(images)
    if found < number + others:
        if num_images is None:
            number = max(found // 6, least) if num_reference_images is None else max(found - others, 1)
        if num_reference_images is None:
            others = max(found - number, least if num_images is None else 2)
    if number < 1 or others < 2 or found < number + others:
        raise ValueError(
            f"{source.name} has {counted(found, 'image')} that can be used: `num_images` {number} and"
            f" `num_reference_images` {others} need {number + others}. {bad_images.summary()}".rstrip()
        )
    images, reference = torch.stack(images).split([number, others])
    return images, labels[:number], reference


def markdown_table(cells: list[list[str]]) -> str:
    """A table, its header first; all columns but the first are numbers."""
    lines = [cells[0], ["---", *["---:"] * (len(cells[0]) - 1)], *cells[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_words(results: list[dict]) -> list[str]:
    """The values of results, for a table."""
    return [f"{result['value']:.4g}" for result in results]
