# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Features of many images on disk, one row an image, for metrics that compare images with one another."""

import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


_NAMED = 8  # images that an error lists


class FeatureBank:
    """Rows of features in a temporary file, written in any order, each once, and then read a block at a time.

        with FeatureBank(len(images), 2048, accelerator=accelerator) as bank:
            for indices, pixels in images.batches(64, accelerator.process_index, accelerator.num_processes):
                bank.write(features(pixels)["pool"], indices)
            bank.finish()
            block = bank[:1024]                # (1024, 2048), float32, on the CPU

    Memory does not depend on the number of images but for one count for each. The file is removed at the end, also
    after an error; a process that is killed leaves it.

    Args:
        num_images: N, rows.
        num_features: D, columns.
        folder: where the file lies, on a disk that all processes see; None for the system's temporary folder, which is
            enough for one machine. It takes 4 * N * D bytes: 0.4 GB for 50,000 images of 2048 features.
        accelerator: its processes share the rows, and all of them make the bank, finish and close it; None for one.

    Raises:
        ValueError: a number is not positive, or `folder` is no folder.
    """

    def __init__(
        self,
        num_images: int,
        num_features: int,
        folder: str | Path | None = None,
        accelerator: Accelerator | None = None,
    ):
        for name, value in (("num_images", num_images), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"`folder` must be a folder, there is none at {folder}.")
        self.shape = (num_images, num_features)
        self._accelerator = accelerator
        self._tally = ImageTally(num_images)
        self._row_bytes = 4 * num_features
        self._finished = False
        path = None
        if accelerator is None or accelerator.is_main_process:
            handle, path = tempfile.mkstemp(prefix="features-", suffix=".float32", dir=folder)
            os.close(handle)
            self._remove = weakref.finalize(self, Path(path).unlink, missing_ok=True)
        else:
            self._remove = None
        if accelerator is not None:
            path = broadcast_object_list([path])[0]
        self.path = Path(path)
        self._file = self.path.open("r+b")

    def __len__(self) -> int:
        return self.shape[0]

    def __enter__(self) -> "FeatureBank":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def write(self, features: torch.Tensor, indices: torch.Tensor) -> None:
        """Write the rows of some images.

        Args:
            features: (B, D), float32.
            indices: (B,), int64, which images they are of.

        Raises:
            ValueError: another shape or dtype, a value that is not finite, an index outside the set or one that was
                written before, or the bank is finished or closed.
        """
        if self._finished or self._file.closed:
            raise ValueError("a bank that is finished or closed takes no more features.")
        check_features(features, indices, self.shape[1])
        if features.dtype != torch.float32:
            raise ValueError(f"a bank holds float32, got features of {features.dtype}.")
        self._tally.add(indices)
        rows = features.detach().cpu().contiguous().numpy()
        for index, row in zip(indices.tolist(), rows):
            self._file.seek(index * self._row_bytes)
            self._file.write(row)

    def finish(self) -> None:
        """Wait until all processes have written; rows can be read from then on.

        Raises:
            ValueError: an image is missing, or was written by two processes.
        """
        self._file.close()  # before the processes meet: a disk of a network shows others what is closed
        tally = self._tally if self._accelerator is None else self._tally.gathered(self._accelerator)
        tally.check_complete()
        self._file = self.path.open("rb")
        self._finished = True

    def __getitem__(self, rows: slice | np.ndarray) -> torch.Tensor:
        """Rows as (n, D), float32: those of a slice without a step, or of indices (n,).

        Raises:
            ValueError: the bank is not finished, or closed; a step, or an index outside the set.
        """
        if not self._finished or self._file.closed:
            raise ValueError("a bank can be read between `finish` and `close`.")
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"a bank is read in slices without a step, got {rows}.")
            block = torch.empty(max(stop - start, 0), self.shape[1])
            self._read(start, block)
            return block
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or ((rows < 0) | (rows >= len(self))).any():
            raise ValueError(f"rows of a bank must be whole numbers (n,) in [0, {len(self)}), got {rows}.")
        block = torch.empty(len(rows), self.shape[1])
        for row, values in zip(rows.tolist(), block):
            self._read(row, values)
        return block

    def _read(self, row: int, values: torch.Tensor) -> None:
        self._file.seek(row * self._row_bytes)
        view = memoryview(values.numpy()).cast("B") if values.numel() else memoryview(bytearray())
        if self._file.readinto(view) != len(view):
            raise ValueError(f"{self.path} was cut off by someone else: row {row} is not in it.")

    def close(self) -> None:
        """Remove the file; once is enough, and more does no harm."""
        self._file.close()
        if self._remove is not None:
            self._remove()


