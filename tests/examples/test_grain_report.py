# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""examples/grain_report.py on a tiny checkpoint and eight photographs; by two processes as by one."""

import os
from pathlib import Path

import pytest
from reports import FLAGS, read_json, save_checkpoint
from script_runs import TWO_PROCESSES, call, run

from diffusers_d2it.evaluation import Result
from diffusers_d2it.evaluation.results import differences


pytestmark = pytest.mark.filterwarnings("ignore:fd_small_network. there are no more images")


@pytest.fixture(scope="module")
def flags(folder, make_pipeline, tmp_path_factory) -> list:
    checkpoint = save_checkpoint(make_pipeline, folder, tmp_path_factory.mktemp("checkpoint"))
    return ["--checkpoint", checkpoint, "--train_data_dir", folder, *FLAGS]


@pytest.fixture(scope="module")
def report(flags, tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("report") / "report.json"
    call("grain_report.py", *flags, "--output", path)
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
    return read_json(path)


def test_report_holds_table_5_with_protocols_and_the_diagnostics(report):
    rows = report["table_5"]
    assert [row["map"] for row in rows] == ["true", "predicted", "random", "coarse", "fine"]
    results = [[Result(**result) for result in row["results"]] for row in rows]
    assert {tuple(result.metric for result in row) for row in results} == {
        ("fd_small_network", "precision_small_network")
    }
    assert set(differences(results[0][0], results[1][0])) == {"samples.grain_map"}
    samples = results[0][0].protocol["samples"]
    assert samples["num_images"] == 4 and samples["num_inference_steps"] == 2 and samples["checkpoint"]
    assert results[0][0].protocol["reference"]["num_images"] == 4
    assert report["real_images"][0]["metric"] == "fd_small_network"
    assert [row["fine_share"] for row in report["table_5"]][3:] == [0, 1]
    assert [row["coherence"] for row in report["table_5"]][3:] == [1, 1]
    assert all(0 < row["agreement"]["accuracy"] <= 1 for row in report["table_5"])
    assert report["protocol"]["checkpoint"] == samples["checkpoint"] and report["protocol"]["seed"] == 0
    assert set(report["diagnostics"]["error_by_grain"]["denoising"]) == {"250", "500", "750", "999"}


def test_report_is_printed(flags, tmp_path, capsys):
    call("grain_report.py", *flags, "--output", tmp_path / "report.json")
    printed = capsys.readouterr().out
    assert "photos, split train, 32x32: 4 images with their maps, 4 others" in printed
    assert "| map | fd_small_network | precision_small_network | fine share |" in printed
    assert "| real images | " in printed
    assert "PSNR of reconstructions by grain" in printed


def test_two_processes_find_what_one_does(flags, report, tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    of_budget = ["--fine_ratios", 0, 0.5, "--output_dir", tmp_path]
    for script, own in (("grain_report.py", ["--output", tmp_path / "report.json"]), ("budget_report.py", of_budget)):
        result = run(script, *flags, *own, launch=TWO_PROCESSES, **environment)
        assert result.stdout.count("| real images |") == 1  # the main process alone prints
    written = ["budget.json", "budget.md", "budget.png", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert_close(read_json(tmp_path / "report.json"), report)

    call("budget_report.py", *flags, "--fine_ratios", 0, 0.5, "--output_dir", tmp_path / "alone")
    alone, together = (read_json(path / "budget.json") for path in (tmp_path / "alone", tmp_path))
    assert [budget["protocol"].pop("machine")["num_processes"] for budget in (alone, together)] == [1, 2]
    for budget in (alone, together):
        assert all(row.pop("seconds_per_image") + row.pop("seconds_per_step") > 0 for row in budget["ratios"])
    assert_close(together, alone)


def assert_close(found, expected) -> None:
    """Equal but for the rounding of sums that processes share."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    elif isinstance(expected, (dict, list)):
        pairs = expected.items() if isinstance(expected, dict) else enumerate(expected)
        assert len(found) == len(expected)
        for key, value in pairs:
            assert_close(found[key], value)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--num_images", 7], "photos has 8 images .*`num_images` 7 .*`num_reference_images` 4 .* 11"),
        (["--num_images", 0], "--num_images.*got 0"),
        (["--num_reference_images", 1], "--num_reference_images.*got 1"),
        (["--num_inference_steps", 0], "--num_inference_steps.*got 0"),
        (["--grain_num_inference_steps", 0], "--grain_num_inference_steps.*got 0"),
        (["--batch_size", 0], "--batch_size.*got 0"),
        (["--seed", -1], "--seed.*got -1"),
        (["--metrics", "fid", "is"], "'is'.* 10 images"),
        (["--features", "no_such_module:conv"], "--features no_such_module:conv"),
        (["--unconditional"], "photos has no classes.* 10"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_drawn(flags, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        call("grain_report.py", *flags, *wrong, "--output", tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


def test_an_earlier_report_is_kept(flags, tmp_path, capsys):
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(SystemExit):
        call("grain_report.py", *flags, "--output", tmp_path / "report.json")
    assert "report.json exists" in capsys.readouterr().err


def test_checkpoints_that_cannot_be_reported_on(flags, make_pipeline, tmp_path):
    make_pipeline(grain_model=None, grain_scheduler=None).save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="--checkpoint .*without.*grain model"):
        call("grain_report.py", *flags, "--checkpoint", tmp_path / "without", "--output", tmp_path / "report.json")
