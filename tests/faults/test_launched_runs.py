# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Runs under `accelerate launch`: a process that dies ends the job and is named; told to stop, the run is saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from script_runs import TWO_PROCESSES
from training_runs import Inputs

from diffusers_d2it.files.folders import verify
from diffusers_d2it.training import found_checkpoints


ONE_PROCESS = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
ONE_PROCESS += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def launch(inputs: Inputs, folder: Path, strike: str, num_processes: int = 2, **changed: object) -> subprocess.Popen:
    flags = inputs.flags("train_d2it.py") | {"train_batch_size": 1, "output_dir": folder / "run"} | changed
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    launcher = TWO_PROCESSES if num_processes == 2 else ONE_PROCESS
    struck = f"{num_processes - 1}/{num_processes}"
    command = [*launcher, Path(__file__).parents[1] / "launched_script.py", strike, struck, folder, "train_d2it.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(word) for word in (*command, *words)], env=environment, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen, folder: Path) -> tuple[int, str]:
    """Exit status, and what was said."""
    _, said = process.communicate(timeout=600)
    assert (folder / "struck").is_file(), said
    return process.returncode, said


@pytest.mark.parametrize(
    "strike, words",
    [("kill", ["Signal 9 (SIGKILL)", "rank      : 1"]), ("raise", ["injected: this process cannot", "rank      : 1"])],
)
def test_a_process_that_dies_ends_the_job_and_is_named(strike, words, inputs, tmp_path, fault):
    count = fault(f"one of two processes: {strike}")
    status, said = ended(launch(inputs, tmp_path, strike, checkpointing_steps=2), tmp_path)
    verify(tmp_path / "run" / "checkpoint-2")
    kept = [path.name for path in found_checkpoints(tmp_path / "run")]
    count.tried(
        f"status {status}, {kept}: {said[-2000:]}",
        lost=kept != ["checkpoint-2"],
        silent=status == 0 or not all(word in said for word in words),
    )


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_signal_to_the_launcher_saves_the_run(num_processes, inputs, tmp_path, fault):
    count = fault("SIGTERM to `accelerate launch`")
    process = launch(inputs, tmp_path, "wait", num_processes, max_train_steps=100_000, checkpointing_steps=100_000)
    while not (tmp_path / "struck").is_file():
        assert process.poll() is None
        time.sleep(0.05)  # until the run has begun
    process.send_signal(signal.SIGTERM)
    status, said = ended(process, tmp_path)
    (saved,) = found_checkpoints(tmp_path / "run")
    verify(saved)
    count.tried(f"status {status}: {said[-2000:]}", silent=status == 0)
