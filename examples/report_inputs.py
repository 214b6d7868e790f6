# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What both reports on checkpoints start from: these, real images with its classes, and the metrics."""

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from checkpoint_kinds import Pipeline, find_checkpoint

from diffusers_d2it import D2iTPipeline, bundled_checkpoint, load_sampler
from diffusers_d2it.data import BadImages, load_images
from diffusers_d2it.evaluation import (
    METRIC_MINIMUM,
    Drawing,
    Evaluator,
    FeatureExtractor,
    ImageSet,
    LabelledImages,
    compute_exactly,
    draw_labelled_images,
    load_features,
)
from diffusers_d2it.sampling import describe_checkpoint, describe_scheduler
from diffusers_d2it.words import counted
from flags import image_arguments


@dataclass(frozen=True)
class ReportInputs:
    """What `prepare` makes of the flags of `add_report_arguments`.

    Attributes:
        accelerator: joins the processes.
        drawings: how images are drawn, by checkpoint.
        data: real images, their labels, and the reference.
        bad_images: what could not be used.
        evaluator: metrics and reference.
        real: results of the real images in the place of samples: what perfect samples would get.
    """

    accelerator: Accelerator
    drawings: dict[str, Drawing]
    data: LabelledImages
    bad_images: BadImages
    evaluator: Evaluator
    real: list[dict]

    def describe(self) -> dict[str, Any]:
        """The protocol of a whole report; what is of a checkpoint, its drawing describes."""
        return {"data": self.data.description, "num_images": len(self.data.images)}


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
    names = args.checkpoint or bundled_checkpoint()
    names = names if isinstance(names, list) else [names]
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
    # The same images for all of them; each has ids of its own for the classes
    how = noted, args.resolution, args.seed, least
    data = [draw_labelled_images(source, pipe, *numbers, *how) for pipe in pipes]
    labels, data = [of_checkpoint.labels for of_checkpoint in data], data[0]
    args.num_images, args.num_reference_images = len(data.images), len(data.reference)
    if None in numbers:
        accelerator.print(
            f"{counted(args.num_images, 'image')} a row, compared with {counted(args.num_reference_images, 'other')}"
        )
    names = ("num_inference_steps", "guidance_scale", "grain_num_inference_steps", "batch_size", "seed")
    settings = {name: getattr(args, name) for name in names} | {"accelerator": accelerator}
    drawings = {
        name: Drawing(pipe, ids, **settings, checkpoint=protocol)
        for (name, (pipe, protocol)), ids in zip(loaded.items(), labels)
    }
    reading = {"batch_size": args.batch_size, "accelerator": accelerator, "seed": args.seed}
    evaluator = Evaluator(data.reference, args.metrics, features, **reading)
    real = evaluator(ImageSet.from_tensor(data.images, f"other images of {data.description}"))
    real = [asdict(result) for result in real]
    return ReportInputs(accelerator, drawings, data, noted, evaluator, real)


def markdown_table(cells: list[list[str]], first: str = "---:") -> str:
    """A table, its header first; `first` aligns the first column, the others are numbers."""
    lines = [cells[0], [first, *["---:"] * (len(cells[0]) - 1)], *cells[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_words(results: list[dict]) -> list[str]:
    """The values of results, for a table."""
    return [f"{result['value']:.4g}" for result in results]
