# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Batches of whole, damaged and streamed data: nothing grey, nothing lost, and exactly the same after a resume."""

import random
from itertools import islice

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from image_files import encode, photo, truncated_jpeg, write_folder, write_tar

from diffusers_d2it.data import loaders
from diffusers_d2it.data.bad_images import BadImages
from diffusers_d2it.data.images import to_pixels
from diffusers_d2it.data.loaders import (
    ImageDataset,
    ImageStream,
    StreamLoader,
    batches_from,
    first_batches,
    global_batches,
    make_dataset,
    make_loader,
    usable_images,
)
from diffusers_d2it.data.source import load_images


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def bad_images(tmp_path):
    return BadImages(tmp_path / "bad_images.jsonl")


def level(i: int) -> bytes:
    """A picture of one grey level, by which it is known again: 10, 20, ..., flipped or not."""
    pixels = np.full((32, 32, 3), 10 * (i + 1), np.uint8)
    pixels[:, :16, 0] += 1  # tells the flip
    return encode(PIL.Image.fromarray(pixels))


def known(batch: dict) -> list[tuple[int, bool, int]]:
    """(number of the picture, flipped, label) of every item of a batch."""
    values = ((batch["pixels"] + 1) * 127.5).round().int()
    numbers = values[:, 1, 0, 0] // 10 - 1
    return list(zip(numbers.tolist(), (values[:, 0, 0, 0] % 10 == 0).tolist(), batch["class_labels"].tolist()))


def first(iterator, number: int) -> list:
    return [known(next(iterator)) for _ in range(number)]


def prepared(accelerator, bad_images, path, *, seed: int = 0, batch_size: int = 2, num_workers: int = 0, **images):
    """The loader of a run, for 32 px images."""
    source = load_images(path, **images)
    dataset = make_dataset(accelerator, source, resolution=32, seed=seed, bad_images=bad_images)
    return make_loader(accelerator, dataset, batch_size=batch_size, num_workers=num_workers)


DAMAGED = {4: b"", 5: truncated_jpeg(), 6: b"<html>", 17: encode(photo(0).resize((8, 8)))}
PICTURES = [DAMAGED.get(i, level(i)) for i in range(20)]
USABLE = set(range(20)) - set(DAMAGED)


@pytest.fixture
def damaged_folder(tmp_path):
    """Twenty pictures in two classes, four of which cannot be used."""
    files = {f"{'a' if i < 10 else 'b'}/{i:02d}.png": picture for i, picture in enumerate(PICTURES)}
    return write_folder(tmp_path / "photos", files)


@pytest.fixture
def damaged_tars(tmp_path):
    """The same in four tars, in three classes."""
    samples = {f"{i:02d}": {"png": picture, "cls": str(i % 3).encode()} for i, picture in enumerate(PICTURES)}
    for shard in range(4):
        write_tar(tmp_path / "tars" / f"{shard}.tar", dict(list(samples.items())[shard::4]))
    return tmp_path / "tars"


def item(data: dict) -> tuple[int, bool, int]:
    """`known` of one item."""
    return known({key: value[None] for key, value in data.items()})[0]


