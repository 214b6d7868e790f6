# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A training that goes wrong shows it early: in what is logged, and in the smoke test."""

import math
from functools import partial

import pytest
import torch
from script_runs import logged
from training_runs import change_loss, train


SIGNALS = {"loss", "gradient_norm", "images_per_second", "fine_share", "fine_drift"}
LATENTS = {"latent_std_grain_0", "latent_std_grain_1"}
LOGGED = {
    "train_grain.py": SIGNALS | {"accuracy"},
    "train_d2it.py": SIGNALS | LATENTS | {"mse_grain_0", "mse_grain_1"},
    "train_dvae.py": SIGNALS | LATENTS | {"l1", "kl"},
}


def reversed_gradient(loss: torch.Tensor) -> torch.Tensor:
    """A mistake that no number shows at first: the loss is right, its gradient points the other way."""
    return 2 * loss.detach() - loss


@pytest.mark.parametrize("script", LOGGED)
def test_a_training_that_learns_nothing_fails_the_smoke_test(script, inputs, tmp_path, fault):
    count = fault("training that learns nothing: the smoke test fails")
    flags = inputs.flags(script) | {"overfit_batches": 1, "max_train_steps": 30, "gradient_accumulation_steps": 1}
    flags |= {"learning_rate": 1e-3}
    flags |= {"checkpointing_steps": 1000, "gan_start_step": 1000} if script == "train_dvae.py" else {}
    assert train(script, tmp_path / "learns", flags) == 0
    status = train(script, tmp_path / "does not", flags, change=partial(change_loss, reversed_gradient))
    count.tried(status, silent=status == 0)

    curves = logged(tmp_path / "learns")
    assert LOGGED[script] <= curves.keys()
    assert all(len(curves[name]) == 30 for name in LOGGED[script])
    assert all(math.isfinite(value) for name in SIGNALS for value in curves[name].values())
    assert all(value > 0 for name in ("gradient_norm", "images_per_second") for value in curves[name].values())
