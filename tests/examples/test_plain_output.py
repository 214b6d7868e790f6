# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the scripts print: lines of their own beside bars, errors of every process, the command that comes next."""

import shlex

import pytest
from script_runs import TWO_PROCESSES, load_script, run

from command_line import next_command
from flags import where


def lines_of(text: str) -> list[str]:
    """What a terminal shows one below the other, bars included."""
    return [shown for line in text.splitlines() for shown in line.split("\r")]


def test_a_mistake_that_several_processes_meet_is_said(tmp_path):
    flags = ["--vae", tmp_path, "--train_data_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "cache"]
    ended = run("cache_latents.py", *flags, launch=TWO_PROCESSES, expect_failure=True, ACCELERATE_USE_CPU="true")
    assert any(line.startswith("error: ") and "nowhere" in line for line in ended.stderr.splitlines())


def test_an_error_under_a_bar_has_a_line_of_its_own(folder, tmp_path):
    flags = ["--train_data_dir", folder, "--perceptual_weight", 0, "--preset", "dvae-tiny", "--resolution", 32]
    flags += ["--train_batch_size", 2, "--output_dir", tmp_path / "run", "--report_to", "none"]
    ended = run("train_dvae.py", *flags, "--learning_rate", 1e38, "--max_train_steps", 4, expect_failure=True)
    assert "it/s" in ended.stderr and lines_of(ended.stderr)[-1].startswith("error: ")


def test_what_is_left_out_under_a_bar_has_a_line_of_its_own(folder, make_vae, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i, file in enumerate(sorted(folder.glob("*/*.png"))):
        (images / f"{i}.png").symlink_to(file)
    (images / "cut.png").write_bytes((images / "0.png").read_bytes()[:300])
    make_vae().save_pretrained(tmp_path / "vae")
    flags = ["--reconstruction", tmp_path / "vae", "--reference", images, "--resolution", 32, "--metrics", "psnr"]
    ended = run("evaluate.py", *flags, "--output", tmp_path / "results.json")
    (line,) = [line for line in lines_of(ended.stderr) if "cut.png" in line]
    assert line.startswith("image ") and "it/s" in ended.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--train_data_dir", "a folder"],
        ["--dataset_name", "me/photos", "--dataset_config_name", "large"],
        ["--train_data_dir", "photos", "--split", "val"],
        ["--train_data_dir", "photos", "--unconditional"],
        ["--train_data_dir", "photos", "--image_column", "pixels", "--label_column", "kind of"],
        ["--train_data_dir", "photos", "--num_classes", "5", "--id2label", "it's.json"],
    ],
    ids=" ".join,
)
def test_the_next_command_reads_what_this_one_has_read(flags, tmp_path):
    first = load_script("train_dvae.py").parse_args([*flags, "--output_dir", str(tmp_path), "--max_train_steps", "1"])
    _, _, *words = shlex.split(next_command("cache_latents.py", rest="", vae="vae", **where(first)))
    second = load_script("cache_latents.py").parse_args([*words[1:], "--output_dir", str(tmp_path / "cache")])
    read = where(first)
    assert {name: getattr(second, name) for name in read} == read and len(words) > 4


def test_help_tells_defaults_that_are_zero(capsys):
    with pytest.raises(SystemExit):
        load_script("train_grain.py").parse_args(["--help"])
    help = " ".join(capsys.readouterr().out.split())
    for flag in ("--seed SEED", "--weight_decay WEIGHT_DECAY", "--lr_warmup_steps LR_WARMUP_STEPS"):
        assert "default: 0" in help.split(flag)[-1].split(" --")[0]
