# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint brings back, which one is found, and what a run must find again."""

from threading import Event

import pytest
import torch
from accelerate import Accelerator
from script_runs import load_script
from small_runs import SmallRun

from diffusers_d2it.models import LatentCodec
from diffusers_d2it.training import checkpoints as checkpoints_module
from diffusers_d2it.training import find_checkpoint, found_checkpoints, identity_of


class Data(list):
    """What is known of a data set: a list of images, and what they are."""

    def __init__(self, fingerprint: str, num_images: int = 8):
        super().__init__(range(num_images))
        self.fingerprint = fingerprint


def make_run(folder, model, **kwargs) -> SmallRun:
    return SmallRun(Accelerator(cpu=True), folder, model, **kwargs)


def state_of(run: SmallRun) -> list:
    settings = {key: value for key, value in run.optimizer.param_groups[0].items() if key != "params"}
    counts = [run.ema.optimization_step, run.gate.num_skipped_steps]
    tensors = [tensor.tolist() for tensor in run.tensors()]
    return [*tensors, *counts, settings, run.schedule.state_dict()]


def test_everything_of_a_run_comes_back(make_grain_model, tmp_path):
    run = make_run(tmp_path, make_grain_model())
    for seed in range(3):
        run.update(seed)
    run.gate.num_skipped_steps = 2
    run.save(3)
    expected = state_of(run)
    other = make_run(tmp_path, make_grain_model(seed=5))
    assert other.checkpoints.resume(find_checkpoint(Accelerator(cpu=True), tmp_path, "latest")) == 3
    assert state_of(other) == expected
    run.update(3)
    other.update(3)
    assert state_of(other) == state_of(run)
    saved = [shadow.tolist() for shadow in other.checkpoints.averaged_model().parameters()]
    assert saved == expected[len(saved) : 2 * len(saved)]
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.p*k*l*"))


def test_what_is_saved_is_the_state_when_it_was_asked_for_and_one_at_a_time(make_grain_model, tmp_path, monkeypatch):
    goes_on, at_work = Event(), []

    def seal(folder, **kwargs):
        assert goes_on.wait(60)
        at_work.append([path.name for path in tmp_path.iterdir()])
        real_seal(folder, **kwargs)

    real_seal = checkpoints_module.seal
    monkeypatch.setattr(checkpoints_module, "seal", seal)
    run = make_run(tmp_path, make_grain_model())
    run.update(0)
    expected = state_of(run)
    run.checkpoints.save(1)
    run.update(1)
    assert not found_checkpoints(tmp_path)  # it is being written
    goes_on.set()
    run.checkpoints.save(2)
    run.checkpoints.finish()
    assert [len(names) for names in at_work] == [1, 2]
    other = make_run(tmp_path, make_grain_model(seed=5))
    for step, state in ((1, expected), (2, state_of(run))):
        assert other.checkpoints.resume(tmp_path / f"checkpoint-{step}") == step
        assert state_of(other) == state


def test_a_checkpoint_is_found_by_its_name_alone(make_grain_model, tmp_path):
    make_run(tmp_path, make_grain_model()).save(1)
    for name in ("checkpoint-1", tmp_path / "checkpoint-1"):
        assert find_checkpoint(Accelerator(cpu=True), tmp_path, name) == tmp_path / "checkpoint-1"


def test_an_optimizer_that_has_not_begun_is_saved_and_resumed_as_one(make_grain_model, tmp_path):
    make_run(tmp_path, make_grain_model()).save(1)
    other = make_run(tmp_path, make_grain_model(seed=5))
    other.checkpoints.resume(tmp_path / "checkpoint-1")
    assert not other.optimizer.state and other.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_checkpoint_of_another_model_module_or_optimizer_is_refused(make_grain_model, tmp_path):
    head = torch.nn.Linear(2, 3)

    def assert_refused(run: SmallRun, file: str, wrong: str) -> None:
        with pytest.raises(ValueError, match=f"{file}.*{wrong}"):
            run.checkpoints.resume(tmp_path / "checkpoint-1")

    run = make_run(tmp_path, make_grain_model(), others={"head": head})
    run.update(0)
    run.save(1)
    fewer_layers = make_run(tmp_path, make_grain_model(num_layers=1), others={"head": head})
    assert_refused(fewer_layers, "checkpoint-1", "num_layers")
    wider, without_bias, renamed = torch.nn.Linear(2, 4), torch.nn.Linear(2, 3, bias=False), torch.nn.Sequential(head)
    for other, wrong in ((wider, "weight"), (without_bias, "bias"), (renamed, "0.bias")):
        assert_refused(make_run(tmp_path, make_grain_model(), others={"head": other}), r"head\.safetensors", wrong)
    *_, last = run.model.parameters()
    for weights, wrong in (([last], r"model\."), ([*run.model.parameters(), *head.parameters()], r"head\.")):
        run.checkpoints.optimizers = {"optimizer": torch.optim.AdamW([{"params": weights, "initial_lr": 1e-3}])}
        assert_refused(run, r"optimizer\.safetensors", wrong)


