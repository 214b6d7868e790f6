# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A training that goes wrong: it shows early, and nothing that is saved takes in NaN or infinity."""

import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from script_runs import logged
from training_runs import LOSSES, STEPS, change_loss, train

from diffusers_d2it.files.folders import verify
from diffusers_d2it.training import found_checkpoints


SIGNALS = {"loss", "gradient_norm", "images_per_second"}
GRAINS = SIGNALS | {"fine_share", "fine_drift"}
TOKENS = {"natural_share", "natural_drift", "kept_share", "budget"}
LATENTS = {"latent_std_grain_0", "latent_std_grain_1"}
LOGGED = {
    "train_grain.py": GRAINS | {"accuracy"},
    "train_d2it.py": GRAINS | LATENTS | {"mse_grain_0", "mse_grain_1"},
    "train_dcdit.py": SIGNALS | TOKENS | {"mse", "ratio", "natural_share_noisy", "natural_share_clean"},
    "train_dvae.py": GRAINS | LATENTS | {"l1", "kl"},
}


def reversed_gradient(loss: torch.Tensor) -> torch.Tensor:
    """A mistake that no number shows at first: the loss is right, its gradient points the other way."""
    return 2 * loss.detach() - loss


@pytest.mark.parametrize("script", LOGGED)
def test_a_training_that_learns_passes_the_smoke_test_and_one_that_learns_nothing_fails(
    script, inputs, tmp_path, fault
):
    count = fault("training that learns nothing: the smoke test fails")
    flags = inputs.flags(script) | {"overfit_batches": 1, "max_train_steps": 30, "gradient_accumulation_steps": 1}
    flags |= {"learning_rate": 1e-3}
    flags |= {"checkpointing_steps": 1000, "gan_start_step": 1000} if script == "train_dvae.py" else {}
    status = train(script, tmp_path / "learns", flags)
    count.tried(status, lost=status != 0)
    if script == "train_grain.py":  # who compares the losses is `Run`, in all scripts
        status = train(script, tmp_path / "does not", flags, change=partial(change_loss, reversed_gradient))
        count.tried(status, silent=status == 0)

    curves = logged(tmp_path / "learns")
    assert LOGGED[script] <= curves.keys()
    assert all(len(curves[name]) == 30 for name in LOGGED[script])
    assert all(math.isfinite(value) for name in LOGGED[script] & (GRAINS | TOKENS) for value in curves[name].values())
    assert all(value > 0 for name in ("gradient_norm", "images_per_second") for value in curves[name].values())


# ---- What is not finite ----

BAD_CALL = 4  # of the loss function: after the first checkpoint, of the fifth step where a step has one call


class Poison:
    """Spoils the loss once. Infinity is added: the gradient stays finite, and must be refused too."""

    def __init__(self, value: float):
        self.value, self.num_calls = value, 0

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        if self.num_calls != BAD_CALL + 1:
            return loss
        return loss * self.value if math.isnan(self.value) else loss + self.value


@pytest.mark.parametrize("script", LOSSES)
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(script, inputs, tmp_path, fault):
    """Of NaN: tests/training/test_gate.py, and below."""
    count = fault(f"{script}: loss inf once")
    flags = inputs.flags(script) | {"mixed_precision": "bf16", "gradient_accumulation_steps": 1}
    status = train(script, tmp_path / "run", flags, change=partial(change_loss, Poison(math.inf)))
    kept = [path.name for path in found_checkpoints(tmp_path / "run")]
    verify(tmp_path / "run" / "checkpoint-3")
    count.tried((status, kept), silent=status != 1 or kept != ["checkpoint-3"])


@pytest.mark.parametrize("script", LOSSES)
def test_as_many_bad_updates_are_skipped_as_are_allowed(script, inputs, tmp_path, fault):
    count = fault(f"{script}: loss nan once, one may be skipped")
    flags = inputs.flags(script) | {"skip_nonfinite_steps": 1, "gradient_accumulation_steps": 1}
    status = train(script, tmp_path / "run", flags, change=partial(change_loss, Poison(math.nan)))
    last = tmp_path / "run" / f"checkpoint-{STEPS}"
    weights = {path: load_file(path) for path in last.rglob("*.safetensors")}
    finite = all(tensor.isfinite().all() for tensors in weights.values() for tensor in tensors.values())
    state = json.loads((last / "state.json").read_text())
    counted = state["skipped_steps"] == 1 and state["average_steps"] == STEPS - 1
    count.tried((status, finite, state["skipped_steps"]), lost=status != 0, silent=not finite or not counted)
