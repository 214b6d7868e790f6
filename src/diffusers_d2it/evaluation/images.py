# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of images that metrics are computed on: folders, .npz files, data sets, tensors. They are read in batches.

Shapes:
    N images of a set, B of a batch, H W their sides in pixels
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.folders import is_image, list_files
from ..data.images import UnusableImageError, decode_image, to_pixels
from ..data.source import ImageSource, load_images
from ..pixels import check_uint8, to_uint8
from ..sampling.npz import NpzImages
from ..sampling.sets import PROTOCOL, SamplePlan, read_protocol
from ..words import printable


_SAMPLES = "images.npz"  # as examples/sample_d2it.py names it
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
    ):
        self.name, self.num_images, self.size, self.protocol = name, num_images, size, dict(protocol or {})
        self._labels = labels
        self._read, self._name_of = read, name_of
        if size is None:
            try:
                self.size = tuple(self[0].shape[1:])
            except UnusableImageError:
                self._raise_unusable(0)

    def __len__(self) -> int:
        return self.num_images

    @property
    def labels(self) -> torch.Tensor:
        """The class of each image, int64 (N,).

        Raises:
            ValueError: nobody knows.
        """
        if callable(self._labels):
            self._labels = self._labels()
        if self._labels is None:
            raise ValueError(
                f"{self.name} does not tell the classes of its images: a data set with labels does, and so do samples"
                " of sample_d2it.py."
            )
        return self._labels

    def __getitem__(self, place: int | slice) -> torch.Tensor:
        """An image, uint8 (3, H, W), or those of a slice, (B, 3, H, W).

        Raises:
            ValueError: the set is damaged; an UnusableImageError if one image cannot be used.
        """
        if isinstance(place, slice):
            return torch.stack([self[one] for one in range(*place.indices(len(self)))])
        image = self._read(place)
        if self.size is not None and tuple(image.shape[1:]) != self.size:
            sizes = ("x".join(map(str, size)) for size in (image.shape[1:], self.size))
            raise UnusableImageError("it is {}, and the first one {}".format(*sizes))
        return image

    def batches(
        self,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        progress: bool = False,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of places in the set, int64 (B,), and images, uint8 (B, 3, H, W); the last batch may be smaller.

        Batch k of the set belongs to process k % num_processes, for which `num_workers` processes decode; 0 for none.

        Raises:
            ValueError: images cannot be used, ten of them are named; or the batch size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        starts = range(process_index * batch_size, len(self), num_processes * batch_size)
        slices = [slice(start, min(start + batch_size, len(self))) for start in starts]
        # The generator is not the global one, from which a loader would draw a seed
        loader = DataLoader(
            self, sampler=slices, batch_size=None, num_workers=num_workers, generator=torch.Generator()
        )
        read = iter(loader)
        for one in tqdm(slices, desc=self.name, disable=not progress):
            try:
                images = next(read)
            except UnusableImageError:
                self._raise_unusable(one.start if num_processes == 1 else 0)  # others may have met some before
            yield torch.arange(one.start, one.stop), images

    def describe(self) -> dict:
        """What a protocol says of the set, but for the digest of its pixels."""
        return {**self.protocol, "name": self.name, "num_images": self.num_images, "resolution": list(self.size)}

    @staticmethod
    def from_tensor(
        images: torch.Tensor, name: str, protocol: dict | None = None, labels: torch.Tensor | None = None
    ) -> "ImageSet":
        """A set of images in memory, uint8 (N, 3, H, W), with a name, how they were made, and their classes.

        Raises:
            ValueError: these are no such images, or there are none.
        """
        check_uint8(images)
        size = tuple(images.shape[2:])
        return ImageSet(name, len(images), images.__getitem__, size, protocol=protocol, labels=labels)

    def _raise_unusable(self, start: int) -> None:
        """Raise a ValueError that names the images from `start` on that cannot be used."""
        found = []
        for place in range(start, len(self)):
            try:
                self[place]
            except UnusableImageError as error:
                found.append(f"{printable(self._name_of(place))}: {error}")
            if len(found) == _MAX_NAMED:  # the rest of a large set would take hours
                found.append("and perhaps more after them")
                break
        number = min(len(found), _MAX_NAMED)
        raise ValueError(f"{number} of the {len(self)} images of {self.name} cannot be used: {'; '.join(found)}.")


def open_images(
    path: str | os.PathLike, resolution: int | None = None, split: str = "train", image_column: str | None = None
) -> ImageSet:
    """The images of a folder, an .npz or a data set.

    Args:
        path: a folder of images, read with its sub-folders in natural order; an .npz with `arr_0`, uint8
            (N, H, W, 3), or a folder that holds one; or with a resolution a data set: a folder of images, of .parquet
            or of WebDataset .tar files, one such file, or a name on the Hub.
        resolution: the shorter side is resized to it and the centre is cropped, as in training; None takes the images
            as they are.
        split, image_column: of a data set; the column is by default the only one that holds images.

    Raises:
        ValueError: there is nothing, or no image; the .npz has another layout; a data set needs a resolution, or
            cannot be read; the first image cannot be used; or `protocol.json` beside the images is damaged, or tells
            of another number of images.
    """
    path = os.fspath(path)
    if Path(path).suffix.lower() == ".npz":
        return _open_npz(path, resolution)
    if resolution is not None:
        return _open_data_set(path, resolution, split, image_column)
    if os.path.isdir(path):
        return _open_folder(path)
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


def _open_folder(root: str) -> ImageSet:
    files, _ = list_files(root)
    names = sorted((os.path.relpath(file, root) for file in filter(is_image, files)), key=_natural)
    archives = [file for file in files if file.lower().endswith(".npz")]
    if names:
        read, protocol = partial(_decode_file, root, names), _read_protocol(root, len(names))
        labels = _drawn_labels(protocol)
        return ImageSet(_last_part(root), len(names), read, None, names.__getitem__, protocol, labels)
    if len(archives) == 1:
        return _open_npz(archives[0], None)
    if any(file.lower().endswith(_DATA_SETS) for file in files):
        raise ValueError(f"{root} is a data set: it needs `resolution`, to which it is resized.")
    held = f"{len(archives)} .npz files: pass one of them" if archives else f"{len(files)} other files"
    raise ValueError(f"{root} holds no images, and {held}.")


def _decode_file(root: str, names: list[str], place: int) -> torch.Tensor:
    return _to_tensor(np.asarray(decode_image({"path": os.path.join(root, names[place]), "bytes": None})))


def _open_npz(path: str, resolution: int | None) -> ImageSet:
    images, name = NpzImages(path), _last_part(path)
    size = images.height, images.width
    if resolution is not None and size != (resolution, resolution):
        raise ValueError(f"{name} holds images of {size[0]}x{size[1]}, which are not resized to {resolution}.")
    is_sampled = os.path.basename(path) == _SAMPLES  # another file may lie beside samples by chance
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
    protocol |= _read_protocol(path, source.num_rows)
    read, name_of = partial(_decode_row, source, resolution), partial(_name_of_row, source)
    labels = partial(_labels_of_rows, path, split, image_column)
    return ImageSet(source.name, source.num_rows, read, (resolution, resolution), name_of, protocol, labels)


def _decode_row(source: ImageSource, resolution: int, place: int) -> torch.Tensor:
    return to_uint8(to_pixels(decode_image(source[place].encoded), resolution))


def _name_of_row(source: ImageSource, place: int) -> str:
    return source[place].name


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
            f"{Path(folder, PROTOCOL)} tells of {announced} images, {'all' if protocol.get('complete') else 'not all'}"
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
