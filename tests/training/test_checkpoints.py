# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint is found, what a run must find again, and what its logs say."""

import os
from argparse import Namespace

import pytest
import torch

from diffusers_d2it.grains import grain_map_from_entropy, tie
from diffusers_d2it.training.averaging import WeightAverage
from diffusers_d2it.training.checkpoints import Checkpoints, find_checkpoint
from diffusers_d2it.training.gate import GatedAccelerator
from diffusers_d2it.training.output_folder import check_output_dir
from diffusers_d2it.training.smoke import SmokeTest
from diffusers_d2it.training.steps import StepLog, draw_fine_ratio, grain_signals
from diffusers_d2it.training.training_data import check_resolution, identity_of, load_autoencoder


def flags(**changed) -> Namespace:
    args = {"output_dir": "out", "resume_from_checkpoint": None, "checkpoints_total_limit": None, "streaming": False}
    args |= {"lr_scheduler": "constant_with_warmup", "max_train_steps": 10, "seed": 0}
    return Namespace(**(args | changed))


def make_checkpoints(accelerator: GatedAccelerator, model, args: Namespace, **kwargs) -> Checkpoints:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ema = WeightAverage(accelerator, model, decay=0.9)
    return Checkpoints(accelerator, args, model, ema, {"optimizer": optimizer}, schedule, **kwargs)


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
    return [*(t.tolist() for t in tensors), checkpoints.ema.optimization_step, settings,
            checkpoints.lr_scheduler.state_dict(), torch.rand(3).tolist()]  # fmt: skip


def test_everything_of_a_run_comes_back(make_grain_model, tmp_path):
    accelerator, args = GatedAccelerator(cpu=True), flags(output_dir=str(tmp_path))
    checkpoints = make_checkpoints(accelerator, make_grain_model(), args)
    for seed in range(3):
        train_a_step(checkpoints, seed)
    checkpoints.save(3)
    expected = state_of(checkpoints)
    other = make_checkpoints(accelerator, make_grain_model(seed=5), args)
    assert (
        other.resume(find_checkpoint(accelerator, flags(output_dir=str(tmp_path), resume_from_checkpoint="latest")))
        == 3
    )
    assert state_of(other) == expected
    train_a_step(checkpoints, 3)
    train_a_step(other, 3)
    assert state_of(other)[:-1] == state_of(checkpoints)[:-1]
    average = other.averaged_model()
    saved = [shadow.tolist() for shadow in average.parameters()]
    assert saved == expected[len(saved) : 2 * len(saved)]
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.p*k*l*"))


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(make_grain_model, tmp_path):
    accelerator, args = GatedAccelerator(cpu=True), flags(output_dir=str(tmp_path))
    checkpoints = make_checkpoints(accelerator, make_grain_model(), args)
    train_a_step(checkpoints, 0)
    checkpoints.save(1)
    with pytest.raises(ValueError, match="holds another model: num_layers: found"):
        make_checkpoints(accelerator, make_grain_model(num_layers=1), args).resume(tmp_path / "checkpoint-1")
    other = make_checkpoints(accelerator, make_grain_model(), args)
    *_, last = other.model.parameters()
    other.optimizers = {"optimizer": torch.optim.AdamW([{"params": [last], "initial_lr": 1e-3}])}
    with pytest.raises(ValueError, match="holds `model.*but this optimizer has no such weight"):
        other.resume(tmp_path / "checkpoint-1")


def test_modes_follow_the_umask(make_grain_model, tmp_path):
    before = os.umask(0o027)
    try:
        make_checkpoints(GatedAccelerator(cpu=True), make_grain_model(), flags(output_dir=str(tmp_path))).save(1)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_only_the_newest_are_kept(make_grain_model, tmp_path):
    args = flags(output_dir=str(tmp_path), checkpoints_total_limit=2)
    checkpoints = make_checkpoints(GatedAccelerator(cpu=True), make_grain_model(), args)
    for step in (2, 4, 10):
        checkpoints.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]


def test_a_folder_with_anything_in_it_is_refused_with_the_way_out(tmp_path):
    check_output_dir(flags(output_dir=str(tmp_path)))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt: pass another folder, or remove it\."):
        check_output_dir(flags(output_dir=str(tmp_path)))
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest to continue"):
        check_output_dir(flags(output_dir=str(tmp_path)))
    check_output_dir(flags(output_dir=str(tmp_path), resume_from_checkpoint="latest"))