def test_weights_that_could_not_be_loaded_again_are_not_saved(make_grain_model, tmp_path):
    run = make_run(tmp_path, make_grain_model(), total_limit=1)
    run.save(1)
    name, weight = next(run.model.named_parameters())
    with torch.no_grad():
        weight.view(-1)[0] = torch.inf
    with pytest.raises(ValueError, match=f"`{name}`.*`model`"):
        run.save(2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_only_the_newest_are_kept(make_grain_model, tmp_path):
    run = make_run(tmp_path, make_grain_model(), total_limit=2)
    for step in (2, 4, 10):
        run.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]
    with pytest.raises(ValueError, match="`total_limit`.*0"):
        make_run(tmp_path, make_grain_model(), total_limit=0)


@pytest.mark.parametrize("schedule, fixed", [("constant", False), ("constant_with_warmup", False), ("cosine", True)])
def test_the_length_of_a_run_is_fixed_where_its_schedule_ends_with_it(make_grain_model, tmp_path, schedule, fixed):
    required = "--latent_cache c --vae v --output_dir o --max_train_steps 10 --lr_scheduler".split()
    args = load_script("train_grain.py").parse_args([*required, schedule])
    flags = load_script("set_up.py").lasting(args, 2)
    assert ("max_train_steps" in flags) == fixed
    checkpoints = make_run(tmp_path, make_grain_model(), flags=flags).checkpoints
    assert checkpoints.flags["seed"] == 0 and checkpoints.flags["batch"] == 2 * args.train_batch_size
    args.streaming = True
    assert load_script("set_up.py").lasting(args, 2)["num_processes"] == 2
    assert all(isinstance(value, (int, float, str, bool)) for value in checkpoints.scalars().values())


def test_identity_changes_with_weights_thresholds_scale_and_data_and_not_with_the_folder(
    make_vae, make_autoencoder_kl
):
    vae, same, other = make_vae(), make_vae(), make_vae(seed=1)
    same.register_to_config(_name_or_path="elsewhere")
    assert identity_of(Data("images"), vae) == identity_of(Data("images"), same) != identity_of(Data("images"), other)
    shifted = dict(vae.config.calibration)
    shifted["quantiles"] = [0.9 * quantile for quantile in shifted["quantiles"]]
    assert identity_of(Data("images"), make_vae(calibration=shifted)) != identity_of(Data("images"), vae)
    assert identity_of(Data("others"), vae) != identity_of(Data("images"), vae)
    plain, scaled = make_autoencoder_kl(), make_autoencoder_kl(latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
    same = LatentCodec(make_autoencoder_kl())
    assert identity_of(Data("images"), plain) == identity_of(Data("images"), same)
    assert identity_of(Data("images"), plain) != identity_of(Data("images"), scaled)


@pytest.mark.parametrize(
    "data, words",
    [
        (Data("3f2a", 6), "2 images fewer"),
        (Data("3f2a", 9), "1 image more"),
        (Data("3f2a", 8), "files"),
    ],
)
def test_a_changed_data_set_is_told_in_words(data, words, make_vae, make_grain_model, tmp_path):
    run = make_run(tmp_path, make_grain_model(), flags=identity_of(Data("images"), make_vae()))
    run.update(0)
    run.save(1)
    again = make_run(tmp_path, make_grain_model(), flags=identity_of(Data("images"), make_vae()))
    assert again.checkpoints.resume(tmp_path / "checkpoint-1") == 1
    with pytest.raises(ValueError, match=f"checkpoint-1.*{words}") as refused:
        make_run(tmp_path, make_grain_model(), flags=identity_of(data, make_vae())).checkpoints.resume(
            tmp_path / "checkpoint-1"
        )
    assert data.fingerprint not in str(refused.value)


def test_the_latest_of_none_is_a_beginning_and_the_others_are_listed(make_grain_model, tmp_path, capsys):
    accelerator = Accelerator(cpu=True)
    assert find_checkpoint(accelerator, tmp_path / "none", "latest") is None
    assert str(tmp_path / "none") in capsys.readouterr().out
    make_run(tmp_path, make_grain_model()).save(1)
    for wrong in (tmp_path, tmp_path / "checkpoint-2"):
        with pytest.raises(ValueError, match="`resume_from_checkpoint`.*checkpoint-1"):
            find_checkpoint(accelerator, tmp_path, wrong)
    (tmp_path / "checkpoint-1" / "state.json").write_text("{")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="checkpoint-1.*damaged"):
        find_checkpoint(accelerator, tmp_path, "latest")
