# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Results in files, and what may be compared with what."""

import copy
import json
import math
import os

import pytest
from metric_inputs import refused

from diffusers_d2it.evaluation.results import Result, compare, differences, load_results, save_report, save_results


PROTOCOL = {
    "features": {"name": "inception", "digest": "f00"},
    "samples": {
        "name": "ours", "num_images": 50_000, "resolution": (256, 256), "digest": "abc", "seed": 0,
        "checkpoint": {"weights": "123", "config": "456"}, "environment": {"torch": "2.10"},
    },
    "reference": {"name": "imagenet", "num_images": 10_000, "digest": "def"},
    "rank_deficient": False,
    "versions": {"torch": "2.10"},
}  # fmt: skip


def result(value: float = 5.0, **changes: object) -> Result:
    """A result; `samples__seed=1` changes a field of its protocol."""
    protocol = copy.deepcopy(PROTOCOL)
    for name, field in changes.items():
        *place, last = name.split("__")
        part = protocol
        for key in place:
            part = part[key]
        part[last] = field
    return Result("fid", value, protocol)


def test_results_come_back_from_a_file(tmp_path):
    saved = [result(), Result("kid", 0.25, {"settings": {"seed": 0}}, 0.125), Result("psnr", float("inf"), {})]
    save_results(tmp_path / "results.json", saved)
    assert load_results(tmp_path / "results.json") == saved  # a tuple in a protocol included
    assert os.listdir(tmp_path) == ["results.json"]


def test_results_are_json_for_every_reader(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    saved = [Result("psnr", float("inf"), {"images": 1}, deviation=float("inf")), Result("is", -float("inf"), {})]
    save_results(tmp_path / "results.json", saved)
    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert [result.value for result in load_results(tmp_path / "results.json")] == [float("inf"), -float("inf")]


def test_unlike_protocols_are_refused_and_every_field_is_named():
    a = result()
    b = result(4.0, samples__seed=1, reference__digest="987", rank_deficient=True, samples__guidance_scale=1.5)
    with pytest.raises(ValueError, match='samples.seed: 0 .*1;.*samples.guidance_scale: .* 1.5; .*"def" .*"987"'):
        compare(a, b)
    assert differences(a, b) == {
        "samples.seed": (0, 1), "reference.digest": ("def", "987"), "rank_deficient": (False, True),
        "samples.guidance_scale": ("not stated", 1.5),
    }  # fmt: skip


def test_what_makes_no_difference_to_the_figure_may_differ():
    other = result(
        4.0, samples__checkpoint={"weights": "789"}, samples__name="theirs", samples__digest="fed",
        samples__environment={"torch": "2.11"}, reference__name="val", versions={"torch": "2.11"},
    )  # fmt: skip
    assert compare(result(), other) == -1.0
    with pytest.raises(ValueError, match='samples.checkpoint.weights: "123" and "789"; samples.checkpoint.config'):
        compare(result(), other, varying=())


def test_fields_are_let_off_by_whole_names():
    a, b = result(), result(6.0, samples__seed=1)
    assert compare(a, b, varying=["samples.seed"]) == compare(a, b, varying=["samples"]) == 1.0
    refused("samples.seed: 0 and 1", compare, a, b, varying=["samples.see", "seed"])


def test_another_metric_is_another_protocol():
    refused('metric: "fid" and "sfid"', compare, result(), Result("sfid", 5.0, PROTOCOL))


def test_what_is_no_result_is_refused(tmp_path):
    refused("`value` of 'fid'.*NaN", Result, "fid", float("nan"), {})
    refused("`protocol` of 'fid'", Result, "fid", 1.0, {"features": object()})
    path = tmp_path / "results.json"
    refused("results.json", load_results, path)
    for text in ("{", "[]"):
        path.write_text(text)
        refused("results.json", load_results, path)
    for results in (None, 3, [{"metric": "fid"}], ["fid"], [{"x": 1}]):
        path.write_text(json.dumps({"results": results}))
        refused("results.json", load_results, path)


def test_numbers_that_json_does_not_have_are_null_in_a_report(tmp_path):
    report = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf, "d": "NaN", "e": True}}
    save_report(tmp_path / "report.json", report)
    expected = {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": "NaN", "e": True}}
    assert json.loads((tmp_path / "report.json").read_text()) == expected
