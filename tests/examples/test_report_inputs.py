# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The real images that a report starts from, and their classes."""

import json
from pathlib import Path

import pytest
import script_runs  # noqa: F401  which lets the scripts be imported
import torch
from image_files import encode, photo, write_folder
from metric_inputs import refused
from photographs import load_photographs

from diffusers_d2it import D2iTPipeline
from diffusers_d2it.data import BadImages, load_images
from diffusers_d2it.pipelines.labels import class_of
from diffusers_d2it.pixels import to_uint8
from report_inputs import draw_images, known_classes


NAMES = {2: "tabby cat, cat", 5: "rocket", 7: "coffee"}


def load(root: Path, pipe: D2iTPipeline, num_images: int = 3, others: int = 2, **options) -> tuple:
    """Images, labels as ids of the checkpoint's classes, and others."""
    ours = [options.pop(name, default) for name, default in (("resolution", 32), ("seed", 0), ("least", 2))]
    source = load_images(root, **options)
    classes = known_classes(source, pipe)
    images, labels, reference = draw_images(source, num_images, others, BadImages(root.parent / "bad.jsonl"), *ours)
    return images, classes and [classes[label] for label in labels], reference


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photographs 0 to 5, two of each class, in sub-folders; labels are 0 coffee, 1 rocket, 2 cat."""
    files = {f"{name}/{i}.png": encode(photo(i, 32)) for i, name in enumerate(["coffee", "rocket", "tabby cat"] * 2)}
    return write_folder(tmp_path / "photos", files)


@pytest.fixture(scope="module")
def pipe(make_pipeline) -> D2iTPipeline:
    return make_pipeline(id2label=NAMES)


def test_images_and_labels_belong_together_and_the_reference_is_of_others(folder, pipe):
    photos = to_uint8(load_photographs(32))[:6]
    images, labels, reference = load(folder, pipe)
    drawn = torch.cat([images, reference])
    numbers = [[torch.equal(one, image) for image in photos].index(True) for one in drawn]
    assert len(set(numbers)) == 5
    assert labels == [{0: 7, 1: 5, 2: 2}[number % 3] for number in numbers[:3]]


def test_the_seed_decides_which_images(folder, pipe):
    one, same, other = (load(folder, pipe, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one[0], same[0]) and not torch.equal(one[0], other[0])


def test_streams_and_unconditional_checkpoints(folder, pipe, make_pipeline):
    assert set(load(folder, pipe, streaming=True)[1]) <= set(NAMES)
    assert load(folder, make_pipeline(num_classes=None))[1] is None


def test_other_sizes_and_what_cannot_be_used(folder, pipe):
    assert load(folder, pipe, 1, resolution=64)[0].shape == (1, 3, 64, 64)
    (folder / "rocket" / "broken.png").write_bytes(b"<html>")
    assert len(load(folder, pipe, 3, 3)[0]) == 3
    refused("6 images .*`num_images` 4 .*`num_reference_images` 3 .* 7.*broken", load, folder, pipe, 4, 3)


@pytest.mark.parametrize(
    "asked, drawn",
    [((None, None), (2, 4)), ((2, None), (2, 4)), ((None, 2), (4, 2)), ((3, 3), (3, 3)), ((1, 2), (1, 2))],
)
def test_a_small_set_makes_a_small_report_unless_numbers_are_asked_for(folder, pipe, asked, drawn):
    images, labels, reference = load(folder, pipe, *asked)
    assert (len(images), len(reference)) == drawn and len(labels) == len(images)


def test_a_small_set_is_divided_as_metrics_need_it(folder, pipe):
    images, _, reference = load(folder, pipe, None, None, least=3)
    assert (len(images), len(reference)) == (3, 3)
    refused("photos .*6 images .* 8", load, folder, pipe, None, None, least=4)


@pytest.mark.parametrize("asked", [(4, 3), (6, None), (None, 6), (5, None), (0, 3), (0, None), (None, 0)])
def test_a_set_too_small_for_what_is_asked_for(folder, pipe, asked):
    refused("photos .*`num_images`", load, folder, pipe, *asked)


# ---- Classes ----


@pytest.mark.parametrize(
    "label, name, expected",
    [
        (0, "cat", 2),  # one of several names
        (0, "a cup, coffee", 7),
        (0, "tabby cat, cat", 2),
        (3, "rocket", 5),  # names count more than numbers
        (5, "5", 5),
        (0, "5", 5),
        (0, "dog", None),
        (5, "dog", None),
        (0, "8", None),
    ],
)
def test_classes_are_found_by_name_or_number(label, name, expected):
    assert class_of(label, name, NAMES, num_classes=10) == expected


def test_classes_that_share_a_name_and_models_without_names():
    cranes = {1: "crane, bird", 4: "crane, machine"}
    assert [class_of(label, "crane", cranes, 10) for label in (0, 1, 4)] == [None, 1, 4]
    assert [class_of(label, name, None, 10) for label, name in ((0, "7"), (3, "dog"), (12, "12"))] == [7, 3, None]


def write_numbers(root: Path, labels: list[int]) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [photo(i, 32) for i in range(len(labels))], "label": labels}
    root.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "train.parquet")
    return root


def test_labels_that_are_numbers_are_those_of_the_checkpoint(tmp_path, pipe, make_pipeline):
    root = write_numbers(tmp_path / "numbers", [7, 5, 7, 5, 7, 5])
    assert set(load(root, pipe)[1]) <= {5, 7}
    assert set(load(root, make_pipeline(id2label=None))[1]) <= {5, 7}
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"5": "coffee", "7": "rocket"}))  # names count more than numbers
    assert load(root, pipe, id2label=names)[1] != load(root, pipe)[1]


def test_classes_that_the_checkpoint_does_not_have(tmp_path, folder, pipe, make_pipeline):
    with pytest.raises(ValueError, match="numbers.*'3'.*'tabby cat, cat', 'rocket', 'coffee'"):
        load(write_numbers(tmp_path / "numbers", [3, 5, 7, 5, 7]), pipe)
    refused("'tabby cat'", load, folder, make_pipeline(id2label={0: "coffee", 1: "rocket", 2: "lion"}))
    refused("'12'.*0, 1", load, write_numbers(tmp_path / "more", [3, 12, 3, 3, 3]), make_pipeline(id2label=None))
    flat = write_folder(tmp_path / "flat", {f"{i}.png": encode(photo(i, 32)) for i in range(6)})
    refused("flat.*classes.* 10", load, flat, pipe)