def test_items_of_a_map_style_source(damaged_folder, bad_images):
    dataset = ImageDataset(load_images(damaged_folder), 32, 7, bad_images)
    assert len(dataset) == 20 and dataset.num_classes == 2 and dataset.id2label == {0: "a", 1: "b"}
    for epoch in (0, 3):
        for i in sorted(USABLE):
            flip = random.Random(f"7/{epoch}/{i}").random() < 0.5
            path = next(damaged_folder.rglob(f"{i:02d}.png"))
            assert torch.equal(dataset[epoch, i]["pixels"], to_pixels(PIL.Image.open(path), 32, flip))
            assert torch.equal(dataset[epoch, i]["class_labels"], torch.tensor(i // 10))
    assert torch.equal(dataset[0]["pixels"], dataset[0, 0]["pixels"])
    assert not bad_images.found()


def test_another_image_stands_in(damaged_folder, bad_images):
    dataset = ImageDataset(load_images(damaged_folder), 32, 7, bad_images)
    items = {i: item(dataset[i]) for i in (4, 5, 6, 17)}
    # 1, 2, 4, 8 places after the index, the first that can be used
    assert {i: number for i, (number, _, _) in items.items()} == {4: 8, 5: 7, 6: 7, 17: 18}
    assert all(label == number // 10 for number, _, label in items.values())
    reasons = {name.split("/")[-1]: reason for name, reason in bad_images.found().items()}
    assert set(reasons) == {"04.png", "05.png", "06.png", "17.png"}
    assert len(set(reasons.values())) == 4 and "8x8" in reasons["17.png"]


def test_a_part_that_is_all_damaged_is_left_soon(tmp_path, bad_images):
    files = {f"{i:03d}.png": b"" if i < 100 else level(i % 20) for i in range(200)}
    dataset = ImageDataset(load_images(write_folder(tmp_path / "photos", files)), 32, 0, bad_images)
    dataset[60]
    assert len(bad_images.found()) == 7  # 60, 61, 62, 64, 68, 76 and 92; then comes 124


def test_nothing_but_damage_ends_at_once(tmp_path, bad_images, accelerator):
    write_folder(tmp_path / "photos", {f"{i}.png": b"" for i in range(5)})
    with pytest.raises(ValueError, match="photos.* 5 .*/0.png"):
        ImageDataset(load_images(tmp_path / "photos"), 32, 0, bad_images)[2]
    stream = prepared(accelerator, bad_images, tmp_path / "photos", streaming=True)
    with pytest.raises(ValueError, match="photos.* 0/0.* 5 .*/0.png"):
        next(batches_from(stream, 0))


def test_a_long_run_of_damage_is_an_error(tmp_path, bad_images, monkeypatch):
    monkeypatch.setattr(loaders, "MAX_UNUSABLE", 4)
    files = {f"{i}.png": b"" if i < 5 else level(i) for i in range(9)}
    source = load_images(write_folder(tmp_path / "photos", files))
    with pytest.raises(ValueError, match="^4 .*/3.png"):
        list(usable_images(source.rows(), 32, bad_images))
    files = {f"{i}.png": b"" if i % 2 else level(i) for i in range(20)}
    source = load_images(write_folder(tmp_path / "mixed", files))
    assert len(list(usable_images(source.rows(), 32, bad_images))) == 10


def test_order_and_flips_are_a_permutation_an_epoch(tmp_path, accelerator, bad_images):
    """Written out as a loop, so that no change of ours shifts a run's batches: no image is left out at an end."""
    folder = write_folder(tmp_path / "photos", {f"{i:02d}.png": level(i) for i in range(10)})
    batches = batches_from(prepared(accelerator, bad_images, folder, seed=3, batch_size=3), 0)
    found, expected = sum(first(batches, 10), []), []
    for epoch in range(3):
        word = np.random.SeedSequence(3, spawn_key=(6, epoch)).generate_state(1, np.uint64)[0]
        order = torch.randperm(10, generator=torch.Generator().manual_seed(int(word) % 2**32)).tolist()
        expected += [(i, random.Random(f"3/{epoch}/{i}").random() < 0.5, 0) for i in order]
        assert sorted(i for i, _, _ in found[10 * epoch :][:10]) == list(range(10))
    assert found == expected


@pytest.mark.parametrize("num_processes, batch_size", [(1, 12), (2, 6), (4, 3), (3, 2), (2, 1)])
def test_processes_and_passes_share_the_batch_of_an_update(num_processes, batch_size):
    """Twelve images an update, of seven: as many passes as it takes, each of them from where an update begins."""
    passes = 12 // (num_processes * batch_size)
    whole = global_batches(7, 12, 5, 0, 0, 1)
    expected = [next(whole) for _ in range(4)]
    for first_update in (0, 3):
        parts = [
            global_batches(7, batch_size, 5, first_update * passes, process, num_processes)
            for process in range(num_processes)
        ]
        for update in expected[first_update:]:
            assert [place for _ in range(passes) for part in parts for place in next(part)] == update
    assert {index for _, index in sum(expected, [])} == set(range(7))


def test_workers_draw_the_flips_of_every_epoch(tmp_path, accelerator, bad_images):
    folder = write_folder(tmp_path / "photos", {f"{i:02d}.png": level(i) for i in range(10)})
    drawn = {}
    for workers in (0, 2):
        loader = prepared(accelerator, bad_images, folder, batch_size=5, num_workers=workers)
        drawn[workers] = first(batches_from(loader, 0), 6)
    assert drawn[0] == drawn[2]
    flips = [[flip for _, flip, _ in sorted(sum(drawn[0][2 * epoch :][:2], []))] for epoch in range(3)]
    assert flips[0] != flips[1] or flips[1] != flips[2]


def test_the_first_batches_again_and_again(tmp_path, accelerator, bad_images):
    folder = write_folder(tmp_path / "photos", {f"{i:02d}.png": level(i) for i in range(10)})
    loader = prepared(accelerator, bad_images, folder, batch_size=3)
    whole = first(batches_from(loader, 0), 2)
    assert first(batches_from(loader, 3, 2), 4) == [whole[1], whole[0], whole[1], whole[0]]


@pytest.mark.parametrize("first_batch", [0, 5, 13])
def test_resume_with_damaged_images_and_other_workers(damaged_folder, accelerator, bad_images, first_batch):
    def batches(workers: int, start: int) -> list:
        loader = prepared(accelerator, bad_images, damaged_folder, batch_size=3, num_workers=workers)
        return first(batches_from(loader, start), 19 - start)

    whole = batches(0, 0)
    assert batches(1, first_batch) == batches(2, first_batch) == whole[first_batch:]
    seen = {i for batch in whole[:7] for i, _, _ in batch}
    assert seen == USABLE
    assert len(bad_images.found()) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_survives_its_bad_samples(damaged_tars, accelerator, bad_images, workers):
    images = {"streaming": True, "num_classes": 3}
    loader = prepared(accelerator, bad_images, damaged_tars, batch_size=4, num_workers=workers, **images)
    assert isinstance(loader, StreamLoader) and loader.dataset.num_classes == 3
    batches = first(batches_from(loader, 0), 12)
    assert all(len(batch) == 4 for batch in batches)
    items = [item for batch in batches for item in batch]
    assert all(label == i % 3 for i, _, label in items)
    # Three epochs of sixteen; two workers have ten samples each, of which two are bad
    assert sorted(i for i, _, _ in items) == sorted(3 * list(USABLE))
    assert {flip for _, flip, _ in items} == {True, False}
    epochs = [[i for i, _, _ in items[16 * e : 16 * e + 16]] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    found = bad_images.found()
    assert {name.split("/")[-1] for name in found} == {"04.png", "05.png", "06.png", "17.png"}
    assert all(".tar/" in name for name in found)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_exact_resume_of_a_stream(damaged_tars, accelerator, bad_images, workers):
    def batches(start: int, seed: int = 0):
        run = {"seed": seed, "batch_size": 3, "num_workers": workers}
        loader = prepared(accelerator, bad_images, damaged_tars, **run, streaming=True, num_classes=3)
        return batches_from(loader, start)

    whole = first(batches(0), 14)
    for start in (1, 4, 11):
        assert first(batches(start), 14 - start) == whole[start:]
    assert first(batches(0, seed=1), 14) != whole


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_a_stream(damaged_tars, bad_images, num_processes):
    """Two processes read two tars each; three read all and take turns."""
    source = load_images(damaged_tars, streaming=True, num_classes=3)
    seen, streams = [], []
    for process in range(num_processes):
        streams.append(ImageStream(source, 32, 0, bad_images, process, num_processes))
        rows = streams[-1].source.shuffled(5).stream()
        seen += [row.name for row, _ in usable_images(rows, 32, bad_images)]
    assert len(seen) == 16 == len(set(seen))
    flips = [[item(data)[1] for data in islice(stream, 30)] for stream in streams]
    assert flips[0] != flips[1]


def test_what_a_loader_cannot_do_is_named(damaged_tars, damaged_folder, accelerator, bad_images):
    stream = {"streaming": True, "num_classes": 3}
    with pytest.raises(ValueError, match="`num_workers` 5.* 4 "):
        prepared(accelerator, bad_images, damaged_tars, num_workers=5, **stream)
    with pytest.raises(ValueError, match="`batch_size` 21.* 20 "):
        prepared(accelerator, bad_images, damaged_folder, batch_size=21)
    loader = prepared(accelerator, bad_images, damaged_tars, **stream | {"num_classes": 2})
    with pytest.raises(ValueError, match="tar/.*png .* 2 .*'cls': .*0 to 1"):
        first(batches_from(loader, 0), 20)


def test_enlarged_images_are_counted_in_workers(tmp_path, accelerator, bad_images):
    files = {f"{i}.png": encode(photo(i, 64).resize((20 + i, 40))) for i in range(8)}
    folder = write_folder(tmp_path / "photos", files)
    batches = batches_from(prepared(accelerator, bad_images, folder, num_workers=2), 0)
    for _ in range(5):
        assert next(batches)["pixels"].shape == (2, 3, 32, 32)
    assert "smaller" in bad_images.summary()


@pytest.mark.parametrize("streaming", [False, True])
def test_first_batches(damaged_folder, bad_images, streaming):
    source = load_images(damaged_folder, streaming=streaming)
    assert [len(batch) for batch in first_batches(source, 32, 4, 10, bad_images)] == [4, 4, 2]
    assert sum(len(batch) for batch in first_batches(source, 32, 5, 100, bad_images)) == 16
    assert next(first_batches(source, 32, 5, 5, bad_images)).shape == (5, 3, 32, 32)
