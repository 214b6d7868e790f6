# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Runs the scripts of examples/ as a user does: real processes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState


EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 5  # eight photographs in batches of two: the fifth step is in the second epoch
# Without a GPU, accelerate runs two processes only under the flag --multi_gpu and with ACCELERATE_USE_CPU
TWO_PROCESSES = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
TWO_PROCESSES += ["--mixed_precision", "no", "--main_process_port", "0"]


def run(script: str, *arguments, launch: list[str] | None = None, expect_failure: bool = False, **environment: str):
    """Run a script to its end; its result, with stdout and stderr as text."""
    command = [*(launch or [sys.executable]), str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert (result.returncode != 0) == expect_failure, result.stdout + result.stderr
    return result


def train(script: str, output: Path, steps: int, *arguments, **kwargs):
    """Run a training script on 32-pixel images in batches of two, with a checkpoint every other step."""
    common = ["--resolution", 32, "--train_batch_size", 2, "--seed", 7, "--report_to", "none"]
    saving = ["--checkpointing_steps", 2, "--validation_steps", STEPS]
    return run(script, "--output_dir", output, "--max_train_steps", steps, *common, *saving, *arguments, **kwargs)


def call(script: str, *arguments) -> None:
    """The same inside this process, for arguments that are refused soon: starting one would take longest."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.main(module.parse_args(list(map(str, arguments))))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
