# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""One checkpoint drawn in several ways: how good the images are by arguments of the pipeline, and what they cost.

Table 5 of arXiv:2504.09454 is such a comparison (examples/grain_report.py), and so are budgets (budget_report.py).

    drawing = Drawing(pipe, labels)
    evaluator = Evaluator(reference, ["fid"], features)
    rows = compare(drawing, {"0.3": {"fine_ratio": 0.3}, "1": {"fine_ratio": 1.0}}, evaluator, shape=(N, 3, 256, 256))

Shapes:
    N images, H W their sides in pixels, h w sides of a map in regions
"""

import time
from collections.abc import Callable, Mapping
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
from ..pixels import to_uint8, unit_to_uint8
from ..sampling.reference_maps import classes_of_checkpoint
from ..words import counted, listed
from .cost import ForwardMeter, TimedCall, cost_of
from .drawing import Drawing
from .evaluate import Evaluator
from .images import ImageSet


_NUM_IMAGES = 1000, 5000  # of a report, and those it compares with
_COUNTED_IMAGES, _COUNTED_STEPS = 8, 10  # of which multiply-adds are counted


@dataclass(frozen=True)
class Row:
    """What `compare` finds of one way to draw."""

    name: str
    results: list[dict]  # of `evaluate`, as dictionaries {"metric", "value", "protocol", "deviation"}
    images: torch.Tensor  # that were drawn, (N, 3, H, W) uint8
    cost: dict[str, Any] | None = None  # of an image: `cost_of` the calls, and "macs_per_forward"; None: not asked for


def compare(
    drawing: Drawing,
    rows: Mapping[str, Mapping[str, Any]],
    evaluator: Evaluator,
    shape: tuple[int, int, int, int],
    *,
    title: str = "samples, {}",
    protocol: Mapping[str, Any] | None = None,
    costs: bool = False,
    averaged: Callable[[Any], dict[str, torch.Tensor]] | None = None,
    progress: bool = False,
) -> list[Row]:
    """How good images are, and what they cost, by arguments of the pipeline; labels and noise are those of all rows.

    The rows take turns batch by batch, so that whatever slows the machine down slows all of them.

    Args:
        drawing: how images are drawn.
        rows: the arguments of the pipeline for each row, by its name. A tensor has a part for each image, (N, ...).
        evaluator: metrics and reference.
        shape: (N, 3, H, W) of the images of a row.
        title: what protocols call the images of a row, with its name for {}.
        protocol: what else they say of the samples beside the arguments of the row; of a tensor they say its name.
        costs: whether cost is measured. Seconds of several processes are those of processes that work side by side.
        averaged: what else is averaged with the costs, (B,) by names, from an output of the pipeline.
        progress: show a bar.

    Raises:
        ValueError: there are other than N labels; or what `evaluate` and the pipeline raise.
    """
    size, calls = shape[2:], {name: [] for name in rows}

    def draw(images: slice) -> torch.Tensor:
        drawn = []
        for name, arguments in rows.items():
            if costs:
                samples, call = _timed_call(drawing, images, size, arguments, averaged)
                calls[name].append(call)
            else:
                samples = unit_to_uint8(drawing.call(images, size, **arguments).images).cpu()
            drawn.append(samples)
        return torch.stack(drawn, dim=1)

    if costs:
        warm_up = replace(drawing, num_inference_steps=min(2, drawing.num_inference_steps))
        for arguments in rows.values():
            _timed_call(warm_up, slice(0, min(shape[0], drawing.batch_size)), size, arguments, None)
    samples = torch.zeros(shape[0], len(rows), *shape[1:], dtype=torch.uint8)
    samples = drawing.over_images(draw, samples, "sampling" if progress else None)
    parts = gather(drawing.accelerator, calls)

    found = []
    for (name, arguments), images in zip(rows.items(), samples.unbind(1)):
        plain = {key: name if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
        told = {**drawing.describe(), **plain, **(protocol or {})}
        results = evaluator(ImageSet.from_tensor(images, title.format(name), told, drawing.labels))
        cost = None
        if costs:
            macs = on_main_process(drawing.accelerator, lambda a=arguments: _count_macs(drawing, shape, a))
            cost = cost_of([call for part in parts for call in part[name]]) | {"macs_per_forward": macs}
        found.append(Row(name, [asdict(result) for result in results], images, cost))
    return found


def _timed_call(
    drawing: Drawing,
    images: slice,
    size: tuple[int, int],
    arguments: Mapping[str, Any],
    averaged: Callable[[Any], dict[str, torch.Tensor]] | None,
) -> tuple[torch.Tensor, TimedCall]:
    """Images of a batch on the CPU, and what they cost."""
    start = time.perf_counter()
    with ForwardMeter(drawing.pipe.transformer) as meter:
        output = drawing.call(images, size, **arguments)
        samples = unit_to_uint8(output.images).cpu()  # which waits for the device
    seconds = time.perf_counter() - start
    found = {} if averaged is None else {name: one.double().mean().item() for name, one in averaged(output).items()}
    return samples, TimedCall(len(samples), seconds, meter.step_seconds(), meter.tokens, found)


def _count_macs(drawing: Drawing, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> float:
    """Multiply-adds of an image in a pass without guidance, mean over the first images of a row and over steps."""
    alone = replace(drawing, guidance_scale=1.0, num_inference_steps=min(_COUNTED_STEPS, drawing.num_inference_steps))
    with ForwardMeter(drawing.pipe.transformer, counts_macs=True) as meter:
        for image in range(min(_COUNTED_IMAGES, drawing.batch_size, shape[0])):
            alone.call(slice(image, image + 1), shape[2:], **arguments, output_type="latent")
    return meter.macs


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
    pipe: D2iTPipeline,
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
    resolution = resolution or pipe.transformer.config.sample_size * pipe.vae.downsample_factor
    check_resolution(resolution, pipe.vae.region_size)
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


def _known_classes(source: ImageSource, pipe: D2iTPipeline) -> dict[int, int]:
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
