# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A file that is laid out in memory is the one that safetensors would have written, on any disk."""

import os
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from diffusers_d2it.files import tensor_file
from diffusers_d2it.files.folders import Record, check_file
from diffusers_d2it.files.tensor_file import TensorFile


TYPES = [getattr(torch, name) for name in "float64 float32 float16 bfloat16 int64 int32 uint8 bool".split()]


def tensors_of(num_values: int) -> dict[str, torch.Tensor]:
    """Of all types, with names in another order; one is a number, one is empty, one lies across in memory."""
    values = torch.randint(0, 2, (num_values,))
    tensors = {f"{9 - i}.größe": values.to(dtype) for i, dtype in enumerate(TYPES)}
    return tensors | {"number": torch.tensor(2.5), "empty": torch.zeros(0, 3), "across": torch.rand(3, 5).T}


def filled(tensors: dict[str, torch.Tensor]) -> TensorFile:
    file = TensorFile(tensors)
    for name, tensor in tensors.items():
        file.tensors[name].copy_(tensor)
    return file


def write(file: TensorFile, path: Path) -> Record:
    pieces = file.write(path)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("tensors", [tensors_of(n) for n in (0, 1, 7, 4096, 10_001)] + [{}], ids=len)
@pytest.mark.parametrize("piece", [4096, 2**24])
def test_the_file_is_that_of_safetensors(tensors, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_PIECE", piece)
    path = tmp_path / "weights.safetensors"
    record = write(filled(tensors), path)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert path.read_bytes() == save(contiguous, metadata={"format": "pt"})
    check_file(path, record)


def test_a_file_fits_what_has_its_names_types_and_shapes():
    file = TensorFile({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    assert file.fits({"b": torch.ones(4), "a": torch.ones(2, 3)})
    for other in (torch.ones(3, 2), torch.ones(6), torch.ones(2, 3).half()):
        assert not file.fits({"a": other, "b": torch.zeros(4)})
    assert not file.fits({"a": torch.zeros(2, 3)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found(bad):
    for name, tensor in filled(tensors_of(9)).tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            file = filled(tensors_of(9))
            assert file.first_not_finite() is None
            file.tensors[name].view(-1)[-1] = bad
            assert file.first_not_finite() == name


def test_what_is_there_is_not_written_over(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_text("of somebody else")
    with pytest.raises(FileExistsError, match=r"weights\.safetensors"):
        write(filled({"a": torch.ones(3)}), path)
    assert path.read_text() == "of somebody else"


def test_what_a_disk_has_not_taken_is_written_next(tmp_path):
    class Narrow(FileIO):
        def write(self, piece):
            return super().write(piece[:1000])

    content = bytes(range(256)) * 100
    with Narrow(tmp_path / "file", "xb") as file:
        tensor_file._write_all(file, memoryview(content))
    assert Path(tmp_path, "file").read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no way past its file cache")
def test_a_disk_that_must_be_asked_through_the_cache_is(tmp_path, monkeypatch):
    """What lies at odd places in memory, and has odd lengths, no disk takes past the cache."""
    path = tmp_path / "file"
    content = memoryview(bytearray(range(256)) * 100)[1:]
    with open(path, "xb", buffering=0) as file:
        tensor_file._pass_by_cache(file, True)
        tensor_file._write_all(file, content)
    assert path.read_bytes() == content
