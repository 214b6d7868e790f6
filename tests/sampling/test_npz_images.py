# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of images in one .npz: what is written is read again, by numpy too, and nothing else passes for it."""

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from photographs import load_photographs

from diffusers_d2it.sampling.npz import NpzImages, NpzWriter


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Eight photographs, 24 pixels high and 32 wide."""
    return ((load_photographs(32)[:, :, :24].permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().astype(np.uint8)


def write(path: Path, images: np.ndarray, batch_size: int = 3) -> Path:
    with NpzWriter(path, *images.shape[:3]) as writer:
        for start in range(0, len(images), batch_size):
            writer.write(images[start : start + batch_size])
    return path


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_numpy_reads_what_is_written_in_any_batches(images, batch_size, tmp_path):
    path = write(tmp_path / "a.npz", images, batch_size)
    with np.load(path) as stored:
        assert stored.files == ["arr_0"] and stored["arr_0"].dtype == np.uint8
        assert np.array_equal(stored["arr_0"], images)
    assert path.read_bytes() == write(tmp_path / "b.npz", images, 8).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read_in_any_order(images, save, tmp_path):
    save(tmp_path / "a.npz", images, np.arange(8))
    stored = NpzImages(tmp_path / "a.npz")
    assert (len(stored), stored.num_images, stored.height, stored.width) == (8, 8, 24, 32)
    batches = list(stored.iterate(3))
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert np.array_equal(np.concatenate(batches), images)
    for start, stop in ((2, 5), (5, 8), (0, 1), (3, 4), (0, 8)):
        assert np.array_equal(stored.read(start, stop), images[start:stop])
    first, second = stored.iterate(2), stored.iterate(3)
    assert np.array_equal(next(first), images[:2]) and np.array_equal(next(second), images[:3])
    assert np.array_equal(next(first), images[2:4])


def test_memory_does_not_depend_on_the_number_of_images(tmp_path):
    rows = np.zeros((8, 64, 64, 3), dtype=np.uint8)
    peaks = []
    for num_batches in (4, 40):  # of 98 KB
        tracemalloc.start()
        with NpzWriter(tmp_path / "a.npz", 8 * num_batches, 64, 64) as writer:
            for _ in range(num_batches):
                writer.write(rows)
        for batch in NpzImages(tmp_path / "a.npz").iterate(8):
            assert not batch.any()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 50_000


def test_a_failed_write_leaves_the_old_file(images, tmp_path):
    path = write(tmp_path / "a.npz", images)
    before = path.read_bytes()
    with pytest.raises(KeyError), NpzWriter(path, *images.shape[:3]) as writer:
        writer.write(images[:2])
        raise KeyError
    with pytest.raises(ValueError, match="announced with 8 images, 2 were written"):
        with NpzWriter(path, *images.shape[:3]) as writer:
            writer.write(images[:2])
    with pytest.raises(ValueError, match="announced with 2 images, got 8"):
        with NpzWriter(path, 2, 24, 32) as writer:
            writer.write(images)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "rows, found",
    [
        (np.zeros((1, 24, 32, 3), np.float32), "float32"),
        (np.zeros((1, 3, 24, 32), np.uint8), "1, 3, 24, 32"),
        ([], "list"),
    ],
)
def test_rows_of_another_layout_are_refused(rows, found, tmp_path):
    with pytest.raises(ValueError, match=f"uint8 array .B, 24, 32, 3.*{found}"):
        with NpzWriter(tmp_path / "a.npz", 1, 24, 32) as writer:
            writer.write(rows)


def test_numbers_below_one_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="`height` must be at least 1, got 0"):
        NpzWriter(tmp_path / "a.npz", 1, 0, 32)
    stored = NpzImages(write(tmp_path / "a.npz", images))
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        stored.iterate(0)
    for start, stop in ((3, 9), (-1, 2), (4, 4)):
        with pytest.raises(ValueError, match="holds images 0 to 7"):
            stored.read(start, stop)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, "holds 'mu', 'sigma': an .npz of images holds `arr_0`"),
        ({}, "holds nothing"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, r"float64 \(2, 8, 8, 3\)"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"uint8 \(2, 3, 8, 8\)"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, r"uint8 \(0, 8, 8, 3\)"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8))}, "in Fortran order"),
        ({"arr_0": np.array([object()])}, "pickled objects, which are not read"),
    ],
)
def test_a_wrong_layout_is_named(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        NpzImages(tmp_path / "a.npz")


def test_what_is_no_npz_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="missing"):
        NpzImages(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="is a folder"):
        NpzImages(tmp_path)
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(ValueError, match="damaged, or no .npz"):
        NpzImages(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    with pytest.raises(ValueError, match="`arr_0` is no array"):
        NpzImages(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_is_noticed(images, save, tmp_path):
    path = tmp_path / "a.npz"
    save(path, images)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.npz is damaged"):
        NpzImages(path)
    for position in (len(whole) * 3 // 4, whole.index(b"PK\x01\x02") + 16):  # of an image, of the checksum
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        for batch_size in (3, 8):
            with pytest.raises(ValueError, match="a.npz is damaged"):
                list(NpzImages(path).iterate(batch_size))
    with zipfile.ZipFile(path, "w") as archive:  # an array cut off before it was zipped
        archive.writestr("arr_0.npy", zipfile.ZipFile(_file(tmp_path, whole)).read("arr_0.npy")[:-100])
    with pytest.raises(ValueError, match="a.npz is damaged: `arr_0`"):
        NpzImages(path)


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "whole.npz"
    path.write_bytes(data)
    return path
