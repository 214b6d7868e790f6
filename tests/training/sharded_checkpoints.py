# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A run whose weights are sharded by FSDP2, saved and resumed; distributed_steps.py calls it in each process."""

from pathlib import Path

import torch
from accelerate import Accelerator
from small_runs import SmallRun

from diffusers_d2it import D2iTGrainModel, load_preset
from diffusers_d2it.training.checkpoints import is_sharded


NUM_STEPS = 3


def make_model(seed: int = 0) -> D2iTGrainModel:
    torch.manual_seed(seed)
    return D2iTGrainModel(**load_preset("grain-tiny"))


def save_and_resume(output_dir: Path) -> dict[str, bool]:
    """Save a run, resume it in another one, and go on with both; what held, by name."""
    accelerator = Accelerator(cpu=True)
    run = SmallRun(accelerator, output_dir, make_model())
    for step in range(NUM_STEPS):
        run.update(step)
    run.checkpoints.save(NUM_STEPS)
    other = SmallRun(accelerator, output_dir, make_model(seed=1))
    resumed = other.checkpoints.resume(output_dir / f"checkpoint-{NUM_STEPS}")
    came_back = all(map(torch.equal, run.tensors(), other.tensors()))
    for one in (run, other):
        one.update(NUM_STEPS)
    return {
        "sharded": is_sharded(run.model) and is_sharded(other.model),
        "came_back": came_back and resumed == NUM_STEPS,
        "goes_on": all(map(torch.equal, run.tensors(), other.tensors())),
    }
