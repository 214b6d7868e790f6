# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the reports on a checkpoint start from: their flags, the checkpoint, and real images with its classes."""

import argparse
import math
import os
import sys
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

from ..data.bad_images import BadImages
from ..data.images import check_resolution, to_pixels
from ..data.loaders import usable_images
from ..data.source import ImageSource, load_images
from ..pipelines.labels import label_ids
from ..pipelines.pipeline_d2it import D2iTPipeline
from ..presets import load_sampler
from ..sampling.sets import describe_checkpoint, describe_scheduler
from .evaluate import Evaluator
from .features import FeatureExtractor, load_features
from .images import ImageSet
from .map_sources import Sampling
from .report_scores import score


METRICS = ("fid", "sfid", "is", "precision", "recall")  # KID wants a subset size, and more images than a row has


def check_report_arguments(args: argparse.Namespace) -> None:
    """Raise a ValueError that names the flag unless the numbers of the reports can be used."""
    least = {"num_images": 1, "num_reference_images": 2, "num_inference_steps": 1, "grain_num_inference_steps": 1}
    for name, minimum in (least | {"batch_size": 1, "seed": 0}).items():
        if getattr(args, name) < minimum:
            raise ValueError(f"--{name} must be at least {minimum}, got {getattr(args, name)}.")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How the flags of the reports want images to be drawn."""
    return Sampling(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        grain_num_inference_steps=args.grain_num_inference_steps,
        batch_size=args.batch_size,
        seed=args.seed,
    )


def load_checkpoint(args: argparse.Namespace, accelerator: Accelerator) -> tuple[D2iTPipeline, dict[str, Any]]:
    """The pipeline of --checkpoint, with a grain model, on the device; and what a protocol says of it.

    Raises:
        ValueError: it cannot be loaded, or has no grain model.
    """
    try:
        with accelerator.main_process_first():
            folder = args.checkpoint if os.path.isdir(args.checkpoint) else D2iTPipeline.download(args.checkpoint)
        pipe = D2iTPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        raise ValueError(f"--checkpoint {args.checkpoint} cannot be loaded: {error}") from error
    if pipe.grain_model is None:
        raise ValueError(f"--checkpoint {args.checkpoint} has no grain model, which predicts maps.")
    if args.scheduler is not None:
        pipe.scheduler = load_sampler(args.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    protocol = {
        "checkpoint": describe_checkpoint(folder, pipe),
        "dtype": args.dtype,
        "scheduler": describe_scheduler(pipe.scheduler),
        "grain_scheduler": describe_scheduler(pipe.grain_scheduler),
    }
    return pipe.to(accelerator.device), protocol


def load_report_features(args: argparse.Namespace, accelerator: Accelerator) -> FeatureExtractor:
    """The network of --features, on the device.

    Raises:
        ValueError: it cannot be loaded.
    """
    sys.path.append(os.getcwd())  # where the module of --features module:callable may lie
    try:
        with accelerator.main_process_first():  # which downloads
            return load_features(args.features, args.weights).to(accelerator.device)
    except ValueError as error:
        raise ValueError(f"--features {args.features}: {error}") from error


@dataclass(frozen=True)
class LabelledImages:
    """Real images of a data set, drawn at random, and others of it to compare with.

    Attributes:
        images: (N, 3, R, R) uint8.
        labels: (N,) int64, ids of the checkpoint's classes; None for an unconditional one.
        reference: M other images of the same data set.
        description: the data set in words.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    reference: ImageSet
    description: str


