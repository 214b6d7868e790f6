# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""examples/budget_report.py on a tiny checkpoint and eight photographs."""

import sys

import PIL.Image
import pytest
from reports import FLAGS, read_json, save_checkpoint
from script_runs import call


pytestmark = pytest.mark.filterwarnings("ignore:fd_small_network. there are no more images")


@pytest.fixture(scope="module")
def flags(folder, make_pipeline, tmp_path_factory) -> list:
    checkpoint = save_checkpoint(make_pipeline, folder, tmp_path_factory.mktemp("checkpoint"))
    return ["--checkpoint", checkpoint, "--train_data_dir", folder, *FLAGS]


def test_budget_is_a_file_a_table_and_a_plot(flags, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    call("budget_report.py", *flags, "--output_dir", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["budget.json", "budget.md", "budget.png", "notes.txt"]
    budget = read_json(tmp_path / "budget.json")
    rows = budget["ratios"]
    assert [row["fine_ratio"] for row in rows] == [0, 0.25, 0.5, 0.75, 1] == [row["fine_share"] for row in rows]
    assert [row["fine_tokens"] for row in rows] == [0, 16, 32, 48, 64]
    assert [row["results"][0]["protocol"]["samples"]["fine_ratio"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert all(row["seconds_per_image"] > 0 for row in rows) and budget["protocol"]["machine"]["num_processes"] == 1
    table = (tmp_path / "budget.md").read_text()
    assert table.startswith("4 samples at each ratio: 2 steps, guidance 1, seed 0, float32 on ")
    assert len([line for line in table.splitlines() if line.startswith("| 0.")]) == 3
    assert PIL.Image.open(tmp_path / "budget.png").size[0] > 500
    assert "| real images |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--fine_ratios", 0, 1.5], r"`--fine_ratios` must be a number in \[0, 1\], got 1.5"),
        (["--fine_ratios", 0.5, 0.5], "`--fine_ratios` must be one or more different numbers"),
        (["--num_images", 5], "--num_images 5 and --num_reference_images 4 need 9"),
        (["--metrics", "fid", "is"], "one of --metrics, .*'is' needs at least 10 images"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_drawn(flags, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        call("budget_report.py", *flags, *wrong, "--output_dir", tmp_path / "budget")
    assert not (tmp_path / "budget").exists()


def test_earlier_results_are_kept(flags, tmp_path, capsys):
    (tmp_path / "budget.png").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        call("budget_report.py", *flags, "--output_dir", tmp_path)
    assert "budget.png exists: remove it, or name another folder" in capsys.readouterr().err
    assert (tmp_path / "budget.png").read_bytes() == b"mine"


def test_without_matplotlib_nothing_is_drawn(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="the plot of the budget needs the package matplotlib"):
        call("budget_report.py", *flags, "--output_dir", tmp_path / "budget")
    assert not (tmp_path / "budget").exists()
