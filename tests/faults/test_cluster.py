# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The job for SLURM, with stand-ins for SLURM's commands: torchrun and its two processes are real.

What SLURM itself does, such as queueing a job again after a node has failed, is not tried. In the
place of the job that is queued again one process goes on here, spared the start: the words are those of a restart.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from script_runs import ROOT, load_script
from training_runs import call

from diffusers_d2it.training import found_checkpoints


COMMANDS = {
    "srun": 'echo $$ > "$FOLDER/step"; shift 2; exec "$@"',  # behind --kill-on-bad-exit 1
    "scancel": 'echo "$@" >> "$FOLDER/cancelled"; kill -s "$2" "$(cat "$FOLDER/step")"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$FOLDER/requeued"; fi',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


def submit(folder: Path, flags: dict[str, object]) -> subprocess.Popen:
    """Start the job in a folder, one process of which is killed by -9 once, as SLURM starts it on one node."""
    (folder / "examples").mkdir(exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    script = folder / "examples" / "launched_script.py"
    if not script.exists():
        script.symlink_to(ROOT / "tests" / "launched_script.py")
    for name, command in COMMANDS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{command}\n")
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
    job |= {"SLURM_GPUS_ON_NODE": "2", "FOLDER": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    job |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = ["bash", ROOT / "examples" / "cluster" / "train.sbatch", "launched_script.py"]
    command += ["kill", "1/2", folder, "train_d2it.py", *words]
    with open(folder / "job.log", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=os.environ | job, stdout=log, stderr=log)


def last_step(run: Path) -> int:
    """Of its last checkpoint; 0 without one."""
    return max((int(path.name.removeprefix("checkpoint-")) for path in found_checkpoints(run)), default=0)


def test_a_job_outlives_a_killed_process_and_its_time(inputs, tmp_path, fault):
    count = fault("SLURM's job: a process killed by -9, then its time is over, then queued again")
    flags = inputs.flags("train_d2it.py") | {"train_batch_size": 1, "output_dir": tmp_path / "run"}
    flags |= {"checkpointing_steps": 2, "max_train_steps": 100_000, "checkpoints_total_limit": 2}
    job = submit(tmp_path, flags)
    while last_step(tmp_path / "run") < 4:  # after the restart: the process is killed before
        assert job.poll() is None, (tmp_path / "job.log").read_text()
        time.sleep(0.05)
    assert (tmp_path / "struck").is_file()
    job.send_signal(signal.SIGUSR1)
    status = job.wait(300)
    step = last_step(tmp_path / "run")
    said = [(tmp_path / name).read_text().split() for name in ("cancelled", "requeued")]
    right = said == [["--signal", "TERM", "4711"], ["requeue", "4711"]]
    count.tried(f"status {status}, {step}, {said}", lost=step < 4, silent=not right)

    script, flags = load_script("train_d2it.py"), flags | {"max_train_steps": step + 2, "train_batch_size": 2}
    call(script, flags | {"resume_from_checkpoint": "latest"})
    call(script, flags | {"output_dir": tmp_path / "one", "checkpointing_steps": 100_000})
    file = f"checkpoint-{step + 2}/model/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / run / file) for run in ("one", "run"))
    differ = max((one[name] - two[name]).abs().max().item() for name in one)
    count.tried(f"weights differ by {differ}", lost=differ > 1e-5)
