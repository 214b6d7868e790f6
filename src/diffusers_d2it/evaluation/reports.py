# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint drawn in several ways: how good the images are by arguments of the pipeline, and what they cost.

Table 5 of arXiv:2504.09454 is such a comparison (examples/grain_report.py), and so are budgets (budget_report.py).

    drawing = Drawing(pipe, labels)
    evaluator = Evaluator(reference, ["fid"], features)
    rows = compare(drawing, {"0.3": {"fine_ratio": 0.3}, "1": {"fine_ratio": 1.0}}, evaluator, shape=(N, 3, 256, 256))

Shapes:
    N images, H W their sides in pixels, h w sides of a map in regions
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch

from ..data.bad_images import BadImages
from ..data.images import check_resolution, to_pixels
from ..data.loaders import usable_images
from ..data.source import ImageSource
from ..files import gather, on_main_process
from ..pipelines.pipeline_d2it import D2iTPipeline
from ..pipelines.pipeline_dcdit import DCDiTPipeline
from ..pixels import to_uint8, unit_to_uint8
from ..sampling.reference_maps import classes_of_checkpoint
from ..words import counted, listed
from .cost import ForwardMeter, TimedCall, cost_of
from .drawing import Drawing
from .evaluate import Evaluator
from .images import ImageSet


_NUM_IMAGES = 1000, 5000  # of a report, and those it compares with
_COUNTED_IMAGES = 8  # of which multiply-adds are counted


@dataclass(frozen=True)
class Row:
    """What `compare` finds of one way to draw."""

    name: str
    results: list[dict]  # of `evaluate`, as dictionaries {"metric", "value", "protocol", "deviation"}
    images: torch.Tensor  # that were drawn, (N, 3, H, W) uint8
    cost: dict[str, Any] | None = None  # of an image, if asked for: `cost_of` calls, and "macs" of all its passes


