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


@pytest.fixture
def bad_images(path):
    return BadImages(path)


def noted(path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_nothing_to_say(path, bad_images):
    bad_images.count((256, 300), 256)
    assert bad_images.summary() == "" and bad_images.found() == {} and not path.exists()


def test_each_name_once_with_its_reason(path, bad_images, caplog):
    reasons = {"a.jpg": "truncated", "b\x1b[31m.jpg": "empty"}
    for name, reason in [*reasons.items()] * 3:
        bad_images.add(name, reason)
    assert noted(path) == [{"name": name, "reason": reason} for name, reason in reasons.items()]
    assert bad_images.found() == reasons and len(caplog.messages) == 2
    for said in (bad_images.summary(), caplog.text):
        assert "'a.jpg'" in said and "truncated" in said and "empty" in said
    assert "\x1b" not in bad_images.summary() + caplog.text + path.read_text()
    assert bad_images.summary().startswith("2 ") and str(path) in bad_images.summary()


def test_long_lists_are_cut_where_they_are_shown(path, bad_images, caplog):
    for i in range(30):
        bad_images.add(f"{i}.jpg", "empty")
    assert len(bad_images.found()) == 30 == len(noted(path))
    assert bad_images.summary().startswith("30 ") and "'29.jpg'" not in bad_images.summary()
    assert len(caplog.messages) == 10 and str(path) in caplog.messages[-1]


def test_another_process_is_heard(path, bad_images):
    theirs = BadImages(path)
    theirs.add("a.jpg", "empty")
    bad_images.add("a.jpg", "empty")
    bad_images.add("b.jpg", "empty")
    assert [image["name"] for image in noted(path)] == ["a.jpg", "b.jpg"]
    for one in (bad_images, theirs, BadImages(path)):  # also when a run is resumed
        assert set(one.found()) == {"a.jpg", "b.jpg"}


def test_many_processes_write_at_once(path):
    processes = [multiprocessing.get_context("fork").Process(target=add_many, args=(path, i * 100)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert set(BadImages(path).found()) == {f"image {i}" for i in range(600)}
    assert all(set(image) == {"name", "reason"} for image in noted(path))


def test_a_line_that_was_cut_is_written_again(path, bad_images):
    path.parent.mkdir()
    path.write_text('{"name": "a.jpg", "rea')
    for name in ("b.jpg", "a.jpg", "b.jpg"):
        bad_images.add(name, "empty")
    assert set(BadImages(path).found()) == {"a.jpg", "b.jpg"}


def test_enlarged_images_are_counted(bad_images):
    for size in ((256, 256), (255, 400), (400, 128)):
        bad_images.count(size, 256)
    assert bad_images.summary().startswith("66.7%")
