# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""examples/budget_report.py on a tiny checkpoint and eight photographs."""

import sys

import PIL.Image
import pytest
import torch
from photographs import load_photographs
from reports import FLAGS, read_json, save_checkpoint
from script_runs import call, load_script

from diffusers_d2it.evaluation import Drawing, reconstruct
from diffusers_d2it.evaluation.reconstruction import psnr
from diffusers_d2it.pixels import to_uint8


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
    picture = PIL.Image.open(tmp_path / "budget.png")
    assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(2**20)) > 10
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index(next(line for line in lines if line.startswith("| fine ratio"))) :]
    assert lines[0].endswith("| PSNR, dB | tokens | GMAC / forward | s / image | ms / step |")
    assert lines[3].startswith("| 0.25 | ") and " | 16 + 16 | " in lines[3]
    assert lines[7].startswith("| real images | ") and {line.count("|") for line in lines[:8]} == {9}


def test_reconstruction_at_a_ratio_is_that_of_the_autoencoder(make_pipeline):
    drawing = Drawing(make_pipeline(), torch.arange(8), batch_size=3)
    images = to_uint8(load_photographs(32))
    found = load_script("budget_report.py").reconstruction_at(drawing, images, 0.4)
    decoded, shares = reconstruct(drawing.pipe.vae, images, 0.4)
    expected = psnr(images / 127.5 - 1, decoded / 127.5 - 1).mean().item()
    assert found["reconstruction_psnr_db"] == pytest.approx(expected, rel=1e-6)
    assert found["reconstruction_fine_share"] == pytest.approx(shares.mean().item())


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--fine_ratios", 0, 1.5], "`fine_ratios`.*1.5"),
        (["--fine_ratios", 0.5, 0.5], r"`fine_ratios`.*\[0.5, 0.5\]"),
        (["--num_images", 5], "`num_images` 5 .*`num_reference_images` 4 .* 9"),
        (["--metrics", "fid", "is"], "'is'.* 10 images"),
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
    assert "budget.png exists" in capsys.readouterr().err
    assert (tmp_path / "budget.png").read_bytes() == b"mine"


def test_without_matplotlib_nothing_is_drawn(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib.*diffusers-d2it\[metrics\]"):
        call("budget_report.py", *flags, "--output_dir", tmp_path / "budget")
    assert not (tmp_path / "budget").exists()