def compare(
    drawing: Drawing | Mapping[str, Drawing],
    rows: Mapping[str, Mapping[str, Any]],
    evaluator: Evaluator,
    shape: tuple[int, int, int, int],
    *,
    title: str = "samples, {}",
    protocol: Mapping[str, Any] | None = None,
    costs: bool = False,
    progress: bool = False,
) -> list[Row]:
    """How good images are, and what they cost, by arguments of the pipeline; labels and noise are those of all rows.

    The rows take turns batch by batch, so that whatever slows the machine down slows all of them.

    Args:
        drawing: how images are drawn, in all rows or in each by its name: rows may be of several checkpoints. These
            have one number of images, one batch size and one accelerator.
        rows: the arguments of the pipeline for each row, by its name. A tensor has a part for each image, (N, ...).
        evaluator: metrics and reference.
        shape: (N, 3, H, W) of the images of a row.
        title: what protocols call the images of a row, with its name for {}.
        protocol: what else they say of the samples beside the arguments of the row; of a tensor they say its name.
        costs: whether cost is measured. Seconds of several processes are those of processes that work side by side.
        progress: show a bar.

    Raises:
        ValueError: there are other than N labels; or what `evaluate` and the pipeline raise.
    """
    drawings = drawing if isinstance(drawing, Mapping) else dict.fromkeys(rows, drawing)
    first = next(iter(drawings.values()))
    size, calls = shape[2:], {name: [] for name in rows}

    def draw(images: slice) -> torch.Tensor:
        drawn = []
        for name, arguments in rows.items():
            if costs:
                samples, call = _timed_call(drawings[name], images, size, arguments)
                calls[name].append(call)
            else:
                samples = unit_to_uint8(drawings[name].call(images, size, **arguments).images).cpu()
            drawn.append(samples)
        return torch.stack(drawn, dim=1)

    if costs:
        for name, arguments in rows.items():
            warm_up = replace(drawings[name], num_inference_steps=min(2, drawings[name].num_inference_steps))
            _timed_call(warm_up, slice(0, min(shape[0], first.batch_size)), size, arguments)
    samples = torch.zeros(shape[0], len(rows), *shape[1:], dtype=torch.uint8)
    samples = first.over_images(draw, samples, "sampling" if progress else None)
    parts = gather(first.accelerator, calls)

    found = []
    for (name, arguments), images in zip(rows.items(), samples.unbind(1)):
        plain = {key: name if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
        one = drawings[name]
        told = {**one.describe(), **plain, **(protocol or {})}
        results = evaluator(ImageSet.from_tensor(images, title.format(name), told, one.labels))
        cost = None
        if costs:
            macs = on_main_process(first.accelerator, lambda one=one, a=arguments: _count_macs(one, shape, a))
            cost = cost_of([call for part in parts for call in part[name]]) | {"macs": macs}
        found.append(Row(name, [asdict(result) for result in results], images, cost))
    return found


def _timed_call(
    drawing: Drawing,
    images: slice,
    size: tuple[int, int],
    arguments: Mapping[str, Any],
) -> tuple[torch.Tensor, TimedCall]:
    """Images of a batch on the CPU, and what they cost."""
    start = time.perf_counter()
    with ForwardMeter(drawing.pipe.transformer) as meter:
        output = drawing.call(images, size, **arguments)
        samples = unit_to_uint8(output.images).cpu()  # which waits for the device
    seconds = time.perf_counter() - start
    return samples, TimedCall(len(samples), seconds, meter.step_seconds(), meter.tokens)


def _count_macs(drawing: Drawing, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> float:
    """Multiply-adds of an image in all passes of a call, mean over the first images of a row, drawn one by one."""
    number = min(_COUNTED_IMAGES, drawing.batch_size, shape[0])
    with ForwardMeter(drawing.pipe.transformer, counts_macs=True) as meter:
        for image in range(number):
            drawing.call(slice(image, image + 1), shape[2:], **arguments, output_type="latent")
    return meter.total_macs / number


# ---------------------------------------------------------------------------------------------------------------------
# Real images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledImages:
    """Real images of a data set, drawn at random, and others of it to compare with."""

    images: torch.Tensor  # (N, 3, R, R) uint8
    labels: torch.Tensor | None  # (N,) int64, ids of the checkpoint's classes; None for an unconditional one
    reference: ImageSet  # M other images of the same data set
    description: str  # the data set in words


def draw_labelled_images(
    source: ImageSource,
    pipe: D2iTPipeline | DCDiTPipeline,
    num_images: int | None,
    num_reference_images: int | None,
    bad_images: BadImages,
    resolution: int | None = None,
    seed: int = 0,
    least: int = 2,
) -> LabelledImages:
    """Images of a data set for a report on a checkpoint.

    The reference is of other images: those whose own maps are asked for would be compared with themselves.

    Args:
        source, pipe: the data set and the checkpoint.
        num_images, num_reference_images: N and M; None for 1000 and 5000, or of a smaller set all that it has, in this
            ratio.
        bad_images: notes what cannot be used.
        resolution: R; None for that of the checkpoint.
        seed: fixes which images are taken, and their order.
        least: images of a set that the metrics need.

    Raises:
        ValueError: the data set has too few images, other classes than the checkpoint, or none; or the resolution does
            not suit the checkpoint.
    """
    resolution = resolution or pipe.trained_side
    check_resolution(resolution, pipe.vae_scale_factor * pipe.transformer.patch_size)
    classes = None if pipe.transformer.config.num_classes is None else _known_classes(source, pipe)
    asked = num_images, num_reference_images
    num_images, num_reference_images = (default if one is None else one for one, default in zip(asked, _NUM_IMAGES))
    needed = num_images + num_reference_images
    images, labels = [], []
    for row, image in islice(usable_images(source.shuffled(seed).rows(), resolution, bad_images), needed):
        images.append(to_uint8(to_pixels(image, resolution)))
        labels.append(row.label)
    if len(images) < needed and None in asked:
        if asked == (None, None) and len(images) < 2 * least:
            raise ValueError(
                f"{source.name} has {counted(len(images), 'image')} that can be used: a report of these metrics needs"
                f" {2 * least}, half of them to be compared with. {bad_images.summary()}".rstrip()
            )
        if asked[0] is None:
            num_images = max(len(images) // 6, least) if asked[1] is None else len(images) - asked[1]
        if asked[1] is None:
            num_reference_images = len(images) - num_images
    if num_images < 1 or num_reference_images < 2 or len(images) < num_images + num_reference_images:
        raise ValueError(
            f"{source.name} has {counted(len(images), 'image')} that can be used: `num_images` {num_images} and"
            f" `num_reference_images` {num_reference_images} need {needed}. {bad_images.summary()}".rstrip()
        )
    images, reference = torch.stack(images).split([num_images, num_reference_images])
    labels = None if classes is None else torch.tensor([classes[label] for label in labels[:num_images]])
    description = source.describe(resolution)
    return LabelledImages(images, labels, ImageSet.from_tensor(reference, description), description)


def _known_classes(source: ImageSource, pipe: D2iTPipeline | DCDiTPipeline) -> dict[int, int]:
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