@pytest.mark.parametrize("schedule, fixed", [("constant", False), ("constant_with_warmup", False), ("cosine", True)])
def test_the_length_of_a_run_is_fixed_where_its_schedule_ends_with_it(make_grain_model, schedule, fixed):
    args = flags(lr_scheduler=schedule)
    checkpoints = make_checkpoints(GatedAccelerator(cpu=True), make_grain_model(), args, identity={"data": "x"})
    assert ("max_train_steps" in checkpoints.flags) == fixed
    assert checkpoints.flags["data"] == "x" and checkpoints.flags["num_processes"] == 1
    assert all(isinstance(value, (int, float, str, bool)) for value in checkpoints.scalars().values())


def test_identity_changes_with_weights_thresholds_and_data_and_not_with_the_folder(make_vae):
    data = Namespace(fingerprint="images")
    vae, same, other = make_vae(), make_vae(), make_vae(seed=1)
    same.register_to_config(_name_or_path="elsewhere")
    assert identity_of(data, vae) == identity_of(data, same) != identity_of(data, other)
    shifted = dict(vae.config.calibration)
    shifted["quantiles"] = [0.9 * quantile for quantile in shifted["quantiles"]]
    assert identity_of(data, make_vae(calibration=shifted)) != identity_of(data, vae)
    assert identity_of(Namespace(fingerprint="others"), vae) != identity_of(data, vae)


def test_logged_losses_are_means_over_the_forward_passes_of_an_update():
    log = StepLog(GatedAccelerator(cpu=True), batch_size=4)
    for loss in (1.0, 2.0, 6.0):
        log.add({"loss": torch.tensor(loss, requires_grad=True), "kl": torch.tensor(2 * loss)})
    values = log.take()
    assert (values["loss"], values["kl"]) == (3.0, 6.0)
    assert values.keys() == {"loss", "kl", "gradient_norm", "images_per_second"} and values["images_per_second"] > 0
    log.add({"loss": torch.tensor(5.0)})
    assert log.take()["loss"] == 5.0


def test_signals_tell_the_share_its_drift_and_the_scale_of_each_grain(make_vae, photos):
    vae = make_vae()
    entropy = vae.region_entropy(photos)
    grain_map = grain_map_from_entropy(entropy, vae.thresholds(0.3))
    latents = tie(torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)), grain_map)
    fine = grain_map.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand_as(latents) == 1
    latents = torch.where(fine, 3 * latents, latents + 5)
    signals = grain_signals(vae, grain_map, 0.3, latents)
    assert signals["fine_share"] == (grain_map == 1).float().mean()
    assert signals["fine_drift"] == pytest.approx(signals["fine_share"].item() - 0.3, abs=1e-6)
    assert signals["latent_std_grain_1"].item() == pytest.approx(latents[fine].std(correction=0).item(), rel=1e-4)
    assert signals["latent_std_grain_0"].item() == pytest.approx(latents[~fine].std(correction=0).item(), rel=1e-4)
    default = vae.config.grain_ratios[-1]
    assert grain_signals(vae, grain_map)["fine_drift"] == pytest.approx(
        signals["fine_share"].item() - default, abs=1e-6
    )


def test_smoke_test_compares_the_first_and_the_last_updates():
    smoke_test = SmokeTest(max_train_steps=20)
    for step in range(1, 21):
        smoke_test.add(step, 1 / step)
    assert smoke_test.result() == "smoke test: loss 0.7500 in the first 2 updates, 0.0513 in the last"
    smoke_test = SmokeTest(max_train_steps=5)
    for step in range(1, 6):
        smoke_test.add(step, 1.0)
    with pytest.raises(RuntimeError, match="has not fallen"):
        smoke_test.result()


def test_fine_ratio_of_a_batch():
    generator = torch.Generator().manual_seed(0)
    assert draw_fine_ratio(None, generator) is None
    assert draw_fine_ratio([0.4], generator) == 0.4
    draws = [draw_fine_ratio([0.2, 0.6], generator) for _ in range(1000)]
    assert 0.2 <= min(draws) < 0.21 and 0.59 < max(draws) <= 0.6
    assert sum(draws) / 1000 == pytest.approx(0.4, abs=0.02)


def test_an_autoencoder_that_is_not_there_or_does_not_suit_is_named(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path / "run" / "vae")
    with pytest.raises(ValueError, match="did you mean .*vae"):
        load_autoencoder(str(tmp_path / "run"), 32)
    with pytest.raises(ValueError, match="neither a folder nor a name of the Hub"):
        load_autoencoder(str(tmp_path / "nowhere" / "vae"), 32)
    with pytest.raises(ValueError, match="`resolution`.* 8.* 60"):
        load_autoencoder(str(tmp_path / "run" / "vae"), 60)
    check_resolution(64, 16)
