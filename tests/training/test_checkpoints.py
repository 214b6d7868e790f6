# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint brings back, which one is found, and what a run must find again."""

import os

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from script_runs import load_script

from diffusers_d2it.training import Checkpoints, FiniteGate, find_checkpoint, identity_of


def make_checkpoints(folder, model, **kwargs) -> Checkpoints:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ema = EMAModel(model.parameters(), decay=0.9)
    gate = FiniteGate(accelerator)
    return Checkpoints(accelerator, folder, model, ema, {"optimizer": optimizer}, schedule, gate, **kwargs)


def train_a_step(checkpoints: Checkpoints, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in checkpoints.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    checkpoints.optimizers["optimizer"].step()
    checkpoints.lr_scheduler.step()
    checkpoints.ema.step(checkpoints.model.parameters())


def state_of(checkpoints: Checkpoints) -> list:
    optimizer = checkpoints.optimizers["optimizer"]
    weights = optimizer.param_groups[0]["params"]
    moments = [value for weight in weights for _, value in sorted(optimizer.state[weight].items())]
    tensors = [*checkpoints.model.parameters(), *checkpoints.ema.shadow_params, *moments]
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    counts = [checkpoints.ema.optimization_step, checkpoints.gate.num_skipped_steps]
    schedule = checkpoints.lr_scheduler.state_dict()
    return [*(tensor.tolist() for tensor in tensors), *counts, settings, schedule, torch.rand(3).tolist()]


def test_everything_of_a_run_comes_back(make_grain_model, tmp_path):
    checkpoints = make_checkpoints(tmp_path, make_grain_model())
    for seed in range(3):
        train_a_step(checkpoints, seed)
    checkpoints.gate.num_skipped_steps = 2
    checkpoints.save(3)
    expected = state_of(checkpoints)
    other = make_checkpoints(tmp_path, make_grain_model(seed=5))
    assert other.resume(find_checkpoint(other.accelerator, tmp_path, "latest")) == 3
    assert state_of(other) == expected
    train_a_step(checkpoints, 3)
    train_a_step(other, 3)
    assert state_of(other)[:-1] == state_of(checkpoints)[:-1]
    average = other.averaged_model()
    saved = [shadow.tolist() for shadow in average.parameters()]
    assert saved == expected[len(saved) : 2 * len(saved)]
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.p*k*l*"))


def test_an_optimizer_that_has_not_begun_is_saved_and_resumed_as_one(make_grain_model, tmp_path):
    make_checkpoints(tmp_path, make_grain_model()).save(1)
    other = make_checkpoints(tmp_path, make_grain_model(seed=5))
    other.resume(tmp_path / "checkpoint-1")
    assert not other.optimizers["optimizer"].state
    assert other.optimizers["optimizer"].param_groups[0]["betas"] == (0.9, 0.999)


def test_a_checkpoint_of_another_model_module_or_optimizer_is_refused(make_grain_model, tmp_path):
    others = {"head": torch.nn.Linear(2, 3)}
    checkpoints = make_checkpoints(tmp_path, make_grain_model(), others=others)
    train_a_step(checkpoints, 0)
    checkpoints.save(1)
    with pytest.raises(ValueError, match="checkpoint-1.*num_layers"):
        make_checkpoints(tmp_path, make_grain_model(num_layers=1), others=others).resume(tmp_path / "checkpoint-1")
    wider, without_bias, renamed = torch.nn.Linear(2, 4), torch.nn.Linear(2, 3, bias=False), torch.nn.Sequential
    for head, wrong in ((wider, "weight"), (without_bias, "bias"), (renamed(others["head"]), "0.bias")):
        run = make_checkpoints(tmp_path, make_grain_model(), others={"head": head})
        with pytest.raises(ValueError, match=rf"head\.safetensors.*{wrong}"):
            run.resume(tmp_path / "checkpoint-1")
    run = make_checkpoints(tmp_path, make_grain_model(), others=others)
    *_, last = run.model.parameters()
    for weights, wrong in (([last], "model"), ([*run.model.parameters(), *others["head"].parameters()], "head")):
        run.optimizers = {"optimizer": torch.optim.AdamW([{"params": weights, "initial_lr": 1e-3}])}
        with pytest.raises(ValueError, match=rf"optimizer\.safetensors.*{wrong}\."):
            run.resume(tmp_path / "checkpoint-1")


def test_modes_follow_the_umask(make_grain_model, tmp_path):
    before = os.umask(0o027)
    try:
        make_checkpoints(tmp_path, make_grain_model()).save(1)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_only_the_newest_are_kept(make_grain_model, tmp_path):
    checkpoints = make_checkpoints(tmp_path, make_grain_model(), total_limit=2)
    for step in (2, 4, 10):
        checkpoints.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]
    with pytest.raises(ValueError, match="`total_limit`.*0"):
        make_checkpoints(tmp_path, make_grain_model(), total_limit=0)


@pytest.mark.parametrize("schedule, fixed", [("constant", False), ("constant_with_warmup", False), ("cosine", True)])
def test_the_length_of_a_run_is_fixed_where_its_schedule_ends_with_it(make_grain_model, tmp_path, schedule, fixed):
    required = "--latent_cache c --vae v --output_dir o --max_train_steps 10 --lr_scheduler".split()
    args = load_script("train_grain.py").parse_args([*required, schedule])
    flags = load_script("set_up.py").lasting(args)
    assert ("max_train_steps" in flags) == fixed
    checkpoints = make_checkpoints(tmp_path, make_grain_model(), flags=flags)
    assert checkpoints.flags["seed"] == 0 and checkpoints.flags["num_processes"] == 1
    assert all(isinstance(value, (int, float, str, bool)) for value in checkpoints.scalars().values())


def test_identity_changes_with_weights_thresholds_and_data_and_not_with_the_folder(make_vae):
    vae, same, other = make_vae(), make_vae(), make_vae(seed=1)
    same.register_to_config(_name_or_path="elsewhere")
    assert identity_of("images", vae) == identity_of("images", same) != identity_of("images", other)
    shifted = dict(vae.config.calibration)
    shifted["quantiles"] = [0.9 * quantile for quantile in shifted["quantiles"]]
    assert identity_of("images", make_vae(calibration=shifted)) != identity_of("images", vae)
    assert identity_of("others", vae) != identity_of("images", vae)
