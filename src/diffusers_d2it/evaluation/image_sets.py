# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of images that metrics are computed on: folders, .npz files, data sets, tensors. They are read in batches.

Shapes:
    N images of a set, B of a batch, H W their sides in pixels
"""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from ..data.folders import is_image, list_files
from ..data.images import UnusableImageError, decode_image, to_pixels
from ..data.source import ImageSource, load_images
from ..sampling.npz import NpzImages
from ..sampling.sets import PROTOCOL, read_protocol
from ..words import printable


_SAMPLES = "images.npz"  # as examples/sample_d2it.py names it
_MAX_NAMED = 10  # images in one error
_DATA_SETS = (".parquet", ".tar")


class ImageSet(ABC):
    """Images of one size in an order, as they lie on disk.

    Attributes:
        name: last part of where they lie.
        num_images: N.
        size: (H, W).
        protocol: what is known of how they were made: of samples, how they were drawn.
    """

    def __init__(self, name: str, num_images: int, size: tuple[int, int], protocol: dict | None = None):
        self.name = name
        self.num_images = num_images
        self.size = size
        self.protocol = dict(protocol or {})

    def __len__(self) -> int:
        return self.num_images

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images `start` to `stop`, uint8 (stop - start, 3, H, W).

        Raises:
            ValueError: the set is damaged.
            UnusableImageError: one of the images cannot be used; `raise_unusable` names all of them.
        """

    def batches(
        self, batch_size: int, process_index: int = 0, num_processes: int = 1, num_workers: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of one of several processes: batch k of the set belongs to process k % num_processes.

        Args:
            batch_size: B; the last batch of the set may be smaller.
            process_index: which process reads.
            num_processes: how many share the set.
            num_workers: processes that decode images for this one; 0 for none.

        Returns:
            Pairs of places in the set, int64 (B,), and images, uint8 (B, 3, H, W).

        Raises:
            ValueError: images cannot be used: ten of them are named, and all counted; or the batch size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        starts = range(process_index * batch_size, self.num_images, num_processes * batch_size)
        loader = DataLoader(
            _Reads(self, starts, batch_size),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # not the global one, from which it would draw a seed
        )
        for start, images in loader:
            if images is None:
                self.raise_unusable(start if num_processes == 1 else 0)  # others may have met some before
            yield torch.arange(start, start + len(images)), images

    def raise_unusable(self, start: int) -> None:
        """Raise a ValueError that names the images from `start` on that cannot be used."""
        raise ValueError(f"an image of {self.name} cannot be used.")

    def describe(self) -> dict:
        """What a protocol says of the set, but for the digest of its pixels."""
        return {**self.protocol, "name": self.name, "num_images": self.num_images, "resolution": list(self.size)}

    @staticmethod
    def from_tensor(images: torch.Tensor, name: str) -> "ImageSet":
        """A set of images in memory.

        Args:
            images: uint8 (N, 3, H, W).
            name: for protocols.

        Raises:
            ValueError: these are no such images, or there are none.
        """
        return _TensorImages(images, name)


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
        split: of a data set.
        image_column: of a data set; default: the only one that holds images.

    Raises:
        ValueError: there is nothing, or no image; the .npz has another layout; a data set needs a resolution, or
            cannot be read; the first image cannot be used; or `protocol.json` beside the images is damaged, or tells
            of another number of images.
    """
    path = os.fspath(path)
    if Path(path).suffix.lower() == ".npz":
        return _with_resolution(_NpzSet(path), resolution)
    if resolution is not None:
        return _open_data_set(path, resolution, split, image_column)
    if os.path.isdir(path):
        return _open_folder(path)
    if os.path.isfile(path) and not path.lower().endswith(_DATA_SETS):
        raise ValueError(f"{path} is a file: expected a folder of images, an .npz, or a data set.")
    hint = "a data set needs `resolution` (--resolution), to which it is resized."
    if os.path.isfile(path):
        raise ValueError(f"{path} is a data set: {hint}")
    raise ValueError(f"{path} does not exist. If it is a data set on the Hub: {hint}")


class PixelDigest:
    """Identifies a set by its pixels while it is read, whatever the order, the batches, or the processes.

    It is a sum of hashes, so memory is constant. Files of another format with the same pixels have the same digest.
    """

    def __init__(self):
        self.num_images = 0
        self._sum = 0

    def update(self, images: torch.Tensor) -> None:
        """Count images, uint8 (B, 3, H, W)."""
        size = str(tuple(images.shape[1:])).encode()
        for image in images.cpu().contiguous().numpy():
            self._sum += int.from_bytes(hashlib.sha256(size + image.tobytes()).digest(), "big")
        self.num_images += len(images)

    def gathered(self) -> "PixelDigest":
        """The digest of the images of all processes, the same on each; all must call it."""
        total = PixelDigest()
        for num_images, part in gather_object([(self.num_images, self._sum)]):
            total.num_images += num_images
            total._sum += part
        return total

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(f"{self.num_images} {self._sum % 2**256:x}".encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of sets
# ---------------------------------------------------------------------------------------------------------------------


class _DecodedSet(ImageSet):
    """Images that are decoded one by one."""

    @abstractmethod
    def _decode(self, index: int) -> torch.Tensor:
        """One image, uint8 (3, H, W); an UnusableImageError if it cannot be used."""

    @abstractmethod
    def _name_of(self, index: int) -> str:
        """Of its file or row."""

    def _check_size(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[1:]
        if (height, width) != self.size:
            raise UnusableImageError(f"it is {height}x{width}, and the first one {self.size[0]}x{self.size[1]}")
        return image

    def read(self, start: int, stop: int) -> torch.Tensor:
        return torch.stack([self._check_size(self._decode(index)) for index in range(start, stop)])

    def raise_unusable(self, start: int) -> None:
        named = []
        for index in range(start, self.num_images):
            try:
                self._check_size(self._decode(index))
            except UnusableImageError as error:
                named.append(f"{printable(self._name_of(index))}: {error}")
            if len(named) == _MAX_NAMED:  # the rest of a large set would take hours
                named.append("and perhaps more after them")
                break
        number = min(len(named), _MAX_NAMED)
        raise ValueError(
            f"{number} of the {self.num_images} images of {self.name} cannot be used: {'; '.join(named)}."
        )


class _FolderSet(_DecodedSet):
    def __init__(self, root: str, files: list[str], protocol: dict | None):
        self._root = root
        self._files = files
        super().__init__(_last_part(root), len(files), (0, 0), protocol)
        try:
            self.size = tuple(self._decode(0).shape[1:])
        except UnusableImageError:
            self.raise_unusable(0)

    def _decode(self, index: int) -> torch.Tensor:
        return _to_tensor(np.asarray(decode_image({"path": self._files[index], "bytes": None})))

    def _check_size(self, image: torch.Tensor) -> torch.Tensor:
        return super()._check_size(image) if self.size != (0, 0) else image  # the first one is not known yet

    def _name_of(self, index: int) -> str:
        return os.path.relpath(self._files[index], self._root)


class _DataSet(_DecodedSet):
    def __init__(self, source: ImageSource, resolution: int, protocol: dict):
        self._source = source
        self._resolution = resolution
        super().__init__(source.name, source.num_rows, (resolution, resolution), protocol)

    def _decode(self, index: int) -> torch.Tensor:
        pixels = to_pixels(decode_image(self._source[index].encoded), self._resolution)
        return ((pixels + 1) * 127.5).round().to(torch.uint8)

    def _name_of(self, index: int) -> str:
        return self._source[index].name


class _NpzSet(ImageSet):
    def __init__(self, path: str):
        self._path = path
        self._opened_by = None
        images = self._images()
        is_sampled = os.path.basename(path) == _SAMPLES  # another file may lie beside samples by chance
        protocol = _read_protocol(os.path.dirname(path), images.num_images) if is_sampled else {}
        super().__init__(_last_part(path), images.num_images, (images.height, images.width), protocol)

    def _images(self) -> NpzImages:
        if self._opened_by != os.getpid():  # workers must not move the place in the file of one another
            self._npz, self._opened_by = NpzImages(self._path), os.getpid()
        return self._npz

    def read(self, start: int, stop: int) -> torch.Tensor:
        return _to_tensor(self._images().read(start, stop))


class _TensorImages(ImageSet):
    def __init__(self, images: torch.Tensor, name: str):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(
                f"`images` must be uint8 (N, 3, H, W) with one image at least, got {images.dtype}"
                f" {tuple(images.shape)}."
            )
        self._images = images
        super().__init__(name, len(images), tuple(images.shape[2:]))

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._images[start:stop]


# ---------------------------------------------------------------------------------------------------------------------
# Opening and reading
# ---------------------------------------------------------------------------------------------------------------------


class _Reads(Dataset):
    """The batches of one process for a DataLoader: (start, images), and no images where one cannot be used."""

    def __init__(self, images: ImageSet, starts: range, batch_size: int):
        self.images, self.starts, self.batch_size = images, starts, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None]:
        start = self.starts[index]
        try:
            return start, self.images.read(start, min(start + self.batch_size, len(self.images)))
        except UnusableImageError:
            return start, None


def _as_it_is(batch):
    return batch


def _open_folder(root: str) -> ImageSet:
    files, _ = list_files(root)
    images = sorted(filter(is_image, files), key=lambda path: _natural(os.path.relpath(path, root)))
    archives = [file for file in files if file.lower().endswith(".npz")]
    if images:
        return _FolderSet(root, images, _read_protocol(root, len(images)))
    if len(archives) == 1:
        return _NpzSet(archives[0])
    if any(file.lower().endswith(_DATA_SETS) for file in files):
        raise ValueError(f"{root} is a data set: it needs `resolution` (--resolution), to which it is resized.")
    held = f"{len(archives)} .npz files: pass one of them" if archives else f"{len(files)} other files"
    raise ValueError(f"{root} holds no images, and {held}.")


def _open_data_set(path: str, resolution: int, split: str, image_column: str | None) -> ImageSet:
    try:
        source = load_images(path, split=split, image_column=image_column, labelled=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be opened as a data set: {error}") from error
    if not source.num_rows:
        raise ValueError(f"{path} is empty: it has no images in split {split}.")
    protocol = {"preprocessing": "shorter side resized, bicubic; centre crop"}
    return _DataSet(source, resolution, protocol | _read_protocol(path, source.num_rows))


def _with_resolution(images: ImageSet, resolution: int | None) -> ImageSet:
    if resolution is not None and images.size != (resolution, resolution):
        height, width = images.size
        raise ValueError(f"{images.name} holds images of {height}x{width}, which are not resized to {resolution}.")
    return images


def _read_protocol(folder: str, num_images: int) -> dict:
    """How the samples of a folder were drawn; empty if it does not tell."""
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
    """(..., H, W, 3) -> (..., 3, H, W), laid out like that: networks round other layouts otherwise."""
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())
