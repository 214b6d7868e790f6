# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Launched runs: a process that dies ends the job and is named; told to stop, the run is saved; two machines."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from script_runs import TWO_PROCESSES, load_script
from training_runs import Inputs, call

from diffusers_d2it.files.folders import verify
from diffusers_d2it.training import found_checkpoints


ONE_PROCESS = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
ONE_PROCESS += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def launch(inputs: Inputs, folder: Path, strike: str, launcher: list[str], **changed: object) -> subprocess.Popen:
    flags = inputs.flags("train_d2it.py") | {"train_batch_size": 1, "output_dir": folder / "run"} | changed
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    struck = "0/1" if launcher is ONE_PROCESS else "1/2"
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


def test_a_process_that_dies_ends_the_job_and_is_named(inputs, tmp_path, fault):
    count = fault("one of two processes: kill")
    status, said = ended(launch(inputs, tmp_path, "kill", TWO_PROCESSES, checkpointing_steps=2), tmp_path)
    verify(tmp_path / "run" / "checkpoint-2")
    kept = [path.name for path in found_checkpoints(tmp_path / "run")]
    count.tried(
        f"status {status}, {kept}: {said[-2000:]}",
        lost=kept != ["checkpoint-2"],
        silent=status == 0 or not all(word in said for word in ("Signal 9 (SIGKILL)", "rank      : 1")),
    )


def test_a_signal_to_the_launcher_saves_the_run(inputs, tmp_path, fault):
    """Of one process, which the launcher leaves alone; of two: test_cluster.py."""
    count = fault("SIGTERM to `accelerate launch`")
    process = launch(inputs, tmp_path, "wait", ONE_PROCESS, max_train_steps=100_000, checkpointing_steps=100_000)
    while not (tmp_path / "struck").is_file():
        assert process.poll() is None
        time.sleep(0.05)  # until the run has begun
    process.send_signal(signal.SIGTERM)
    status, said = ended(process, tmp_path)
    (saved,) = found_checkpoints(tmp_path / "run")
    verify(saved)
    count.tried(f"status {status}: {said[-2000:]}", silent=status == 0)


def test_two_machines_end_in_the_weights_of_one_process(inputs, tmp_path, fault):
    count = fault("two machines of one process")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = [*TWO_PROCESSES[: TWO_PROCESSES.index("--main_process_port")], "--num_machines", "2"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    flags = {"checkpointing_steps": 4, "max_train_steps": 4}
    jobs = [launch(inputs, tmp_path, "wait", [*command, "--machine_rank", rank], **flags) for rank in "01"]
    status = [ended(job, tmp_path) for job in jobs]
    own = {"train_batch_size": 2, "output_dir": tmp_path / "one"}
    call(load_script("train_d2it.py"), inputs.flags("train_d2it.py") | flags | own)
    file = "checkpoint-4/model/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / run / file) for run in ("one", "run"))
    differ = max((one[name] - two[name]).abs().max().item() for name in one)
    count.tried(f"{status}, weights differ by {differ}", lost=differ > 1e-5, silent=any(code for code, _ in status))
