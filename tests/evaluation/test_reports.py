# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Comparisons of a checkpoint with itself, and the real images that they start from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_files import encode, photo, write_folder
from metric_inputs import refused, small_network
from photographs import load_photographs

from diffusers_d2it import D2iTPipeline
from diffusers_d2it.data import BadImages, load_images
from diffusers_d2it.evaluation import (
    Drawing,
    Evaluator,
    ImageSet,
    LabelledImages,
    ModuleFeatures,
    Result,
    Row,
    compare,
    draw_labelled_images,
    evaluate,
)
from diffusers_d2it.evaluation.results import differences
from diffusers_d2it.pipelines.labels import class_of
from diffusers_d2it.pixels import to_uint8


SHAPE = (8, 3, 32, 32)
NAMES = {2: "tabby cat, cat", 5: "rocket", 7: "coffee"}

pytestmark = pytest.mark.filterwarnings("ignore:fd_conv. there are no more images")


# ---- Rows ----


@pytest.fixture(scope="module")
def drawing(make_pipeline) -> Drawing:
    settings = {"num_inference_steps": 3, "grain_num_inference_steps": 3, "batch_size": 3}
    return Drawing(make_pipeline(), torch.arange(8), **settings)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """Compares with the mirrored photographs."""
    reference = ImageSet.from_tensor(to_uint8(load_photographs(32)).flip(3), "mirrored")
    return Evaluator(reference, ["fid"], ModuleFeatures(small_network(), "conv"))


