# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Batches in an order that can be resumed.

Everything random in training is a function of the seed and of a position: the order of the images of (seed, epoch),
the flip of an image of (seed, epoch, index), its noise, timestep and all else of (seed, its number in the run). Images
are numbered through the batch of an update, the part of each process after the other. So a run that was interrupted
continues exactly with any number of workers, and with any number of processes and forward passes that make up the same
batch. Only a stream has no index: there the worker and the position in its part take its place, and a run continues
exactly with as many processes and workers as before.
"""

import copy
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, cycle, islice

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..draws import generators_of
from ..words import counted
from .bad_images import BadImages
from .images import UnusableImageError, check_size, decode_image, to_pixels
from .source import ImageSource, Row


MAX_UNUSABLE = 1000  # so many in a row, and the images are not what they should be
_ORDER = 6  # keeps its seeds apart from those of sets of samples


Place = tuple[int, int]  # epoch, and index of the image in the data set


def place_of_item(item: int | Place) -> Place:
    """What a data set is asked for; an index alone is of the first epoch."""
    return item if isinstance(item, tuple) else (0, item)


def global_batches(
    num_images: int, batch_size: int, seed: int, first_pass: int, process_index: int, num_processes: int
) -> Iterator[list[Place]]:
    """The images of one process in all forward passes from one on, without end.

    Every epoch is a new order of all images, and the next one follows within a batch. The images of a pass are shared
    out in runs of `batch_size`: together with those of the other processes, and of the other passes of an update, they
    are the next ones of that order, however many processes and passes there are.

    Args:
        num_images: of the data set.
        batch_size: images of a process in a forward pass.
        seed: with the epoch it decides the order.
        first_pass: number of the pass that is begun with.
        process_index, num_processes: whose images.
    """
    epoch, order = -1, torch.empty(0)
    for number in count(first_pass):
        start, places = (number * num_processes + process_index) * batch_size, []
        for image in range(start, start + batch_size):
            if image // num_images != epoch:
                epoch = image // num_images
                (generator,) = generators_of(range(1), seed, _ORDER, epoch)
                order = torch.randperm(num_images, generator=generator)
            places.append((epoch, int(order[image % num_images])))
        yield places


class _Images(Dataset):
    """What data sets of a source have in common, and with `LatentCache` what they say of themselves."""

    def __init__(self, source: ImageSource, resolution: int, seed: int, bad_images: BadImages):
        self.source = source
        self.resolution = resolution
        self.seed = seed
        self.bad_images = bad_images
        self.num_classes = source.num_classes
        self.id2label = source.id2label
        self.description = source.describe(resolution)
        self.fingerprint = source.fingerprint

    def _item(self, row: Row, image: PIL.Image.Image, position: str) -> dict[str, torch.Tensor]:
        flip = random.Random(f"{self.seed}/{position}").random() < 0.5
        return {"pixels": to_pixels(image, self.resolution, flip), "class_labels": torch.tensor(row.label)}


class ImageDataset(_Images):
    """Images and labels of a map-style source, randomly flipped.

    Items are {"pixels": (3, R, R) in [-1, 1], "class_labels": int64 scalar}; the label is 0 without classes. An image
    that cannot be used is noted, and another one stands in: the first usable one at 1, 2, 4, 8, ... places after it, a
    function of the index alone.

    Args:
        source: the images.
        resolution: R.
        seed: with the epoch and the index it decides every flip.
        bad_images: notes what cannot be used.

    Attributes:
        num_classes: size of the label table, None without classes.
        id2label: names of the classes by id, None without classes.
        description: the images in words.
        fingerprint: changes when the images do.
    """

    def __len__(self) -> int:
        return self.source.num_rows

    def __getitem__(self, item: int | Place) -> dict[str, torch.Tensor]:
        """An image and its label.

        Raises:
            ValueError: neither the image nor any that could stand in for it can be used, or a label is not valid.
        """
        epoch, index = place_of_item(item)
        rows = (self.source[i] for i in _stand_ins(index, len(self)))
        row, image = next(usable_images(rows, self.resolution, self.bad_images), (None, None))
        if row is None:
            raise self.bad_images.none_usable(self.source.name)
        return self._item(row, image, f"{epoch}/{index}")


class ImageStream(_Images, IterableDataset):
    """Images and labels of a stream without end, shuffled anew in every epoch, randomly flipped.

    Items, arguments and attributes are those of `ImageDataset`; of the source, process `process_index` out of
    `num_processes` reads its part. The stream goes on from one epoch to the next within a batch, so no image is left
    out but those that cannot be used, which are noted.
    """

    def __init__(
        self,
        source: ImageSource,
        resolution: int,
        seed: int,
        bad_images: BadImages,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        super().__init__(source.part(process_index, num_processes), resolution, seed, bad_images)
        self.process_index = process_index
        self.num_skipped = 0  # images of each worker

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Images and labels for ever.

        Raises:
            ValueError: a whole epoch, or `MAX_UNUSABLE` images in a row, cannot be used; a label is not valid; or the
                stream cannot be read on.
        """
        worker = get_worker_info()
        place = f"{self.process_index}/{0 if worker is None else worker.id}"
        # What is skipped is not decoded: the run that is resumed has noted which of these images cannot be used
        to_skip = self.num_skipped
        known_bad = self.bad_images.found() if to_skip else {}
        epoch = 0
        while True:
            # The epoch of datasets itself is shared by workers, which come to its end at different times
            seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
            rows = self.source.shuffled(int(seed)).stream()
            position = 0
            if to_skip:
                usable = (row for row in rows if row.name not in known_bad)
                position = sum(1 for _ in islice(usable, to_skip))
                to_skip -= position
            for row, image in usable_images(rows, self.resolution, self.bad_images):
                yield self._item(row, image, f"{epoch}/{place}/{position}")
                position += 1
            if position == 0:
                raise self.bad_images.none_usable(f"{self.source.name}, worker {place}")
            epoch += 1


