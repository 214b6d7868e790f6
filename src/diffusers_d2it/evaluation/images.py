# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of images that metrics are computed on: folders, .npz files, data sets, tensors. They are read in batches.

Shapes:
    N images of a set, B of a batch, H W their sides in pixels
"""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.folders import is_image, list_files, split_folder
from ..data.images import UnusableImageError, decode_image, to_pixels
from ..data.source import ImageSource, Row, load_images
from ..files import gather
from ..pixels import check_uint8, to_uint8
from ..sampling.folder import NPZ
from ..sampling.npz import NpzImages
from ..sampling.sets import PROTOCOL, SamplePlan, read_protocol
from ..words import composed, counted, listed, printable


logger = logging.getLogger(__name__)

_MAX_NAMED = 10  # images in one error
_DATA_SETS = (".parquet", ".tar")


class ImageSet:
    """Images of one size in an order, as they lie on disk.

    Args:
        name: last part of where they lie, for protocols and errors.
        num_images: N.
        read: an image by its place in the set, uint8 (3, H, W); an UnusableImageError if it cannot be used.
        size: (H, W); None for that of the first image.
        name_of: what errors call the image of a place; default: its place.
        protocol: how they were made or drawn.
        labels: their classes, int64 (N,), or a function that finds them; None where nobody knows.
        files: their paths in a folder, or a function that finds them; None where they are not files by themselves.
        leaves_out: what is done with an image that cannot be used: it is left out, with a warning, or an error.

    Attributes:
        left_out: reason by name of each image that was read here and left out.

    Raises:
        ValueError: there are none, or the size is that of the first image and this cannot be used.
    """

    def __init__(
        self,
        name: str,
        num_images: int,
        read: Callable[[int], torch.Tensor],
        size: tuple[int, int] | None = None,
        name_of: Callable[[int], str] = str,
        protocol: dict | None = None,
        labels: torch.Tensor | Callable[[], torch.Tensor] | None = None,
        files: Sequence[str] | Callable[[], Sequence[str] | None] | None = None,
        leaves_out: bool = False,
    ):
        self.name, self.num_images, self.size, self.protocol = name, num_images, size, dict(protocol or {})
        self._labels, self._files = labels, files
        self.leaves_out, self.left_out = leaves_out, {}
        self._read, self._name_of = read, name_of
        if size is None:
            try:
                self.size = tuple(self[0].shape[1:])
            except UnusableImageError:
                list(self.batches(1))  # raises, and names those after it

    def __len__(self) -> int:
        return self.num_images

    @cached_property
    def labels(self) -> torch.Tensor:
        """The class of each image, int64 (N,).

        Raises:
            ValueError: nobody knows.
        """
        labels = self._labels() if callable(self._labels) else self._labels
        if labels is None:
            raise ValueError(
                f"{self.name} does not tell the classes of its images: a data set with labels does, and so do samples"
                " of sample.py."
            )
        return labels

    @cached_property
    def files(self) -> list[str] | None:
        """The path of each image in its folder, without its ending; None where they are not files by themselves."""
        files = self._files() if callable(self._files) else self._files
        return None if files is None else [composed(Path(file).with_suffix("").as_posix()) for file in files]

    def order_of(self, others: "ImageSet") -> tuple[Sequence[int], str]:
        """The places of the images in the order of others with the same names, and in words how they were paired.

        If either set has no names, image i belongs to image i.

        Raises:
            ValueError: an image has no partner, or several; or the sets differ in number or size.
        """
        if self.size != others.size or self.files is None or others.files is None:
            if (len(self), self.size) != (len(others), others.size):
                numbers = (f"{len(one)} of {one.size[0]}x{one.size[1]} in {one.name}" for one in (self, others))
                raise ValueError(f"pairs need as many images of the same size, got {' and '.join(numbers)}.")
            return range(len(self)), "in order"
        for one in (self, others):
            if twice := sorted(name for name, times in Counter(one.files).items() if times > 1):
                raise ValueError(f"{one.name} has several images called {listed(twice)}: pairs are found by name.")
        ours, theirs = ({file: place for place, file in enumerate(one.files)} for one in (self, others))
        alone = [(self.name, [file for file in ours if file not in theirs])]
        alone += [(others.name, [file for file in theirs if file not in ours])]
        if found := "; ".join(f"{name}: {listed(files)}" for name, files in alone if files):
            raise ValueError(f"pairs are found by name, and images have no partner in {found}.")
        return [ours[file] for file in theirs], "by name"

    def __getitem__(self, place: int | slice) -> torch.Tensor:
        """An image, uint8 (3, H, W), or those of a slice, (B, 3, H, W).

        Raises:
            ValueError: the set is damaged; an UnusableImageError if one image cannot be used.
        """
        if isinstance(place, slice):
            return torch.stack([self[one] for one in range(*place.indices(len(self)))])
        image = self._read(place)
        if self.size is not None and tuple(image.shape[1:]) != self.size:
            sizes = ("x".join(map(str, size)) for size in (image.shape[:0:-1], self.size[::-1]))
            raise UnusableImageError("it is {}, and the first one {}".format(*sizes))
        return image

    def batches(
        self,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        progress: bool = False,
        order: Sequence[int] | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of places, int64 (B,), and images, uint8 (B, 3, H, W); a batch may be smaller.

        Batch k of the set belongs to process k % num_processes, for which `num_workers` processes decode; 0 for none.
        Places are those in the set, or in an `order` of its images.

        Raises:
            ValueError: images cannot be used and are not left out, ten of those of the process are named; or the batch
                size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        order = range(len(self)) if order is None else order
        starts = range(process_index * batch_size, len(order), num_processes * batch_size)
        batches = [range(start, min(start + batch_size, len(order))) for start in starts]
        loader = DataLoader(
            batches,
            batch_size=None,
            collate_fn=partial(self._read_batch, order),
            num_workers=num_workers,
            generator=torch.Generator(),  # not the global one, from which a loader would draw a seed
        )
        bad = {}
        for places, images, unusable in tqdm(loader, desc=self.name, disable=not progress):
            bad |= unusable
            if bad and not self.leaves_out:  # an error, which names others as well
                if len(bad) >= _MAX_NAMED:  # the rest of a large set would take hours
                    break
                continue
            for name, reason in unusable.items():
                if name not in self.left_out and len(self.left_out) < _MAX_NAMED:
                    logger.warning("image %r of %s is left out: %s", printable(name), self.name, reason)
                self.left_out[name] = reason
            if places:
                yield torch.tensor(places), torch.stack(images)
        if bad and not self.leaves_out:
            named = [f"{printable(name)}: {reason}" for name, reason in bad.items()][:_MAX_NAMED]
            more = "; and perhaps more after them" if len(named) == _MAX_NAMED else ""
            raise ValueError(
                f"{len(named)} of the {counted(len(self), 'image')} of {self.name} cannot be used:"
                f" {'; '.join(named)}{more}."
            )

    def _read_batch(self, order: Sequence[int], batch: range) -> tuple[list[int], list[torch.Tensor], dict[str, str]]:
        """Places and images, and the reason by name of each image that cannot be used."""
        places, images, bad = [], [], {}
        for place in batch:
            try:
                images.append(self[order[place]])
                places.append(place)
            except UnusableImageError as error:
                bad[self._name_of(order[place])] = str(error)
        return places, images, bad

    def describe(self) -> dict:
        """What a protocol says of the set as it was read, but for the digest of its pixels."""
        left_out = {"num_left_out": len(self.left_out)} if self.left_out else {}
        number = self.num_images - len(self.left_out)
        return {**self.protocol, **left_out, "name": self.name, "num_images": number, "resolution": list(self.size)}

    @staticmethod
    def from_tensor(
        images: torch.Tensor, name: str, protocol: dict | None = None, labels: torch.Tensor | None = None
    ) -> "ImageSet":
        """A set of images in memory, uint8 (N, 3, H, W), with a name, how they were made, and their classes.

        Raises:
            ValueError: these are no such images, there are none, or as many labels are not there.
        """
        check_uint8(images)
        if labels is not None and labels.shape != (len(images),):
            raise ValueError(f"`labels` must be (N,), of {counted(len(images), 'image')}, got {tuple(labels.shape)}.")
        size = tuple(images.shape[2:])
        return ImageSet(name, len(images), images.__getitem__, size, protocol=protocol, labels=labels)

    def share_left_out(self, accelerator: Accelerator | None = None) -> None:
        """Note what other processes left out as well. Raises a ValueError if nothing is left; three are named."""
        for left_out in gather(accelerator, self.left_out):
            self.left_out |= left_out
        if len(self.left_out) == len(self):
            found = "; ".join(f"{printable(name)}: {reason}" for name, reason in list(self.left_out.items())[:3])
            raise ValueError(f"none of the {counted(len(self), 'image')} of {self.name} can be used: {found}.")


def open_images(
    path: str | os.PathLike, resolution: int | None = None, split: str | None = None, image_column: str | None = None
) -> ImageSet:
    """The images of a folder, an .npz or a data set.

    Args:
        path: a folder of images, read with its sub-folders in natural order; an .npz with `arr_0`, uint8
            (N, H, W, 3), or a folder that holds one; or with a resolution a data set: a folder of images, of .parquet
            or of WebDataset .tar files, one such file, or a name on the Hub.
        resolution: the shorter side is resized to it and the centre is cropped, as in training; None takes the images
            as they are.
        split: of a data set, or of a folder with sub-folders train, val, ...; None for train, or the only one.
        image_column: of a data set; None for the only one that holds images.

    An image of a data set that cannot be used is left out, as in training.

    Raises:
        ValueError: there is nothing, or no image; the .npz has another layout; a data set needs a resolution, or
            cannot be read; the first image cannot be used; or `protocol.json` beside the images is damaged, or tells
            of another number of images.
    """
    path = os.fspath(path)
    if resolution is not None and Path(path).suffix.lower() != ".npz":
        return _open_data_set(path, resolution, split, image_column)
    if image_column is not None:
        raise ValueError(f"`image_column` {image_column!r} belongs to a data set, which needs `resolution`.")
    if os.path.isdir(path):
        return _open_folder(path, split)
    if split is not None:
        raise ValueError(f"`split` {split!r} belongs to a data set or a folder, and {path} is neither.")
    if Path(path).suffix.lower() == ".npz":
        return _open_npz(path, resolution)
    if os.path.isfile(path) and not path.lower().endswith(_DATA_SETS):
        raise ValueError(f"{path} is a file: expected a folder of images, an .npz, or a data set.")
    what = "is a data set" if os.path.isfile(path) else "does not exist; a data set on the Hub"
    raise ValueError(f"{path} {what}: it needs `resolution`, to which it is resized.")


def hash_pixels(images: torch.Tensor) -> int:
    """The sum of a hash of each image, uint8 (B, 3, H, W): those of the parts of a set add up."""
    size = str(tuple(images.shape[1:])).encode()
    arrays = images.cpu().contiguous().numpy()
    return sum(int.from_bytes(hashlib.sha256(size + one.tobytes()).digest(), "big") for one in arrays)


def pixel_digest(num_images: int, hashes: int) -> str:
    """Identifies a set by its pixels, by the sum of `hash_pixels`, whatever their order and the format of files."""
    return hashlib.sha256(f"{num_images} {hashes % 2**256:x}".encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of sets
# ---------------------------------------------------------------------------------------------------------------------


def _open_folder(root: str, split: str | None) -> ImageSet:
    files, _ = list_files(root)
    images = list(filter(is_image, files))
    archives = [file for file in files if file.lower().endswith(".npz")]
    if images:
        split, splits = split_folder(root, images, split)
        protocol = {"split": split} if splits else _read_protocol(root, len(images))
        name, root = _last_part(root), os.path.join(root, split or "")
        names = sorted((os.path.relpath(file, root) for file in splits.get(split, images)), key=_natural)
        rows = [Row(one, {"path": os.path.join(root, one), "bytes": None}, 0) for one in names]
        read, name_of = partial(_read_row, rows, None), partial(_name_of_row, rows)
        return ImageSet(name, len(names), read, None, name_of, protocol, _drawn_labels(protocol), names)
    if split is not None:
        raise ValueError(f"`split` {split!r}: {root} holds no images.")
    if len(archives) == 1:
        return _open_npz(archives[0], None)
    if any(file.lower().endswith(_DATA_SETS) for file in files):
        raise ValueError(f"{root} is a data set: it needs `resolution`, to which it is resized.")
    held = f"{len(archives)} .npz files: pass one of them" if archives else f"{len(files)} other files"
    raise ValueError(f"{root} holds no images, and {held}.")


def _open_npz(path: str, resolution: int | None) -> ImageSet:
    images, name = NpzImages(path), _last_part(path)
    size = images.height, images.width
    if resolution is not None and size != (resolution, resolution):
        raise ValueError(f"{name} holds images of {size[0]}x{size[1]}, which are not resized to {resolution}.")
    is_sampled = os.path.basename(path) == NPZ  # another file may lie beside samples by chance
    protocol = _read_protocol(os.path.dirname(path), len(images)) if is_sampled else {}
    read, labels = partial(_read_packed, images), _drawn_labels(protocol)
    return ImageSet(name, len(images), read, size, protocol=protocol, labels=labels)


def _read_packed(images: NpzImages, place: int) -> torch.Tensor:
    return _to_tensor(images.read(place, place + 1)[0])


def _open_data_set(path: str, resolution: int, split: str, image_column: str | None) -> ImageSet:
    try:
        source = load_images(path, split=split, image_column=image_column, labelled=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be opened as a data set: {error}") from error
    if not source.num_rows:
        raise ValueError(f"{path} is empty: it has no images in split {split}.")
    protocol = {"preprocessing": "shorter side resized, bicubic; centre crop"}
    protocol |= _read_protocol(path, source.num_rows) if source.split is None else {"split": source.split}
    read, name_of = partial(_read_row, source, resolution), partial(_name_of_row, source)
    labels, files = partial(_labels_of_rows, path, split, image_column), partial(_files_of_rows, source, path)
    size = resolution, resolution
    return ImageSet(source.name, source.num_rows, read, size, name_of, protocol, labels, files, leaves_out=True)


def _files_of_rows(source: ImageSource, path: str) -> list[str] | None:
    """The paths of the images of a folder, None where a table or an archive holds them."""
    if source[0].encoded.get("bytes") is not None:
        return None
    root = os.path.join(path, source.split or "")
    return [os.path.relpath(row.name, root) for row in source.rows()]


def _read_row(rows: Sequence[Row] | ImageSource, resolution: int | None, place: int) -> torch.Tensor:
    image = decode_image(rows[place].encoded)
    return _to_tensor(np.asarray(image)) if resolution is None else to_uint8(to_pixels(image, resolution))


def _name_of_row(rows: Sequence[Row] | ImageSource, place: int) -> str:
    return rows[place].name


def _labels_of_rows(path: str, split: str, image_column: str | None) -> torch.Tensor | None:
    source = load_images(path, split=split, image_column=image_column)
    return None if source.num_classes is None else torch.tensor([row.label for row in source.rows()])


def _drawn_labels(protocol: dict) -> torch.Tensor | None:
    """The classes that a plan of samples has given its images."""
    if not (given := protocol.get("labels")):
        return None
    plan = SamplePlan(protocol["num_images"], 1, protocol["seed"], tuple(given["classes"]), given["scheme"])
    return torch.tensor([plan.label(image) for image in range(plan.num_images)])


def _read_protocol(folder: str, num_images: int) -> dict:
    if not Path(folder, PROTOCOL).is_file():
        return {}
    protocol = read_protocol(folder)
    announced = protocol["sampling"].get("num_images")
    if not protocol.get("complete") or announced != num_images:
        raise ValueError(
            f"{Path(folder, PROTOCOL)} has {announced} images, {'all' if protocol.get('complete') else 'not all'}"
            f" of them drawn, found {num_images}: finish sampling first."
        )
    return {**protocol["sampling"], "environment": protocol["environment"]}


def _last_part(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def _natural(path: str) -> list:
    """A key that sorts 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (3, H, W), laid out like that: networks round other layouts otherwise."""
    return torch.from_numpy(np.moveaxis(array, -1, 0).copy())
