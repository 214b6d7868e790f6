# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What could not be used is told once, by name, whichever process met it."""

import json
import multiprocessing

import pytest

from diffusers_d2it.data.bad_images import BadImages


def add_many(path, first: int) -> None:
    bad_images = BadImages(path)
    for i in range(first, first + 300):
        bad_images.add(f"image {i}", "x" * (i % 97))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "bad_images.jsonl"


def test_nothing_to_say(path):
    bad_images = BadImages(path)
    assert bad_images.summary() == "" and bad_images.found() == {}
    bad_images.count((256, 300), 256)
    assert bad_images.summary() == "" and not path.exists()


def test_each_name_once_with_its_reason(path, caplog):
    bad_images = BadImages(path)
    for _ in range(3):
        bad_images.add("a.jpg", "truncated")
        bad_images.add("b\x1b[31m.jpg", "empty")
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a.jpg", "b\x1b[31m.jpg"]
    assert bad_images.found() == {"a.jpg": "truncated", "b\x1b[31m.jpg": "empty"}
    summary = bad_images.summary()
    assert summary.startswith("2 of the images could not be used: 'a.jpg': truncated; ") and str(path) in summary
    assert len(caplog.messages) == 2 and caplog.messages[0] == "image 'a.jpg' cannot be used: truncated"
    assert "\x1b" not in summary + caplog.text + path.read_text()


def test_long_lists_are_cut_where_they_are_shown(path, caplog):
    bad_images = BadImages(path)
    for i in range(30):
        bad_images.add(f"{i}.jpg", "empty")
    assert len(bad_images.found()) == 30 == len(path.read_text().splitlines())
    assert bad_images.summary().startswith("30 of the images") and "'29.jpg'" not in bad_images.summary()
    assert len(caplog.messages) == 10 and str(path) in caplog.messages[-1]


def test_another_process_is_heard(path):
    ours, theirs = BadImages(path), BadImages(path)
    theirs.add("a.jpg", "empty")
    ours.add("a.jpg", "empty")
    ours.add("b.jpg", "empty")
    assert len(path.read_text().splitlines()) == 2 and set(theirs.found()) == {"a.jpg", "b.jpg"}
    assert set(BadImages(path).found()) == {"a.jpg", "b.jpg"}  # also when a run is resumed


def test_many_processes_write_at_once(path):
    processes = [multiprocessing.get_context("fork").Process(target=add_many, args=(path, i * 100)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert set(BadImages(path).found()) == {f"image {i}" for i in range(600)}
    assert all(set(json.loads(line)) == {"name", "reason"} for line in path.read_text().splitlines())


def test_a_line_that_was_cut_is_written_again(path):
    path.parent.mkdir()
    path.write_text('{"name": "a.jpg", "rea')
    bad_images = BadImages(path)
    bad_images.add("b.jpg", "empty")
    bad_images.add("a.jpg", "empty")
    bad_images.add("b.jpg", "empty")
    assert set(BadImages(path).found()) == {"a.jpg", "b.jpg"}


def test_enlarged_images_are_counted(path):
    bad_images = BadImages(path)
    for size in ((256, 256), (255, 400), (400, 128)):
        bad_images.count(size, 256)
    assert bad_images.summary().startswith("2 of 3 images read by this process were smaller")