@dataclass(frozen=True)
class OrderedLoader:
    """Batches of a map-style data set in the order of `global_batches`; `Accelerator.prepare` leaves it as it is."""

    dataset: Dataset
    batch_size: int
    num_workers: int
    accelerator: Accelerator

    def batches_from(self, first_pass: int) -> Iterator[dict]:
        """Those of this process, on its device, without end, from a forward pass on."""
        place = self.accelerator.process_index, self.accelerator.num_processes
        loader = DataLoader(
            self.dataset,
            batch_sampler=global_batches(len(self.dataset), self.batch_size, self.dataset.seed, first_pass, *place),
            num_workers=self.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            collate_fn=getattr(self.dataset, "collate", None),
            worker_init_fn=_leave_process_group,
            generator=torch.Generator(),  # not the global one
        )
        for batch in loader:
            yield send_to_device(batch, self.accelerator.device, non_blocking=True)


@dataclass(frozen=True)
class StreamLoader:
    """Full batches of an `ImageStream` on the device of the process; `Accelerator.prepare` leaves it as it is."""

    dataset: ImageStream
    batch_size: int
    num_workers: int
    device: torch.device

    def batches_from(self, first_pass: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches without end. What lies before the first one is read again, but not decoded."""
        # Workers take turns: each one skips its share of the whole rounds by itself
        num_rounds, rest = divmod(first_pass, max(1, self.num_workers))
        stream = copy.copy(self.dataset)
        stream.num_skipped = num_rounds * self.batch_size
        loader = DataLoader(
            stream,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            worker_init_fn=_leave_process_group,
            generator=torch.Generator(),  # not the global one
        )
        for batch in islice(loader, rest, None):
            yield send_to_device(batch, self.device)


def usable_images(
    rows: Iterable[Row], resolution: int, bad_images: BadImages
) -> Iterator[tuple[Row, PIL.Image.Image]]:
    """Decode rows; what cannot be used is noted and left out.

    Raises:
        ValueError: `MAX_UNUSABLE` rows in a row cannot be used.
    """
    num_unusable = 0
    for row in rows:
        try:
            image = decode_image(row.encoded)
            check_size(image.size, (resolution, resolution))
        except UnusableImageError as error:
            bad_images.add(row.name, str(error))
            num_unusable += 1
            if num_unusable == MAX_UNUSABLE:
                raise ValueError(
                    f"{MAX_UNUSABLE} images in a row cannot be used, the last is {row.name}: {error}"
                ) from error
            continue
        num_unusable = 0
        bad_images.count(image.size, resolution)
        yield row, image


def first_batches(
    source: ImageSource, resolution: int, batch_size: int, max_images: int, bad_images: BadImages
) -> Iterator[torch.Tensor]:
    """The first usable images of a source as batches (B, 3, R, R) in [-1, 1], to measure something on.

    The last batch may be smaller. Raises what `ImageSource.rows` and `usable_images` do.
    """
    images = islice(usable_images(source.rows(), resolution, bad_images), max_images)
    pixels = (to_pixels(image, resolution) for _, image in images)
    while batch := list(islice(pixels, batch_size)):
        yield torch.stack(batch)


def make_dataset(
    accelerator: Accelerator, source: ImageSource, *, resolution: int, seed: int, bad_images: BadImages
) -> ImageDataset | ImageStream:
    """The images of a source for training, of a stream the part of this process."""
    if not source.streaming:
        return ImageDataset(source, resolution, seed, bad_images)
    return ImageStream(source, resolution, seed, bad_images, accelerator.process_index, accelerator.num_processes)


def make_loader(
    accelerator: Accelerator, dataset: Dataset, *, batch_size: int, num_workers: int = 0
) -> OrderedLoader | StreamLoader:
    """Shuffled batches without end.

    Args:
        accelerator: the Accelerator.
        dataset: from `make_dataset`, a `LatentCache`, or another one whose items are asked for by their places; its
            `seed` decides the order.
        batch_size: images of a process in a forward pass.
        num_workers: processes that decode images, for each process.

    Raises:
        ValueError: the data set does not fill one batch of every process, or a stream has too few files for the
            workers.
    """
    if isinstance(dataset, ImageStream):
        source = dataset.source
        if num_workers > source.dataset.num_shards:
            raise ValueError(
                f"`num_workers` {num_workers}: {source.name} gives each process {source.dataset.num_shards} files, and"
                " a file is read by one worker. Pass fewer workers."
            )
        return StreamLoader(dataset, batch_size, num_workers, accelerator.device)
    if len(dataset) < batch_size * accelerator.num_processes:
        raise ValueError(
            f"`batch_size` {batch_size} on {counted(accelerator.num_processes, 'process')} needs more than the"
            f" {counted(len(dataset), 'image')} of the data set."
        )
    return OrderedLoader(dataset, batch_size, num_workers, accelerator)


def batches_from(loader: OrderedLoader | StreamLoader, first_pass: int, repeated: int | None = None) -> Iterator[dict]:
    """Batches without end, from one forward pass on; with `repeated` the first so many of them, over and over."""
    if repeated is None:
        yield from loader.batches_from(first_pass)
    kept = list(islice(loader.batches_from(0), repeated))
    yield from islice(cycle(kept), first_pass % repeated, None)


def _leave_process_group(worker: int) -> None:
    """Keep away from a worker what a terminal or a cluster sends to all processes of a job: the run still needs it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def _stand_ins(index: int, length: int) -> Iterator[int]:
    """The index, and those that stand in for it: near ones first, but soon far from a part that is all damaged."""
    doubling = ((index + 2**k) % length for k in range((length - 1).bit_length()))
    yield from islice(chain([index], doubling, ((index + k) % length for k in range(1, length))), MAX_UNUSABLE)
