# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Two processes of a run: when one of them dies the job ends and says which; when it is told to stop, both save."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from script_runs import TWO_PROCESSES
from training_runs import Inputs

from diffusers_d2it.saving import verify
from diffusers_d2it.training.checkpoints import found_checkpoints


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_pipeline, load_photos) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), load_photos(32), make_pipeline(num_classes=None))


def launch(inputs: Inputs, folder: Path, strike: str, **changed: object) -> subprocess.Popen:
    flags = inputs.flags("train_d2it.py") | {"train_batch_size": 1, "output_dir": folder / "run"} | changed
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [*TWO_PROCESSES, Path(__file__).with_name("struck_run.py"), "train_d2it.py", "1", strike, folder, *words]
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [str(word) for word in command], env=os.environ | environment, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen, folder: Path) -> tuple[int, float, str]:
    """Exit status, seconds since the strike, and what was said."""
    _, said = process.communicate(timeout=120)
    assert (folder / "struck").is_file(), said
    return process.returncode, time.monotonic() - float((folder / "struck").read_text()), said


@pytest.mark.parametrize(
    "strike, words",
    [("kill", ["Signal 9 (SIGKILL)", "rank      : 1"]), ("raise", ["injected: this process cannot", "rank      : 1"])],
)
def test_a_process_that_dies_ends_the_job_and_is_named(strike, words, inputs, tmp_path, fault):
    count = fault(f"one of two processes: {strike}")
    status, seconds, said = ended(launch(inputs, tmp_path, strike, checkpointing_steps=2), tmp_path)
    verify(tmp_path / "run" / "checkpoint-2")
    kept = [path.name for path in found_checkpoints(tmp_path / "run")]
    count.tried(
        f"status {status} after {seconds:.1f} s, {kept}: {said[-2000:]}",
        lost=seconds > 10 or kept != ["checkpoint-2"],
        silent=status == 0 or not all(word in said for word in words),
    )


def test_a_signal_to_the_launcher_saves_the_run(inputs, tmp_path, fault):
    count = fault("SIGTERM to the launcher of two processes")
    process = launch(inputs, tmp_path, "wait", max_train_steps=100_000, checkpointing_steps=100_000)
    while not (tmp_path / "struck").is_file():
        assert process.poll() is None
        time.sleep(0.05)  # until the run has begun
    process.send_signal(signal.SIGTERM)
    status, seconds, said = ended(process, tmp_path)
    (saved,) = found_checkpoints(tmp_path / "run")
    verify(saved)
    count.tried(f"status {status} after {seconds:.1f} s: {said[-2000:]}", lost=seconds > 30, silent=status == 0)
