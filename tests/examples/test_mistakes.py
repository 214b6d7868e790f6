# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A person's mistake is answered in one line, which names flag, value and remedy, and before torch is imported."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script_runs import EXAMPLES, load_script

from diffusers_d2it import list_samplers
from diffusers_d2it.evaluation import METRICS, PAIR_METRICS
from diffusers_d2it.objectives import OBJECTIVES
from set_up import schedule_of


SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if "\n    main(ARGS)" in path.read_text())
TRAIN = "--vae v --latent_cache c --output_dir o --max_train_steps 2"
SOURCE = "--train_data_dir p"
# script, flags, and what the answer names
FLAGS = [
    ("train_d2it.py", "--latent_cahe c", ["--latent_cahe", "--latent_cache"]),
    ("train_d2it.py", f"{TRAIN} --grain g --objective epsiln", ["--objective", "epsiln", *OBJECTIVES]),
    ("train_d2it.py", TRAIN, ["--grain"]),
    ("train_d2it.py", f"{TRAIN} --grain g --alignment a", ["--alignment", "--latent_cache"]),
    ("train_d2it.py", f"{TRAIN} --grain g --fine_ratio 0.8 0.3", ["--fine_ratio", "0.8"]),
    ("train_d2it.py", f"{TRAIN} --grain g --fine_ratio 2", ["--fine_ratio", "2"]),
    ("train_dcdit.py", f"{TRAIN} --budgets 1 0", ["--budgets", "0.01"]),
    ("train_dcdit.py", f"{TRAIN} --budgets 1.5", ["--budgets", "1.5"]),
    ("train_dcdit.py", f"{TRAIN} --compression 1", ["--compression", "1.01"]),
    ("train_dcdit.py", f"{TRAIN} --ratio_group_size 3", ["--ratio_group_size 3", "--train_batch_size 32"]),
    ("train_dcdit.py", f"{TRAIN} --distill_from d", ["--distill_from", "--init_from"]),
    ("train_dcdit.py", f"{TRAIN} --init_from m --distill_from d --objective v_prediction", ["--objective", "epsilon"]),
    ("train_dcdit.py", f"{TRAIN} --alignment a", ["--alignment", "--latent_cache"]),
    ("train_dcdit.py", f"{TRAIN} --preset p --init_from i", ["--preset", "--init_from"]),
    ("train_dcdit.py", f"{TRAIN} --fine_ratio 0.5", ["--fine_ratio"]),
    ("train_grain.py", f"{TRAIN} --max_train_steps 0", ["--max_train_steps", "0"]),
    ("train_grain.py", f"{TRAIN} --checkpointing_steps 0", ["--checkpointing_steps", "0"]),
    ("train_grain.py", f"{TRAIN} --checkpoints_total_limit 0", ["--checkpoints_total_limit", "0"]),
    ("train_grain.py", f"{TRAIN} --overfit_batches 0", ["--overfit_batches", "0"]),
    ("train_grain.py", f"{TRAIN} --skip_nonfinite_steps -1", ["--skip_nonfinite_steps", "-1"]),
    ("train_grain.py", f"{TRAIN} --lr_scheduler cosin", ["--lr_scheduler", "cosin", "cosine", "linear"]),
    ("train_grain.py", f"{TRAIN} --learning_rate nan", ["--learning_rate", "nan"]),
    ("train_grain.py", f"{TRAIN} --label_dropout 1.5", ["--label_dropout", "1.5"]),
    ("train_grain.py", f"{TRAIN} --train_batch_size many", ["--train_batch_size", "many"]),
    ("train_grain.py", f"{TRAIN} {SOURCE}", ["--latent_cache", "--train_data_dir"]),
    ("train_grain.py", "@no/where.txt", ["no/where.txt"]),
    ("train_grain.py", "@recipe.txt", ["--resolutoin", "--resolution"]),
    ("train_dvae.py", f"{SOURCE} --output_dir o --max_train_steps 2 --freeze_fine_path", ["--freeze_fine_path"]),
    (
        "train_dvae.py",
        f"{SOURCE} --output_dir o --max_train_steps 2 --perceptual_weight 0 --perceptual_logits 1",
        ["--perceptual_logits", "--perceptual_weight 0"],
    ),
    ("train_dvae.py", f"{SOURCE} --output_dir o --max_train_steps 2 --freeze_encoder", ["--freeze_encoder"]),
    ("cache_latents.py", "--vae v --output_dir o --train_data_dir", ["--train_data_dir"]),
    ("calibrate_dvae.py", SOURCE, ["--vae", "--output"]),
    ("sample.py", "--output_dir o --num_images 1 --scheduler unipd", ["--scheduler", "unipd", *list_samplers()]),
    ("evaluate.py", "--samples s --metrics fidd --output r.json", ["--metrics", "fidd", *METRICS]),
    ("evaluate.py", "--samples s --metrics fid", ["--output"]),
    ("grain_report.py", f"{SOURCE} --num_images 0", ["--num_images", "0"]),
    ("grain_report.py", f"{SOURCE} --num_reference_images 1", ["--num_reference_images", "1"]),
    ("grain_report.py", f"{SOURCE} --grain_num_inference_steps 0", ["--grain_num_inference_steps", "0"]),
    ("grain_report.py", f"{SOURCE} --batch_size 0", ["--batch_size", "0"]),
    ("grain_report.py", f"{SOURCE} --seed -1", ["--seed", "-1"]),
    ("sample.py", "--output_dir o --num_images 0", ["--num_images", "0"]),
    ("sample.py", "--output_dir o --num_images 1 --num_inference_steps 0", ["--num_inference_steps", "0"]),
    ("sample.py", "--output_dir o --num_images 1 --fine_ratio 1.5", ["--fine_ratio", "1.5"]),
    ("sample.py", "--output_dir o --num_images 1 --null_budget 2", ["--null_budget", "2"]),
    ("budget_report.py", f"{SOURCE} --budgets 0 2", ["--budgets", "2"]),
    ("budget_report.py", f"{SOURCE} --budgets 0.5 0.5", ["--budgets", "[0.5, 0.5]"]),
    ("convert_dit.py", "--source no/where --output o", ["--source", "no/where"]),
    ("convert_autoencoder_kl.py", "--source no/where --output o", ["--source", "no/where"]),
    ("convert_dcdit.py", "--source no/where --output o", ["--source", "no/where"]),
    ("convert_dcdit.py", "--source . --output o", ["--upcycle"]),
    ("convert_dcdit.py", "--source . --output o --upcycle --num_attention_heads 2", ["--num_attention_heads"]),
    ("convert_dcdit.py", "--source file --output o --upcycle --frequency_shift 1", ["--frequency_shift"]),
    ("compare.py", "a.json", ["b"]),
    ("demo.py", "--class_label cat --num_inference_step x", ["--num_inference_steps", "x"]),
    ("calibrate_dvae.py", f"{SOURCE} --region_size 8 --output /dev/null", ["--output", "/dev/null"]),
    ("demo.py", "--output picture", ["--output", "picture", ".png"]),
    ("demo.py", "--output a/b.jpgg", ["--output", "b.jpgg", ".png"]),
    ("demo.py", "--sed 3", ["--sed", "--seed"]),
    ("photo_crops.py", "--output_dir o --crop -1", ["--crops", "-1"]),
    ("app.py", "--port 0", ["--port", "0"]),
    ("app.py", "--checkpoints c", ["--checkpoints", "--checkpoint"]),
]
# What is written at the end and cannot be: the folder's place is taken by a file, and one that nobody can write to
OUTPUTS = [
    ("demo.py", "--output {}.png"),
    ("reconstruct.py", "--images i --output {}.png"),
    ("evaluate.py", "--samples s --metrics is --output {}"),
    ("evaluate.py", "--reference r --save_statistics {}"),
    ("grain_report.py", f"{SOURCE} --output {{}}"),
    ("budget_report.py", f"{SOURCE} --output_dir {{}}"),
    ("calibrate_dvae.py", f"{SOURCE} --region_size 8 --output {{}}"),
    ("convert_dit.py", "--source . --output {}"),
    ("convert_autoencoder_kl.py", "--source . --output {}"),
    ("convert_dcdit.py", "--source . --output {}"),
    ("sample.py", "--num_images 1 --output_dir {}"),
    ("make_space.py", "--output_dir {}"),
    ("cache_latents.py", f"{SOURCE} --vae v --output_dir {{}}"),
]


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys):
    """`answer(script, flags)`: exit status and stderr of the flags, in a folder with a recipe and a file."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.txt").write_text("--resolutoin\n32\n")
    Path("file").touch()

    def parse(script: str, flags: str) -> tuple[int, str]:
        module = load_script(script)
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        with pytest.raises(SystemExit) as end:
            module.parse_args()
        return end.value.code, capsys.readouterr().err

    return parse


@pytest.mark.parametrize("script, flags, named", FLAGS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_in_flags_is_one_line(script, flags, named, answer):
    status, said = answer(script, flags)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in named), said


@pytest.mark.parametrize("place", ["file/x", "/proc/nobody/writes/here"])
@pytest.mark.parametrize("script, flags", OUTPUTS)
def test_what_cannot_be_written_at_the_end_is_told_at_the_start(script, flags, place, answer):
    status, said = answer(script, flags.format(place))
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert "--output" in said or "--save_statistics" in said


@pytest.mark.parametrize("script, flags", OUTPUTS)
def test_a_disk_that_takes_nothing_more_is_told_at_the_start(script, flags, tmp_path, answer):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # a file can be made, and no byte be written
    try:
        status, said = answer(script, flags.format(tmp_path / "new" / "x"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1 and "too large" in said, said


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write anywhere")
def test_thresholds_for_an_autoencoder_that_cannot_be_written_are_refused_at_the_start(tmp_path):
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    vae.chmod(0o555)
    command = [
        sys.executable,
        EXAMPLES / "calibrate_dvae.py",
        "--train_data_dir",
        "p",
        "--resolution",
        "8",
        "--vae",
        vae,
    ]
    if os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: --vae ") and str(vae) in done.stderr, done.stderr


def test_the_folder_of_results_is_made_at_the_start(tmp_path):
    file = tmp_path / "new" / "folder" / "r.json"
    load_script("evaluate.py").parse_args(f"--samples s --metrics is --output {file}".split())
    assert file.parent.is_dir() and not any(file.parent.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_read_before_torch_is_imported(script, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch is imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, EXAMPLES / script, "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_lists_of_the_flags_are_those_of_the_library():
    flags = load_script("flags.py")
    assert sorted(flags.SAMPLERS) == list_samplers() and flags.OBJECTIVES == OBJECTIVES
    assert (flags.METRICS, flags.PAIR_METRICS) == (METRICS, PAIR_METRICS)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for schedule in flags.SCHEDULES:
        args = load_script("train_grain.py").parse_args([*TRAIN.split(), "--lr_scheduler", schedule])
        assert schedule_of(args, optimizer)


@pytest.mark.parametrize(
    "error, status",
    [
        ("ValueError('`vae` none')", 2),
        ("OSError(28, 'No space left on device')", 2),
        ("ImportError('torchvision 0.1 cannot be imported')", 2),
        ("FloatingPointError('not finite')", 2),
        ("KeyError('a mistake of ours')", 1),
        ("KeyboardInterrupt()", 130),
    ],
)
@pytest.mark.parametrize("shows_all", [False, True])
def test_what_goes_wrong_later_is_the_last_line(error, status, shows_all):
    code = f"import argparse, command_line\ndef main(args):\n    raise {error}\n"
    code += "main(command_line.begin(lambda: argparse.Namespace(vae='none')))"
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES)} | ({"D2IT_TRACEBACK": "1"} if shows_all else {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    said = done.stderr.splitlines()
    assert done.returncode == status
    assert ("Traceback" in done.stderr) == (shows_all or status == 1)
    if status == 2:
        assert said[-1].startswith("error: ") and "D2IT_TRACEBACK" in said[-1] and "`vae`" not in said[-1]
        assert shows_all or len(said) == 1


@pytest.mark.parametrize(
    "message, line",
    [
        ("`vae` must be", "--vae must be"),
        ("`batch_size` 0", "--train_batch_size 0"),
        ("`other` is", "`other` is"),
        ("two\nlines \x1b[31m \u200b", r"two lines \x1b[31m \u200b"),
        ("or `labelled=False`", "or --unconditional"),
    ],
)
def test_messages_of_the_library_speak_of_flags(message, line):
    args = load_script("train_grain.py").parse_args(TRAIN.split())
    assert load_script("command_line.py").in_flags(message, args) == line


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_name_that_the_terminal_cannot_show_ends_nothing(encoding):
    code = "from command_line import begin; begin(lambda: None); print('caf\\u00e9 \\udce9')"
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(b"caf") and b"\\udce9" in done.stdout


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_readers_who_leave_end_no_run(closed, tmp_path):
    code = "from command_line import begin; import sys; from tqdm import trange; begin(lambda: None)\n"
    code += "for i in trange(2000): print('a line of text', i); print(i, file=sys.stderr, flush=True)\n"
    code += "open('result', 'w').write('saved')"
    read, write = os.pipe()
    os.close(read)
    streams = {name: write if name in closed else subprocess.DEVNULL for name in ("stdout", "stderr")}
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, timeout=60, **streams)
    os.close(write)
    assert done.returncode == 0 and (tmp_path / "result").read_text() == "saved"