def load_labelled_images(
    args: argparse.Namespace, pipe: D2iTPipeline, bad_images: BadImages, accelerator: Accelerator
) -> LabelledImages:
    """The images of the data flags, in an order that --seed fixes.

    The reference is of other images than the first ones: images whose own maps are asked for would be compared with
    themselves.

    Args:
        args: flags of the reports; a `resolution` of None becomes that of the checkpoint.
        pipe: the checkpoint.
        bad_images: notes what cannot be used.
        accelerator: its main process prepares the data set first; then all read the images.

    Raises:
        ValueError: the data set has too few images, other classes than the checkpoint, or none; --resolution does not
            suit the checkpoint; or what `load_images` raises.
    """
    if args.resolution is None:
        args.resolution = pipe.transformer.config.sample_size * pipe.vae.downsample_factor
    check_resolution(args.resolution, pipe.vae.region_size)
    if pipe.transformer.config.num_classes is None:
        args.unconditional = True
    with accelerator.main_process_first():
        source = load_images(
            args.train_data_dir or args.dataset_name,
            split=args.split,
            config_name=args.dataset_config_name,
            streaming=args.streaming,
            image_column=args.image_column,
            labelled=not args.unconditional,
            label_column=args.label_column,
            num_classes=args.num_classes,
            id2label=args.id2label,
        )
    classes = classes_of_checkpoint(source, pipe)
    needed = args.num_images + args.num_reference_images
    images, labels = [], []
    for row, image in islice(usable_images(source.shuffled(args.seed).rows(), args.resolution, bad_images), needed):
        images.append(((to_pixels(image, args.resolution) + 1) * 127.5).round().to(torch.uint8))
        labels.append(row.label)
    if len(images) < needed:
        raise ValueError(
            f"{source.name} has {len(images)} images that can be used: --num_images {args.num_images} and"
            f" --num_reference_images {args.num_reference_images} need {needed}. {bad_images.summary()}".rstrip()
        )
    images, reference = torch.stack(images).split([args.num_images, args.num_reference_images])
    labels = None if classes is None else torch.tensor([classes[label] for label in labels[: args.num_images]])
    description = source.describe(args.resolution)
    return LabelledImages(images, labels, ImageSet.from_tensor(reference, description), description)


def score_real_images(
    args: argparse.Namespace,
    data: LabelledImages,
    features: FeatureExtractor,
    sampling: Sampling,
    accelerator: Accelerator | None = None,
) -> list[dict]:
    """`score` of the real images in the place of samples: what perfect samples would get with as many images.

    It comes before anything is drawn, so what a metric lacks is said before hours of sampling.

    Raises:
        ValueError: what `score` raises, with the flags that it is about.
    """
    protocol = {"name": f"other images of {data.description}"}
    try:
        reading = {"batch_size": sampling.batch_size, "accelerator": accelerator, "seed": sampling.seed}
        return score(data.images, protocol, Evaluator(data.reference, args.metrics, features, **reading))
    except ValueError as error:
        flags = "--metrics, --features, --num_images, --num_reference_images"
        raise ValueError(f"one of {flags} does not suit the others: {error}") from error


def classes_of_checkpoint(source: ImageSource, pipe: D2iTPipeline) -> dict[int, int] | None:
    """The checkpoint's class of every label of a data set; None for an unconditional checkpoint.

    A class is found by its name, one of several separated by commas, or by its number, if the data set knows no names.

    Raises:
        ValueError: the data set has no classes, or some that the checkpoint does not have.
    """
    num_classes = pipe.transformer.config.num_classes
    if num_classes is None:
        return None
    if source.id2label is None:
        raise ValueError(
            f"{source.name} has no classes, and the checkpoint draws images of {num_classes}: name a --label_column,"
            " or pass a folder with a sub-folder for each class."
        )
    known = pipe.id2label
    if known is None:  # then numbers are all there is
        known = {id: str(id) for id in range(num_classes)}
        found = {label: label if label in known else None for label in source.id2label}
    else:
        found = {label: _class_of(label, name, known) for label, name in source.id2label.items()}
    missing = [source.id2label[label] for label, id in found.items() if id is None]
    if missing:
        raise ValueError(
            f"{source.name} has classes that --checkpoint does not have: {_shown(missing)}. It has"
            f" {_shown([known[id] for id in sorted(known)])}. --label_column names another column, --id2label the"
            " classes of one."
        )
    return found


def _class_of(label: int, name: str, known: dict[int, str]) -> int | None:
    names = [name, *_parts(name)]
    if label in known and (name == str(label) or set(names) & {known[label], *_parts(known[label])}):
        return label
    for one in names:
        try:
            return label_ids(one, known)[0]
        except ValueError:  # unknown, or of several classes
            continue
    return None


def _parts(names: str) -> list[str]:
    return [part.strip() for part in names.split(",")]


def _shown(names: list[str], most: int = 10) -> str:
    return ", ".join(map(repr, names[:most])) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def finite(value: Any) -> Any:
    """Values of JSON, with None for numbers that JSON does not have: NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
