# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Comparisons of a checkpoint with itself."""

from dataclasses import replace

import pytest
import torch
from metric_inputs import refused, small_network
from photographs import load_photographs

from diffusers_d2it.evaluation import (
    Drawing,
    Evaluator,
    ImageSet,
    ModuleFeatures,
    Result,
    Row,
    compare,
    evaluate,
)
from diffusers_d2it.evaluation.results import differences
from diffusers_d2it.pixels import to_uint8


SHAPE = (8, 3, 32, 32)

pytestmark = pytest.mark.filterwarnings("ignore:fd_conv. there are no more images")


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
