# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of images in one .npz: what is written is read again, by numpy too, and nothing else passes for it."""

import pickle
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from photographs import load_photographs

from diffusers_d2it.pixels import to_uint8
from diffusers_d2it.sampling import NpzImages, write_npz


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Eight photographs, 24 pixels high and 32 wide."""
    return to_uint8(load_photographs(32)[:, :, :24]).permute(0, 2, 3, 1).contiguous().numpy()


def write(path: Path, images: np.ndarray, batch_size: int = 3) -> Path:
    write_npz(path, images.shape, (images[i : i + batch_size] for i in range(0, len(images), batch_size)))
    return path


def read_all(path: Path, batch_size: int = 3) -> np.ndarray:
    """All images, read in order: at the end the checksum is compared."""
    stored = NpzImages(path)
    starts = range(0, len(stored), batch_size)
    return np.concatenate([stored.read(i, min(i + batch_size, len(stored))) for i in starts])


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
    assert np.array_equal(read_all(tmp_path / "a.npz"), images)
    for start, stop in ((2, 5), (5, 8), (0, 1), (3, 4), (0, 8)):
        assert np.array_equal(stored.read(start, stop), images[start:stop])
    for start, stop in ((3, 9), (-1, 2), (4, 4)):
        with pytest.raises(ValueError, match="a.npz .*0 to 7"):
            stored.read(start, stop)


def test_another_process_may_be_handed_them(images, tmp_path):
    stored = NpzImages(write(tmp_path / "a.npz", images))
    stored.read(0, 3)
    assert np.array_equal(pickle.loads(pickle.dumps(stored)).read(2, 8), images[2:])


def test_memory_does_not_depend_on_the_number_of_images(tmp_path):
    rows = np.zeros((8, 64, 64, 3), dtype=np.uint8)
    peaks = []
    for num_batches in (4, 40):  # of 98 KB
        tracemalloc.start()
        write_npz(tmp_path / "a.npz", (8 * num_batches, 64, 64, 3), (rows for _ in range(num_batches)))
        stored = NpzImages(tmp_path / "a.npz")
        for i in range(num_batches):
            assert not stored.read(8 * i, 8 * i + 8).any()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 50_000


def test_a_failed_write_leaves_the_old_file(images, tmp_path):
    path = write(tmp_path / "a.npz", images)
    before = path.read_bytes()

    def fails():
        yield images[:2]
        raise KeyError

    with pytest.raises(KeyError):
        write_npz(path, images.shape, fails())
    rows = np.zeros((1, 24, 32, 3), np.uint8)
    for wrong, named in (
        ([images[:2]], "a.npz .*8.*`shape`.*2"),
        ([images, rows], "a.npz .*8.*`shape`.*9"),
        ([rows.astype(np.float32)], r"float32 \(1, 24, 32, 3\)"),
        ([rows.transpose(0, 3, 1, 2)], r"uint8 \(1, 3, 24, 32\)"),
    ):
        with pytest.raises(ValueError, match=named):
            write_npz(path, images.shape, wrong)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


PIXELS = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "arrays, named",
    [
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 3))}, "mu, sigma.*`arr_0`"),
        ({}, "holds nothing"),
        ({"arr_0": PIXELS.astype(float)}, r"float64 \(2, 8, 8, 3\)"),
        ({"arr_0": PIXELS.transpose(0, 3, 1, 2).copy()}, r"uint8 \(2, 3, 8, 8\)"),
        ({"arr_0": PIXELS[:0]}, r"uint8 \(0, 8, 8, 3\)"),
        ({"arr_0": np.asfortranarray(PIXELS)}, "Fortran"),
        ({"arr_0": np.array([object()])}, r"object \(1,\)"),
    ],
)
def test_a_wrong_layout_is_named(arrays, named, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"a.npz.* {named}"):
        NpzImages(tmp_path / "a.npz")


def test_what_is_no_npz_is_refused(images, tmp_path):
    np.save(tmp_path / "a.npy", images)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    for name in ("missing.npz", "", "a.npy", "a.npz"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            NpzImages(tmp_path / name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_is_noticed(images, save, tmp_path):
    path = tmp_path / "a.npz"
    save(path, images)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        array = archive.read("arr_0.npy")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.npz"):
        NpzImages(path)
    for position in (len(whole) * 3 // 4, whole.index(b"PK\x01\x02") + 16):  # of an image, of the checksum
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        for batch_size in (3, 8):
            with pytest.raises(ValueError, match="a.npz"):
                read_all(path, batch_size)
    with zipfile.ZipFile(path, "w") as archive:  # an array cut off before it was zipped
        archive.writestr("arr_0.npy", array[:-100])
    with pytest.raises(ValueError, match="a.npz.*`arr_0`"):
        NpzImages(path)
