# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A safetensors file that lies in memory first, so that tensors are copied at once and written when there is time."""

import errno
import hashlib
import json
import os
from collections.abc import Generator, Mapping
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .folders import Record


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


_DTYPES = {  # in the order of a file, by falling size: so each tensor begins at a multiple of it
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BLOCK = 4096  # bytes: what a disk without cache takes begins and ends at multiples of it
_PIECE = 2**23  # bytes that are hashed and written at once


class TensorFile:
    """A safetensors file in memory, byte for byte as safetensors writes it: a header in JSON, then all values.

    Args:
        tensors: what the file is to hold, by name: types and shapes, no values. A sharded tensor counts as the whole.

    Attributes:
        tensors: by name, parts of the memory of the file: what is copied into them will be written.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._layout = _layout(tensors)
        order = list(_DTYPES)
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
            begin, end = end, end + tensors[name].numel() * tensors[name].itemsize
            dtype, shape = self._layout[name]
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        beginning = len(text).to_bytes(8, "little") + text
        self._num_bytes = len(beginning) + end
        memory = torch.empty(self._num_bytes + 2 * _BLOCK, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % _BLOCK :]
        memory[: len(beginning)] = torch.frombuffer(bytearray(beginning), dtype=torch.uint8)
        self._memory = memoryview(memory.numpy())
        values = memory[len(beginning) :]
        self.tensors = {
            name: values[slice(*header[name]["data_offsets"])].view(dtype).view(shape)
            for name, (dtype, shape) in self._layout.items()
        }

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are tensors of the names, types and shapes that the file holds."""
        return self._layout == _layout(tensors)

    def first_not_finite(self) -> str | None:
        """The name of a tensor that holds anything but finite numbers, if there is one."""
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point():
                # NumPy: torch would start threads for this one, and with more threads than processors OpenMP lets none
                # of them wait awake, those of a training beside it included
                values = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
                if not np.isfinite([extreme(values, initial=0) for extreme in (np.min, np.max)]).all():
                    return name
        return None

    def write(self, path: Path) -> Generator[None, None, Record]:
        """Write the file, which must not be there yet, a piece at a time, and force it to the disk.

        It passes the system's file cache by where Linux and the disk allow that: it is rarely read soon, the images of
        a training are better kept there, and where it was measured new room in the cache cost the processor most.

        Returns:
            Size and hash for a manifest, of the bytes that lie in memory.

        Raises:
            OSError: the disk is full or failed.
        """
        digest = hashlib.sha256()
        with open(path, "xb", buffering=0) as file:
            _pass_by_cache(file, True)
            for begin in range(0, self._num_bytes, _PIECE):
                end = min(begin + _PIECE, self._num_bytes)
                digest.update(self._memory[begin:end])
                _write_all(file, self._memory[begin : end + -end % _BLOCK])
                yield
            file.truncate(self._num_bytes)
            os.fsync(file.fileno())
        return {"bytes": self._num_bytes, "sha256": digest.hexdigest()}


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _write_all(file: FileIO, piece: memoryview) -> None:
    while piece:
        try:
            piece = piece[file.write(piece) :]
        except OSError as error:  # a disk may say only now that it must be asked through the cache
            if error.errno != errno.EINVAL or not _pass_by_cache(file, False):
                raise


def _pass_by_cache(file: FileIO, wanted: bool) -> bool:
    """Let what is written to a file from now on go through the file cache or not, and return whether that changed."""
    flag = getattr(os, "O_DIRECT", 0)
    if fcntl is None or not flag:
        return False
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    new = flags | flag if wanted else flags & ~flag
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, new)
    except OSError:  # a disk that has no other way
        return False
    return new != flags
