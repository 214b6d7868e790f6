# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of images in one .npz, as samples are handed around since ADM (arXiv:2105.05233): `arr_0`, uint8 (N, H, W, 3).

They are written and read a few images at a time: memory does not depend on N.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..files import durable_file
from ..words import listed


_MEMBER = "arr_0.npy"
_LAYOUT = "an .npz of images holds `arr_0`, uint8 (N, height, width, 3)"
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # in a zip: the same images make the same bytes, whenever they are written
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)


def write_npz(path: str | os.PathLike, shape: tuple[int, int, int, int], batches: Iterable[np.ndarray]) -> None:
    """Write images into an .npz that is there whole or not at all. Nothing is compressed, as others write it too.

    Args:
        path: the file; what was there stays if this fails.
        shape: (N, H, W, 3) of all images.
        batches: the images in order, uint8 arrays (B, H, W, 3).

    Raises:
        ValueError: the batches have another dtype or other sides, or are not N images.
    """
    with durable_file(Path(path)) as staged:
        num_written = 0
        with zipfile.ZipFile(staged, "w") as archive:
            with archive.open(zipfile.ZipInfo(_MEMBER, _EARLIEST), "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(stream, header)
                for images in batches:
                    if images.dtype != np.uint8 or images.shape[1:] != tuple(shape[1:]):
                        raise ValueError(
                            f"`batches` must be of uint8 (B, {', '.join(map(str, shape[1:]))}), got {images.dtype}"
                            f" {images.shape}."
                        )
                    stream.write(np.ascontiguousarray(images).data)
                    num_written += len(images)
        if num_written != shape[0]:
            raise ValueError(f"{path} must get {shape[0]} images, as `shape` says, got {num_written}.")


class NpzImages:
    """Images of an .npz, stored or compressed, read a few at a time: NpzImages("samples.npz").read(0, 64).

    Args:
        path: the file. Nothing in it is unpickled.

    Attributes:
        num_images: N.
        height, width: sides in pixels.

    Raises:
        ValueError: it is missing, no .npz or damaged, has no `arr_0` (what it has is named), or `arr_0` is of another
            dtype or shape. Damage behind the first images shows when these are read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with self._guarded():
            self._open()

    def __len__(self) -> int:
        return self.num_images

    def __reduce__(self) -> tuple:
        return NpzImages, (self.path,)  # an open file cannot be handed to another process

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images `start` to `stop`, (stop - start, H, W, 3) uint8. Quick when it goes on where the last call ended.

        The checksum of the file is compared when all were read in order.

        Raises:
            ValueError: they are not all there, or the file is damaged.
        """
        if not 0 <= start < stop <= self.num_images:
            raise ValueError(f"{self.path} holds images 0 to {self.num_images - 1}, got {start} to {stop - 1}.")
        images = np.empty((stop - start, self.height, self.width, 3), dtype=np.uint8)
        position = self._start + start * self.height * self.width * 3
        with self._guarded():
            if self._process != os.getpid():  # forked processes would move one another's place in the file
                self._open()
            if self._stream.tell() != position:
                self._stream.seek(position)
            if self._stream.readinto(images.data.cast("B")) != images.nbytes:
                raise EOFError("it ends too early")
        return images

    def _open(self) -> None:
        archive = zipfile.ZipFile(self.path)
        if _MEMBER not in archive.namelist():
            held = listed(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"
            raise ValueError(f"{self.path} holds {held}: {_LAYOUT}.")
        stream = archive.open(_MEMBER)
        try:
            shape, fortran_order, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
        except (ValueError, KeyError) as error:  # no .npy, a damaged header, or a version that no array of bytes has
            raise ValueError(f"{self.path}: `arr_0` is no array ({error}): {_LAYOUT}.") from error
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            order = " in Fortran order" if fortran_order else ""
            raise ValueError(f"{self.path}: `arr_0` is {dtype} {shape}{order}: {_LAYOUT}.")
        size, expected = archive.getinfo(_MEMBER).file_size, stream.tell() + math.prod(shape)
        if size != expected:
            raise ValueError(f"{self.path} is damaged: `arr_0` {shape} has {size} bytes, not {expected}.")
        self._stream, self._start, self._process = stream, stream.tell(), os.getpid()
        self.num_images, self.height, self.width, _ = shape

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            raise ValueError(f"{self.path} is damaged, or no .npz: {error}") from error
