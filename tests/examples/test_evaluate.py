# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""evaluate.py and compare.py, from images on the disk to a table."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from image_files import encode, write_folder
from metric_inputs import crops
from PIL import Image
from script_runs import call, load_script, together

from diffusers_d2it import bundled_checkpoint
from diffusers_d2it.evaluation.results import compare, differences, load_results
from diffusers_d2it.files import on_main_process


NETWORK = ["--features", "metric_inputs:small_network"]


def write_images(root: Path, images: torch.Tensor) -> Path:
    files = {f"{i}.png": encode(Image.fromarray(image.permute(1, 2, 0).numpy())) for i, image in enumerate(images)}
    return write_folder(root, files)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Thirty samples, and thirty others as the reference."""
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "samples", crops(30, seed=0)), write_images(root / "reference", crops(30, seed=1))


def evaluated(output: Path, *arguments: object) -> dict:
    """The results of a call of evaluate.py, by name."""
    call("evaluate.py", *arguments, "--output", output)
    return {result.metric: result for result in load_results(output)}


def of_samples(folders: tuple[Path, Path]) -> list:
    metrics = ["fid", "sfid", "is", "precision", "recall", "kid", "psnr", "rfid"]
    flags = ["--samples", folders[0], "--reference", folders[1], "--metrics", *metrics, *NETWORK]
    return [*flags, "--kid_subset_size", 20]


def of_reconstructions(folders: tuple[Path, Path]) -> list:
    checkpoint = ["--reconstruction", bundled_checkpoint(), "--fine_ratio", 0.5]
    return ["--reference", folders[1], "--resolution", 32, "--metrics", "psnr", "ssim", "rfid", *checkpoint, *NETWORK]


@pytest.fixture(scope="module")
def by_one(folders, tmp_path_factory) -> tuple[Path, dict]:
    """The results of one process, and their file."""
    output = tmp_path_factory.mktemp("results") / "one.json"
    return output, evaluated(output, *of_samples(folders), "--batch_size", 8)


def test_two_processes_give_the_values_of_one(folders, by_one, tmp_path):
    expected = [by_one[1], evaluated(tmp_path / "one.json", *of_reconstructions(folders), "--batch_size", 7)]
    calls = [
        # Thirty images in batches of 7: the first process reads 7 + 7 + 2 of them, the second one 7 + 7
        [*flags, "--batch_size", 7, "--dataloader_num_workers", 1, "--output", tmp_path / f"{i}.json"]
        for i, flags in enumerate((of_samples(folders), of_reconstructions(folders)))
    ]
    calls.append(["--reference", folders[1], "--save_statistics", tmp_path / "reference.npz", *NETWORK])

    def fail() -> None:
        raise ValueError("only here")

    def evaluate() -> None:
        for flags in calls:
            call("evaluate.py", *flags)
        accelerator = Accelerator()
        with pytest.raises(ValueError) as raised:
            on_main_process(accelerator, fail)
        print(f"process {accelerator.process_index}: {raised.value}")

    said = together(evaluate)
    for i, results in enumerate(expected):
        found = {one.metric: one for one in load_results(tmp_path / f"{i}.json")}
        assert list(found) == list(results) and len(found) == (8, 4)[i]
        for name, one in results.items():
            assert found[name].value == pytest.approx(one.value, rel=1e-6), name
            assert not differences(one, found[name])
            assert found[name].protocol["samples"] == one.protocol["samples"]  # the digest of the pixels included
    statistics = ["--samples", folders[0], "--reference", tmp_path / "reference.npz", "--metrics", "fid", *NETWORK]
    [by_statistics] = evaluated(tmp_path / "by_statistics.json", *statistics).values()
    assert compare(by_one[1]["fd_small_network"], by_statistics) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="reference.npz.* statistics"):
        evaluated(tmp_path / "pairs.json", *statistics, "--metrics", "psnr")
    assert "reference.npz: small_network, 30 images of reference" in said
    assert said.count(" with the protocol") == 2  # not by both processes
    assert all(f"process {i}: only here\n" in said for i in (0, 1))


def test_an_autoencoder_is_measured_on_a_data_set(folders, tmp_path):
    arguments = ["--reference", folders[1], "--resolution", 32, "--metrics", "psnr", "ssim", "rfid", *NETWORK]
    by_ratio = {}
    for ratio, checkpoint in ((0.0, bundled_checkpoint()), (1.0, Path(bundled_checkpoint()) / "vae")):
        flags = [*arguments, "--reconstruction", checkpoint, "--fine_ratio", ratio]
        by_ratio[ratio] = evaluated(tmp_path / f"{ratio}.json", *flags)
        assert by_ratio[ratio]["fine_share"].value == ratio
    coarse, fine = by_ratio[0.0], by_ratio[1.0]
    assert list(fine) == ["psnr", "ssim", "rfd_small_network", "fine_share"]
    assert fine["psnr"].value > coarse["psnr"].value + 1 and fine["ssim"].value > coarse["ssim"].value
    assert set(differences(coarse["psnr"], fine["psnr"])) == {"samples.fine_ratio"}


def test_samples_bring_the_protocol_of_their_sampling(folders, tmp_path):
    arguments = ["--output_dir", tmp_path / "samples", "--num_images", 12, "--batch_size", 12]
    call("sample.py", *arguments, "--num_inference_steps", 2)
    large = write_images(tmp_path / "reference", crops(12, seed=1, side=64))
    arguments = ["--samples", tmp_path / "samples", "--reference", large, "--metrics", "fid", "is", *NETWORK]
    found = evaluated(tmp_path / "results.json", *arguments)
    described = found["fd_small_network"].protocol["samples"]
    assert described["num_images"] == 12 and described["resolution"] == [64, 64] and described["seed"] == 0
    assert described["num_inference_steps"] == 2 and "checkpoint" in described


# ---- Comparing ----


def test_like_figures_are_put_side_by_side(by_one, tmp_path, capsys):
    stored = json.loads(by_one[0].read_text())
    stored["results"] = stored["results"][:2]
    stored["results"][0]["value"] += 1
    (tmp_path / "other.json").write_text(json.dumps(stored))
    call("compare.py", by_one[0], tmp_path / "other.json")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["a", "b", "b", "-", "a"]
    assert lines[1][0] == "fd_small_network" and lines[1][3] == "1"
    assert lines[2][0] == "sfd_small_network" and lines[2][3] == "0"
    assert lines[3][:3] == ["only", "in", str(by_one[0]) + ":"] and "psnr" in lines[3][-2]


def test_unlike_figures_are_refused_with_the_fields(by_one, tmp_path, capsys):
    stored = json.loads(by_one[0].read_text())
    for one in stored["results"]:
        one["protocol"]["samples"]["seed"] = 1
    (tmp_path / "other.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit) as stop:
        call("compare.py", by_one[0], tmp_path / "other.json")
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == ""
    assert output.err.count("samples.seed: not stated and 1") == len(stored["results"])
    call("compare.py", by_one[0], tmp_path / "other.json", "--varying", "samples.seed")
    assert "fd_small_network" in capsys.readouterr().out


def test_files_without_a_common_metric_are_refused(by_one, tmp_path, capsys):
    stored = json.loads(by_one[0].read_text())["results"]
    for name, results in (("a", stored[:1]), ("b", stored[1:2]), ("twice", stored[:1] * 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": results}))
    with pytest.raises(SystemExit) as stop:
        call("compare.py", tmp_path / "a.json", tmp_path / "b.json")
    assert stop.value.code == 2 and "fd_small_network; sfd_" in capsys.readouterr().err
    with pytest.raises(ValueError, match="twice.json.* fd_small_network, fd_small_network"):
        call("compare.py", tmp_path / "a.json", tmp_path / "twice.json")


# ---- Flags ----


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--samples a --reference b --metrics fid", ["--metrics", "--output"]),
        ("--samples a --reference b --output c.json", ["--metrics", "--output"]),
        ("--samples a --metrics fid is --output c.json", ["--reference", "'is'"]),
        ("--reconstruction a --metrics top1 --output c.json", ["--reference", "--samples"]),
        ("--save_statistics c.npz", ["--reference"]),
        ("--samples a --reference b --metrics psnr --output c.json --fine_ratio 0.5", ["--fine_ratio"]),
        ("--reconstruction a --reference b --metrics fid --output c.json", ["--reconstruction", "psnr, ssim"]),
        ("--reference b --save_statistics c.npz --metrics fid", ["--save_statistics", "--metrics"]),
        ("--samples a --reconstruction b --metrics psnr --output c.json", ["--reconstruction", "--samples"]),
        ("--samples a --reference b --metrics fid --output taken.json", ["taken.json exists"]),
        ("--reference b --save_statistics taken.json", ["taken.json exists"]),
    ],
)
def test_flags_that_do_not_go_together(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.json").write_text("{}")
    with pytest.raises(SystemExit):
        load_script("evaluate.py").parse_args(flags.split())
    error = capsys.readouterr().err.rpartition("error: ")[2]  # without the usage
    assert all(one in error for one in named)


def test_an_inception_score_needs_no_reference(folders, tmp_path):
    found = evaluated(tmp_path / "is.json", "--samples", folders[0], "--metrics", "is", *NETWORK)
    assert list(found) == ["is_small_network"]