class ImageTally:
    """Which images of a set have been counted, so that each counts exactly once.

    Args:
        num_images: N, of the set.
    """

    def __init__(self, num_images: int):
        self.times = torch.zeros(num_images, dtype=torch.int64)

    def add(self, indices: torch.Tensor) -> None:
        """Count images.

        Raises:
            ValueError: `indices` are not int64 (B,), lie outside the set, or have an image that was counted before;
                nothing is counted then.
        """
        num_images = len(self.times)
        if indices.ndim != 1 or indices.dtype != torch.int64:
            raise ValueError(f"`indices` must be (B,), int64, got {tuple(indices.shape)}, {indices.dtype}.")
        indices = indices.cpu()
        outside = indices[(indices < 0) | (indices >= num_images)]
        if len(outside):
            raise ValueError(f"`indices` must be in [0, {num_images}), got {_listed(outside)}.")
        images, counts = indices.unique(return_counts=True)
        twice = images[(counts > 1) | (self.times[images] > 0)]
        if len(twice):
            raise ValueError(f"each image must be counted once, these came again: {_listed(twice)}.")
        self.times[images] = 1

    def merge(self, other: "ImageTally") -> None:
        """Add what another has counted, other images of the same set.

        Raises:
            ValueError: another number of images, or an image that both have.
        """
        if len(other.times) != len(self.times):
            raise ValueError(f"both must be of one set, got sets of {len(self.times)} and {len(other.times)} images.")
        self.add(other.times.nonzero().flatten())

    def gathered(self, accelerator: Accelerator) -> "ImageTally":
        """What all processes have counted together, the same on each."""
        total = ImageTally(len(self.times))
        total.times = accelerator.reduce(self.times.to(accelerator.device), "sum").cpu()
        return total

    def check_complete(self) -> None:
        """Raise a ValueError unless each image was counted once; the others are named."""
        faults = {"missing": self.times == 0, "counted more than once": self.times > 1}
        found = [f"{fault}: {_listed(wrong.nonzero().flatten())}" for fault, wrong in faults.items() if wrong.any()]
        if found:
            raise ValueError(f"each of the {len(self.times)} images must be counted once, {'; '.join(found)}.")


def check_features(
    features: torch.Tensor, indices: torch.Tensor | None = None, num_features: int | None = None
) -> None:
    """Check what a network gave for some images.

    Args:
        features: should be (B, D), float32 or float64, and finite.
        indices: (B,), which images they are of; named in the errors.
        num_features: D; None for any.

    Raises:
        ValueError: they are something else.
    """
    if features.ndim != 2 or features.shape[1] != (num_features or features.shape[1]) or not features.shape[1]:
        raise ValueError(f"features must be (B, {num_features or 'D'}), got {tuple(features.shape)}.")
    if features.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"features must be float32 or float64, got {features.dtype}.")
    if indices is not None and indices.shape != features.shape[:1]:
        raise ValueError(f"`indices` must be ({len(features)},), one for each row, got {tuple(indices.shape)}.")
    wrong = (~features.isfinite().all(dim=1)).nonzero().flatten().cpu()
    if len(wrong):
        named = f"rows {_listed(wrong)} of the batch" if indices is None else f"images {_listed(indices.cpu()[wrong])}"
        raise ValueError(f"features must be finite, those of {named} are not.")


def _listed(indices: torch.Tensor) -> str:
    listed = ", ".join(map(str, indices[:_NAMED].tolist()))
    return listed if len(indices) <= _NAMED else f"{listed}, ... ({len(indices)} in all)"