@pytest.fixture(scope="module")
def maps() -> torch.Tensor:
    return torch.randint(2, (8, 4, 4), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def rows(drawing, evaluator, maps) -> list[Row]:
    arguments = {"given": {"grain_map": maps}, "0.3": {"fine_ratio": 0.3}, "1": {"fine_ratio": 1.0}}
    options = {"title": "drawn at {}", "costs": True}
    return compare(replace(drawing, checkpoint={"checkpoint": "tiny"}), arguments, evaluator, SHAPE, **options)


def test_a_row_is_what_evaluate_finds_in_its_samples(rows, drawing, evaluator, maps):
    assert torch.equal(rows[0].images, drawing.images(maps))
    samples = ImageSet.from_tensor(rows[0].images, "given")
    [expected] = evaluate(samples, evaluator.images, ["fid"], evaluator.features)
    [found] = rows[0].results
    assert found["metric"] == "fd_conv" and found["value"] == pytest.approx(expected.value, rel=1e-9)


def test_rows_of_the_other_model(make_dcdit_pipeline, evaluator):
    """The same comparison, by what every adaptive model says of itself."""
    drawing = Drawing(make_dcdit_pipeline(), torch.arange(8), num_inference_steps=3, batch_size=3)
    argument = drawing.pipe.transformer.budget_argument
    whole, half = compare(drawing, {"1": argument.at(1), "0.5": argument.at(0.5)}, evaluator, SHAPE, costs=True)
    assert half.cost["tokens"]["backbone"] == pytest.approx(whole.cost["tokens"]["backbone"] / 2, abs=1)
    assert half.cost["macs"] < whole.cost["macs"]
    assert half.results[0]["protocol"]["samples"]["budget"] == 0.5


def test_protocols_tell_the_rows_apart(rows):
    given, few, all_fine = (Result(**row.results[0]) for row in rows)
    said = {name: given.protocol["samples"][name] for name in ("grain_map", "checkpoint", "name")}
    assert said == {"grain_map": "given", "checkpoint": "tiny", "name": "drawn at given"}
    assert set(differences(few, all_fine)) == {"samples.fine_ratio"}
    assert len({one.protocol["samples"]["digest"] for one in (given, few, all_fine)}) == 3


def test_rows_do_not_depend_on_their_company_or_on_being_measured(rows, drawing, evaluator):
    [alone] = compare(drawing, {"0.3": {"fine_ratio": 0.3}}, evaluator, SHAPE)
    assert alone.cost is None and torch.equal(alone.images, rows[1].images)
    assert alone.results[0]["value"] == rows[1].results[0]["value"]


def test_batch_size_changes_rounding_alone(rows, drawing, evaluator, maps):
    [whole] = compare(replace(drawing, batch_size=8), {"given": {"grain_map": maps}}, evaluator, SHAPE)
    assert (whole.images.int() - rows[0].images.int()).abs().max() <= 1


def test_costs_follow_the_budget(rows, maps):
    costs = [row.cost for row in rows]
    assert [cost["tokens"] for cost in costs] == [
        {"backbone": 16, "refine": 4 * maps.sum().item() / 8},
        {"backbone": 16, "refine": 20},  # 0.3 of 16 regions, to the nearest one
        {"backbone": 16, "refine": 64},
    ]
    assert costs[1]["macs"] < costs[2]["macs"]
    assert all(cost[seconds] > 0 for cost in costs for seconds in ("seconds_per_step", "seconds_per_image"))


def test_a_number_of_images_that_does_not_fit(drawing, evaluator):
    refused(r"`labels`.* 7 .*\(8,\)", compare, drawing, {"fine": {"grain_map": "fine"}}, evaluator, (7, 3, 32, 32))


# ---- Real images ----


def load(root: Path, pipe: D2iTPipeline, num_images: int = 3, others: int = 2, **options) -> LabelledImages:
    ours = {name: options.pop(name) for name in ("resolution", "seed", "least") if name in options}
    source = load_images(root, **options)
    return draw_labelled_images(source, pipe, num_images, others, BadImages(root.parent / "bad.jsonl"), **ours)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photographs 0 to 5, two of each class, in sub-folders; labels are 0 coffee, 1 rocket, 2 cat."""
    files = {f"{name}/{i}.png": encode(photo(i, 32)) for i, name in enumerate(["coffee", "rocket", "tabby cat"] * 2)}
    return write_folder(tmp_path / "photos", files)


@pytest.fixture
def pipe(make_pipeline) -> D2iTPipeline:
    return make_pipeline(id2label=NAMES)


def test_images_and_labels_belong_together_and_the_reference_is_of_others(folder, pipe):
    photos = to_uint8(load_photographs(32))[:6]
    data = load(folder, pipe)
    drawn = torch.cat([data.images, data.reference[:]])
    numbers = [[torch.equal(one, image) for image in photos].index(True) for one in drawn]
    assert len(set(numbers)) == 5
    assert data.labels.tolist() == [{0: 7, 1: 5, 2: 2}[number % 3] for number in numbers[:3]]
    assert data.description == "photos, 32x32"


def test_the_seed_decides_which_images(folder, pipe):
    one, same, other = (load(folder, pipe, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images) and not torch.equal(one.images, other.images)


def test_streams_and_unconditional_checkpoints(folder, pipe, make_pipeline):
    assert set(load(folder, pipe, streaming=True).labels.tolist()) <= set(NAMES)
    assert load(folder, make_pipeline(num_classes=None)).labels is None


def test_other_sizes_and_what_cannot_be_used(folder, pipe):
    assert load(folder, pipe, 1, resolution=64).images.shape == (1, 3, 64, 64)
    refused("`resolution`.* 8.* 30", load, folder, pipe, resolution=30)
    (folder / "rocket" / "broken.png").write_bytes(b"<html>")
    assert len(load(folder, pipe, 3, 3).images) == 3
    refused("6 images .*`num_images` 4 .*`num_reference_images` 3 .* 7.*broken", load, folder, pipe, 4, 3)


@pytest.mark.parametrize(
    "asked, drawn",
    [((None, None), (2, 4)), ((2, None), (2, 4)), ((None, 2), (4, 2)), ((3, 3), (3, 3)), ((1, 2), (1, 2))],
)
def test_a_small_set_makes_a_small_report_unless_numbers_are_asked_for(folder, pipe, asked, drawn):
    data = load(folder, pipe, *asked)
    assert (len(data.images), len(data.reference)) == drawn


def test_a_small_set_is_divided_as_metrics_need_it(folder, pipe):
    data = load(folder, pipe, None, None, least=3)
    assert (len(data.images), len(data.reference)) == (3, 3)
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
    assert set(load(root, pipe).labels.tolist()) <= {5, 7}
    assert set(load(root, make_pipeline(id2label=None)).labels.tolist()) <= {5, 7}
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"5": "coffee", "7": "rocket"}))  # names count more than numbers
    assert load(root, pipe, id2label=names).labels.tolist() != load(root, pipe).labels.tolist()


def test_classes_that_the_checkpoint_does_not_have(tmp_path, folder, pipe, make_pipeline):
    with pytest.raises(ValueError, match="numbers.*'3'.*'tabby cat, cat', 'rocket', 'coffee'"):
        load(write_numbers(tmp_path / "numbers", [3, 5, 7, 5, 7]), pipe)
    refused("'tabby cat'", load, folder, make_pipeline(id2label={0: "coffee", 1: "rocket", 2: "lion"}))
    refused("'12'.*0, 1", load, write_numbers(tmp_path / "more", [3, 12, 3, 3, 3]), make_pipeline(id2label=None))
    flat = write_folder(tmp_path / "flat", {f"{i}.png": encode(photo(i, 32)) for i in range(6)})
    refused("flat.*classes.* 10", load, flat, pipe)
