# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of images in one .npz, as samples are handed around since ADM (arXiv:2105.05233): `arr_0`, uint8 (N, H, W, 3).

They are written and read a few images at a time: memory does not depend on N.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..files.folders import durable_file


_MEMBER = "arr_0.npy"
_LAYOUT = "an .npz of images holds `arr_0`, uint8 (N, height, width, 3)"
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # in a zip: the same images make the same bytes, whenever they are written
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)


class NpzWriter:
    """Writes images in order into an .npz that appears, whole, when the block ends.

        with NpzWriter("samples.npz", num_images=50_000, height=256, width=256) as writer:
            for images in batches:
                writer.write(images)

    If the block fails, what was at the path is still there. Nothing is compressed, as others write it too.

    Args:
        path: the file.
        num_images: number of all images.
        height, width: their sides in pixels.

    Raises:
        ValueError: a number is below 1; at the end of the block, fewer images than announced were written.
    """

    def __init__(self, path: str | os.PathLike, num_images: int, height: int, width: int):
        for name, value in (("num_images", num_images), ("height", height), ("width", width)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.path = Path(path).absolute()
        self.shape = (num_images, height, width, 3)
        self.num_written = 0
        self._stream: BinaryIO | None = None

    def __enter__(self) -> "NpzWriter":
        self._block = self._open()
        self._block.__enter__()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._block.__exit__(*error)

    def write(self, images: np.ndarray) -> None:
        """Append images (B, H, W, 3), uint8.

        Raises:
            ValueError: they have another dtype or other sides, or are more than were announced.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != self.shape[1:]:
            found = f"{getattr(images, 'dtype', type(images).__name__)} {getattr(images, 'shape', '')}"
            raise ValueError(
                f"`images` must be a uint8 array (B, {', '.join(map(str, self.shape[1:]))}), got {found}."
            )
        if self.num_written + len(images) > self.shape[0]:
            raise ValueError(
                f"{self.path} was announced with {self.shape[0]} images, got {self.num_written + len(images)}."
            )
        self._stream.write(np.ascontiguousarray(images).data)
        self.num_written += len(images)

    @contextmanager
    def _open(self) -> Iterator[None]:
        with durable_file(self.path) as staged:
            member = zipfile.ZipInfo(_MEMBER, _EARLIEST)
            with zipfile.ZipFile(staged, "w") as archive, archive.open(member, "w", force_zip64=True) as self._stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(self._stream, header)
                yield
            if self.num_written != self.shape[0]:
                raise ValueError(
                    f"{self.path} was announced with {self.shape[0]} images, {self.num_written} were written."
                )


class NpzImages:
    """Images of an .npz, stored or compressed, read a few at a time.

        images = NpzImages("samples.npz")
        for batch in images.iterate(batch_size=64):
            batch  # (B, images.height, images.width, 3) uint8

    Args:
        path: the file. Nothing in it is unpickled.

    Attributes:
        num_images: N.
        height, width: sides in pixels.

    Raises:
        ValueError: it is missing, no .npz or damaged, has no `arr_0` (what it has is named), or `arr_0` is of another
            dtype or shape or is pickled. Damage behind the first images shows when these are read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path} is {'a folder' if self.path.is_dir() else 'missing'}, expected an .npz.")
        self._stream: BinaryIO | None = None
        with self._guarded():
            self._stream, shape, self._start = self._open()
        self.num_images, self.height, self.width, _ = shape

    def __len__(self) -> int:
        return self.num_images

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images `start` to `stop`, (stop - start, H, W, 3) uint8. Quick when it goes on where the last call ended.

        Raises:
            ValueError: they are not all there, or the file is damaged.
        """
        if not 0 <= start < stop <= self.num_images:
            raise ValueError(f"{self.path} holds images 0 to {self.num_images - 1}, got {start} to {stop - 1}.")
        with self._guarded():
            return self._read(self._stream, start, stop)

    def iterate(self, batch_size: int) -> Iterator[np.ndarray]:
        """All images in order, (B, H, W, 3) uint8; the last batch may be smaller. At the end the checksum is compared.

        Raises:
            ValueError: the batch size is below 1, or the file is damaged.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[np.ndarray]:
        with self._guarded():
            stream, _, _ = self._open()  # of its own: others may read at the same time
        with stream:
            for start in range(0, self.num_images, batch_size):
                with self._guarded():
                    batch = self._read(stream, start, min(start + batch_size, self.num_images))
                yield batch

    def _read(self, stream: BinaryIO, start: int, stop: int) -> np.ndarray:
        images = np.empty((stop - start, self.height, self.width, 3), dtype=np.uint8)
        position = self._start + start * self.height * self.width * 3
        if stream.tell() != position:
            stream.seek(position)
        if stream.readinto(images.data.cast("B")) != images.nbytes:
            raise EOFError("it ends too early")
        return images

    def _open(self) -> tuple[BinaryIO, tuple[int, ...], int]:
        """The stream of the array, its shape, and where its images begin."""
        archive = zipfile.ZipFile(self.path)
        names = archive.namelist()
        if _MEMBER not in names:
            held = ", ".join(repr(name.removesuffix(".npy")) for name in names[:10]) or "nothing"
            raise ValueError(f"{self.path} holds {held}: {_LAYOUT}.")
        info = archive.getinfo(_MEMBER)
        stream = archive.open(info)
        try:
            version = np.lib.format.read_magic(stream)
            shape, fortran_order, dtype = _HEADERS[version](stream)
        except (ValueError, KeyError) as error:  # no .npy, a damaged header, or a version that no array of bytes has
            raise ValueError(f"{self.path}: `arr_0` is no array ({error}): {_LAYOUT}.") from error
        if dtype.hasobject:
            raise ValueError(f"{self.path}: `arr_0` holds pickled objects, which are not read: {_LAYOUT}.")
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            order = " in Fortran order" if fortran_order else ""
            raise ValueError(f"{self.path}: `arr_0` is {dtype} {shape}{order}: {_LAYOUT}.")
        start = stream.tell()
        expected = start + shape[0] * shape[1] * shape[2] * 3
        if info.file_size != expected:
            raise ValueError(f"{self.path} is damaged: `arr_0` {shape} has {info.file_size} bytes, not {expected}.")
        return stream, shape, start

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except _UNREADABLE as error:
            raise ValueError(f"{self.path} is damaged, or no .npz: {error}") from error
