# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""grain_report.py and budget_report.py on a tiny checkpoint and eight photographs; by two processes as by one."""

import io
import json
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import PIL.Image
import pytest
import torch
from photographs import load_photographs
from script_runs import call, load_script, together

from diffusers_d2it.evaluation import Drawing, Result, reconstruct
from diffusers_d2it.evaluation.reconstruction import psnr
from diffusers_d2it.evaluation.results import differences
from diffusers_d2it.pixels import to_uint8


pytestmark = pytest.mark.filterwarnings("ignore:fd_small_network. there are no more images")
BUDGET = ["budget.json", "budget.md", "budget.png"]


def read_json(path: Path) -> dict:
    """A file of plain JSON: NaN and infinities are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def flags(folder, make_pipeline, tmp_path_factory) -> list:
    """Of both scripts. The pipeline knows the classes of the photographs by name, under other numbers than theirs."""
    checkpoint, names = tmp_path_factory.mktemp("checkpoint"), sorted(path.name for path in folder.iterdir())
    make_pipeline(id2label=dict(enumerate(reversed(names), start=2))).save_pretrained(checkpoint)
    flags = ["--checkpoint", checkpoint, "--train_data_dir", folder, "--features", "metric_inputs:small_network"]
    flags += ["--metrics", "fid", "precision", "--num_images", 4, "--num_reference_images", 4]
    return [*flags, "--num_inference_steps", 2, "--grain_num_inference_steps", 2, "--batch_size", 3]


@pytest.fixture(scope="module")
def other(folder, make_dcdit_pipeline, tmp_path_factory) -> Path:
    """A DC-DiT of the same classes, under other numbers again."""
    names = sorted(path.name for path in folder.iterdir())
    checkpoint = tmp_path_factory.mktemp("other")
    make_dcdit_pipeline(id2label=dict(enumerate(names))).save_pretrained(checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def report(flags, tmp_path_factory) -> tuple[dict, str]:
    """What grain_report.py writes, and what it prints."""
    path, printed = tmp_path_factory.mktemp("report") / "report.json", io.StringIO()
    with redirect_stdout(printed):
        call("grain_report.py", *flags, "--output", path)
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
    return read_json(path), printed.getvalue()


def test_report_holds_table_5_with_protocols_and_the_diagnostics_and_is_printed(report):
    report, printed = report
    rows = report["table_5"]
    assert [row["map"] for row in rows] == ["true", "predicted", "random", "coarse", "fine"]
    results = [[Result(**result) for result in row["results"]] for row in rows]
    metrics = {tuple(result.metric for result in row) for row in results}
    assert metrics == {("fd_small_network", "precision_small_network")}
    assert set(differences(results[0][0], results[1][0])) == {"samples.grain_map"}
    samples = results[0][0].protocol["samples"]
    assert samples["num_images"] == 4 and samples["num_inference_steps"] == 2 and samples["checkpoint"]
    assert results[0][0].protocol["reference"]["num_images"] == 4
    assert report["real_images"][0]["metric"] == "fd_small_network"
    assert [row["fine_share"] for row in rows][3:] == [0, 1]
    assert [row["autocorrelation"] for row in rows][3:] == [1, 1]
    assert all(0 < row["agreement"]["accuracy"] <= 1 for row in rows)
    assert report["protocol"]["checkpoint"] == samples["checkpoint"] and report["protocol"]["seed"] == 0
    assert set(report["diagnostics"]["error_by_grain"]["denoising"]) == {"250", "500", "750", "999"}
    assert "photos, 32x32: 4 images with their maps, 4 others" in printed
    assert "| map | fd_small_network | precision_small_network | fine share |" in printed
    assert "| real images | " in printed and "PSNR of reconstructions by grain" in printed


@pytest.fixture(scope="module")
def budgets(flags, other, tmp_path_factory) -> tuple[Path, str]:
    """The folder that budget_report.py writes of both models, and what it prints."""
    folder, printed = tmp_path_factory.mktemp("budgets"), io.StringIO()
    (folder / "notes.txt").write_text("mine")
    with redirect_stdout(printed):
        both = ["--checkpoint", flags[1], other, "--budgets", 0.25, 1]
        call("budget_report.py", *flags, *both, "--output_dir", folder)
    return folder, printed.getvalue()


def test_budgets_of_both_models_are_a_file_a_table_and_a_plot(flags, other, budgets):
    folder, printed = budgets
    checkpoints = [str(flags[1]), str(other)]
    assert sorted(path.name for path in folder.iterdir()) == [*BUDGET, "notes.txt"]
    budget = read_json(folder / "budget.json")
    rows = budget["rows"]
    assert [(row["checkpoint"], row["budget"]) for row in rows] == [
        (name, b) for name in checkpoints for b in (0.25, 1)
    ]
    assert [row["tokens"].get("refine") for row in rows] == [16, 64, None, None]
    few, all_natural = (row["tokens"]["backbone"] for row in rows[2:])
    assert few == pytest.approx(all_natural / 4, abs=1)
    asked = [row["results"][0]["protocol"]["samples"] for row in rows]
    assert [(one.get("fine_ratio"), one.get("budget")) for one in asked] == [
        (0.25, None),
        (1, None),
        (None, 0.25),
        (None, 1),
    ]
    assert [("reconstruction_psnr_db" in row) for row in rows] == [True, True, False, False]
    assert all(row["seconds_per_image"] > 0 for row in rows) and budget["protocol"]["machine"]["num_processes"] == 1
    assert list(budget["protocol"]["checkpoints"]) == checkpoints
    table = (folder / "budget.md").read_text()
    assert table.startswith("4 samples a row: 2 steps, guidance 1, seed 0, float32 on ")
    picture = PIL.Image.open(folder / "budget.png")
    assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(2**20)) > 10
    lines = printed.splitlines()
    lines = lines[lines.index(next(line for line in lines if line.startswith("|  | budget"))) :]
    assert lines[0].endswith("| PSNR, dB | tokens | GMAC / image | s / image | ms / step |")
    assert lines[2].startswith(f"| {checkpoints[0]} | 0.25 | ") and " | 16 + 16 | " in lines[2]
    assert lines[6].startswith("| real images | ") and {line.count("|") for line in lines[:7]} == {10}


def test_multiply_adds_of_all_passes(flags, other, budgets, tmp_path):
    """Guided every step has two passes, of DC-DiT each with tokens of its own."""
    for name, more in (("guided", ["--guidance_scale", 2]), ("longer", ["--num_inference_steps", 4])):
        both = ["--checkpoint", flags[1], other, "--budgets", 1, *more]
        call("budget_report.py", *flags, *both, "--output_dir", tmp_path / name)
    plain, guided, longer = (
        [row["gmac"] for row in read_json(folder / "budget.json")["rows"] if row["budget"] == 1]
        for folder in (budgets[0], tmp_path / "guided", tmp_path / "longer")
    )
    # Of grains, not of images, is the embedding of grains; and DC-DiT keeps what it keeps
    assert guided == [pytest.approx(2 * plain[0], rel=0.02), pytest.approx(2 * plain[1], rel=0.2)]
    assert longer == [pytest.approx(2 * plain[0]), pytest.approx(2 * plain[1], rel=0.2)]


def test_reconstruction_at_a_ratio_is_that_of_the_autoencoder(make_pipeline):
    drawing = Drawing(make_pipeline(), torch.arange(8), batch_size=3)
    images = to_uint8(load_photographs(32))
    found = load_script("budget_report.py").reconstruction_at(drawing, images, 0.4)
    decoded, shares = reconstruct(drawing.pipe.vae, images, 0.4)
    expected = psnr(images / 127.5 - 1, decoded / 127.5 - 1).mean().item()
    assert found["reconstruction_psnr_db"] == pytest.approx(expected, rel=1e-6)
    assert found["reconstruction_fine_share"] == pytest.approx(shares.mean().item())


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


def test_two_processes_find_what_one_does(flags, report, tmp_path):
    of_budget = ["--budgets", 0, 0.5, "--output_dir", tmp_path]
    for script, own in (("grain_report.py", ["--output", tmp_path / "report.json"]), ("budget_report.py", of_budget)):
        said = together(partial(call, script, *flags, *own))
        assert said.count("| real images |") == 1  # the main process alone prints
    assert sorted(path.name for path in tmp_path.iterdir()) == [*BUDGET, "report.json"]
    assert_close(read_json(tmp_path / "report.json"), report[0])

    call("budget_report.py", *flags, "--budgets", 0, 0.5, "--output_dir", tmp_path / "alone")
    alone, shared = (read_json(path / "budget.json") for path in (tmp_path / "alone", tmp_path))
    assert [budget["protocol"].pop("machine")["num_processes"] for budget in (alone, shared)] == [1, 2]
    for budget in (alone, shared):
        assert all(row.pop("seconds_per_image") + row.pop("seconds_per_step") > 0 for row in budget["rows"])
    assert_close(shared, alone)


# ---- What is refused ----

GRAIN = ("grain_report.py", "--output", "report.json")
OF_BUDGET = ("budget_report.py", "--output_dir", "budget")


@pytest.mark.parametrize(
    "script, wrong, message",
    [
        (GRAIN, ["--num_images", 7], "photos has 8 images .*`num_images` 7 .*`num_reference_images` 4 .* 11"),
        (GRAIN, ["--metrics", "fid", "is"], "'is'.* 10 images"),
        (GRAIN, ["--features", "no_such_module:conv"], "--features no_such_module:conv"),
        (GRAIN, ["--unconditional"], "photos has no classes.* 10"),
        (GRAIN, ["--resolution", 30], "`resolution`.* 8.* 30"),
        (GRAIN, ["--checkpoint", "nowhere"], "--checkpoint nowhere"),
        (OF_BUDGET, ["--num_images", 5], "`num_images` 5 .*`num_reference_images` 4 .* 9"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_drawn(flags, tmp_path, script, wrong, message):
    name, output, path = script
    with pytest.raises(ValueError, match=message):
        call(name, *flags, *wrong, output, tmp_path / path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("script, kept", [(GRAIN, "report.json"), (OF_BUDGET, "budget/budget.png")])
def test_earlier_results_are_kept(flags, tmp_path, capsys, script, kept):
    name, output, path = script
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_text("mine")
    with pytest.raises(SystemExit):
        call(name, *flags, output, tmp_path / path)
    assert f"{kept} exists" in capsys.readouterr().err and (tmp_path / kept).read_text() == "mine"


def test_without_matplotlib_nothing_is_drawn(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib.*diffusers-d2it\[metrics\]"):
        call("budget_report.py", *flags, "--output_dir", tmp_path / "budget")
    assert not list((tmp_path / "budget").iterdir())


def test_checkpoints_that_cannot_be_reported_on(flags, other, make_pipeline, tmp_path):
    make_pipeline(grain_model=None, grain_scheduler=None).save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="--checkpoint .*without.*grain model"):
        call("grain_report.py", *flags, "--checkpoint", tmp_path / "without", "--output", tmp_path / "report.json")
    with pytest.raises(ValueError, match=rf"--checkpoint {other} .*DCDiTPipeline"):
        call("grain_report.py", *flags, "--checkpoint", other, "--output", tmp_path / "report.json")
    with pytest.raises(ValueError, match=r"`budget`.*\[0.01, 1\].*0"):
        call("budget_report.py", *flags, "--checkpoint", other, "--budgets", 0, "--output_dir", tmp_path / "budget")
    with pytest.raises(ValueError, match=f"--checkpoint .*{other} {other}"):
        call("budget_report.py", *flags, "--checkpoint", other, other, "--output_dir", tmp_path / "budget")
