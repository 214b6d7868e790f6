# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What stands around the steps: the folder of a run, what its logs say, the smoke test, what a batch draws."""

import math

import pytest
import torch
from accelerate import Accelerator
from alike import same_weights
from small_runs import Numbers

from diffusers_d2it import DynamicAutoencoderKL
from diffusers_d2it.data import make_loader
from diffusers_d2it.grains import grain_map_from_entropy, tie
from diffusers_d2it.models.transformer_dcdit import DCDiTOutput
from diffusers_d2it.training import (
    Run,
    draw_budget,
    draw_fine_ratio,
    grain_signals,
    load_autoencoder,
    make_accelerator,
    token_signals,
    warn_of_few_tokens,
)


def make_run(accelerator: Accelerator, **changed) -> Run:
    flags = {"seed": 0, "train_batch_size": 4, "max_train_steps": 3, "checkpointing_steps": 2, "validation_steps": 4}
    return Run(accelerator, changed.pop("step", 0), **(flags | changed))


def test_losses_are_means_over_the_forward_passes_of_an_update_and_what_is_due_is_told():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    run, model = make_run(accelerator), torch.nn.Linear(1, 1)
    passes, seeds, due = 0, set(), []
    for batch, generators in run.batches(make_loader(accelerator, Numbers(), batch_size=4)):
        assert batch["x"].shape == (4,)
        seeds |= {generator.initial_seed() for generator in generators}
        passes += 1
        run.note({"loss": torch.tensor(float(passes), requires_grad=True), "kl": torch.tensor(2.0 * passes)})
        if passes % 2:
            continue
        values = run.end_of_step(gradient_norm=torch.tensor(7.0))
        assert (values["loss"], values["kl"], values["gradient_norm"]) == (passes - 0.5, 2 * passes - 1, 7)
        assert values.keys() == {"loss", "kl", "gradient_norm", "images_per_second"}
        assert values["images_per_second"] > 0
        due.append((run.saves, run.validates(model), run.exit_code))
    assert (passes, run.step, len(seeds)) == (6, 3, 24)
    assert due == [(False, False, 0), (True, False, 0), (True, True, 0)]
    rest = make_run(accelerator, step=2).batches(make_loader(accelerator, Numbers(), batch_size=4))
    assert {generator.initial_seed() for generator in next(rest)[1]} < seeds  # the fifth batch


def test_a_mean_is_over_the_passes_that_have_a_value_and_a_bad_loss_shows():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    run = make_run(accelerator)
    nan, inf = math.nan, math.inf
    run.note({"loss": torch.tensor(1.0), "somewhere": torch.tensor(nan), "nowhere": torch.tensor(nan)})
    run.note({"loss": torch.tensor(2.0), "somewhere": torch.tensor(5.0), "nowhere": torch.tensor(nan)})
    run.note({"loss": torch.tensor(6.0), "somewhere": torch.tensor(6.0), "nowhere": torch.tensor(nan)})
    values = run.end_of_step()
    assert (values["loss"], values["somewhere"]) == (3, 5.5) and math.isnan(values["nowhere"])
    for bad in ({"loss": nan, "mse": nan}, {"loss": inf, "mse": inf}):
        run.note({"loss": torch.tensor(1.0), "mse": torch.tensor(1.0)})
        run.note({name: torch.tensor(value) for name, value in bad.items()})
        values = run.end_of_step()
        assert not math.isfinite(values["loss"]) and not math.isfinite(values["mse"])


@pytest.mark.parametrize("step, falls", [(0, True), (0, False), (5, True)])
def test_a_smoke_test_compares_the_first_and_the_last_updates(step, falls, capsys):
    accelerator = Accelerator(cpu=True)
    run = make_run(accelerator, step=step, max_train_steps=20, overfit_batches=2)

    def train() -> None:
        seen = set()
        for batch, _ in run.batches(make_loader(accelerator, Numbers(), batch_size=2)):
            seen.add(tuple(batch["x"].tolist()))
            run.note({"loss": torch.tensor(1 / (run.step + 1) if falls else 1.0)})
            run.end_of_step()
        assert len(seen) == 2

    if not falls:
        with pytest.raises(ValueError, match="1.0000.*2.*1.0000"):
            train()
        return
    train()
    printed = capsys.readouterr().out
    assert "resumed" in printed if step else "0.7500" in printed and "0.0513" in printed


def test_numbers_that_are_too_small_are_named():
    with pytest.raises(ValueError, match="`overfit_batches`.*0"):
        make_run(Accelerator(cpu=True), overfit_batches=0)


def test_a_folder_with_anything_in_it_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output_dir`.*notes.txt.*remove"):
        make_accelerator(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="`resume_from_checkpoint` 'latest'"):
        make_accelerator(tmp_path)
    make_accelerator(tmp_path, resume_from_checkpoint="latest").output_lock.close()
    make_accelerator(tmp_path / "new").output_lock.close()
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("resume", [None, "latest"])
@pytest.mark.parametrize(
    "left, begins",
    [([], True), (["bad_images.jsonl", "logs"], True), (["samples"], True), (["bad_images.jsonl", "x.txt"], False)],
)
def test_what_a_run_left_before_its_first_checkpoint_is_in_nobodys_way(left, begins, resume, tmp_path):
    for name in left:
        (tmp_path / name).write_text("left") if "." in name else (tmp_path / name).mkdir()
    if begins:
        make_accelerator(tmp_path, resume_from_checkpoint=resume).output_lock.close()
    else:
        with pytest.raises(ValueError, match="`output_dir`.*x.txt"):
            make_accelerator(tmp_path, resume_from_checkpoint=resume)
    # A new run may be of other images
    assert (tmp_path / "bad_images.jsonl").exists() == ("bad_images.jsonl" in left and not (begins and resume is None))


def test_signals_tell_the_share_its_drift_and_the_scale_of_each_grain(make_vae, photos):
    vae = make_vae()
    grain_map = grain_map_from_entropy(vae.region_entropy(photos), vae.thresholds(0.3))
    latents = tie(torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)), grain_map)
    fine = grain_map.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand_as(latents) == 1
    latents = torch.where(fine, 3 * latents, latents + 5)
    signals = grain_signals(vae, grain_map, 0.3, latents)
    share = (grain_map == 1).float().mean().item()
    assert signals["fine_share"] == pytest.approx(share) and signals["fine_drift"] == pytest.approx(
        share - 0.3, abs=1e-6
    )
    assert signals["latent_std_grain_1"].item() == pytest.approx(latents[fine].std(correction=0).item(), rel=1e-4)
    assert signals["latent_std_grain_0"].item() == pytest.approx(latents[~fine].std(correction=0).item(), rel=1e-4)
    assert grain_signals(vae, grain_map)["fine_drift"] == pytest.approx(share - vae.config.grain_ratios[-1], abs=1e-6)


def test_fine_ratio_of_a_batch():
    assert draw_fine_ratio(None, 0, 0) is None
    assert draw_fine_ratio([0.4], 0, 0) == 0.4
    draws = [draw_fine_ratio([0.2, 0.6], 0, step) for step in range(1000)]
    assert draws[7] == draw_fine_ratio([0.2, 0.6], 0, 7) != draw_fine_ratio([0.2, 0.6], 1, 7)
    assert 0.2 <= min(draws) < 0.21 and 0.59 < max(draws) <= 0.6
    assert sum(draws) / 1000 == pytest.approx(0.4, abs=0.02)


BUDGETS = [0.4, 0.6, 0.8, 1.0]


def test_budget_of_an_update():
    draws = [draw_budget(BUDGETS, 100, 7, step) for step in range(1100)]
    assert draws[:100] == [1.0] * 100 and draws == [draw_budget(BUDGETS, 100, 7, step) for step in range(1100)]
    assert all(draws[100:].count(budget) == pytest.approx(250, abs=60) for budget in BUDGETS)
    assert draws[200:] == [draw_budget(BUDGETS, 0, 7, step) for step in range(200, 1100)]
    assert draws != [draw_budget(BUDGETS, 100, 8, step) for step in range(1100)]
    assert draw_budget(BUDGETS, 0, 7, 0) in BUDGETS and draw_budget([0.5], 0, 7, 3) == 0.5


def test_signals_of_tokens_tell_their_share_its_drift_and_that_at_either_end_of_the_noise():
    probability = torch.tensor([[[1.0, 0.4], [0.5, 1.0]], [[1.0, 0.6], [0.7, 1.0]], [[1.0, 0.2], [0.9, 1.0]]])
    kept = probability > 0.8
    output = DCDiTOutput(sample=torch.zeros(3, 4, 2, 2), boundary_probability=probability, kept=kept)

    def signals(*timesteps: float) -> dict[str, float]:
        return {name: value.item() for name, value in token_signals(output, torch.tensor(timesteps), 4).items()}

    found = signals(667.0, 999.0, 333.0)
    assert found == pytest.approx(
        {
            "natural_share": 9 / 12,
            "natural_drift": 9 / 12 - 1 / 4,
            "kept_share": 7 / 12,
            "natural_share_noisy": 6 / 8,
            "natural_share_clean": 3 / 4,
        }
    )
    in_the_middle = signals(334, 500, 666)
    assert math.isnan(in_the_middle["natural_share_noisy"]) and math.isnan(in_the_middle["natural_share_clean"])
    assert in_the_middle["natural_share"] == found["natural_share"]


@pytest.mark.parametrize(
    "share, step, warns", [(0.06, 300, True), (0.06, 900, True), (0.06, 301, False), (0.0625, 300, False)]
)
def test_a_router_that_wants_hardly_a_token_is_told_of_now_and_then(share, step, warns, caplog):
    warn_of_few_tokens(share, 4.0, step)
    assert len(caplog.messages) == warns
    assert all("300" in text or "900" in text for text in caplog.messages)
    assert all("0.06" in text and "`ratio_weight`" in text for text in caplog.messages)


@pytest.mark.parametrize(
    "vae, resolution, problem",
    [("run", 32, "`vae`.*run/vae"), ("no/where/vae", 32, "`vae`.*no/where"), ("run/vae", 60, "8.*60")],
)
def test_an_autoencoder_that_is_not_there_or_does_not_suit_is_named(make_vae, tmp_path, vae, resolution, problem):
    make_vae().save_pretrained(tmp_path / "run" / "vae")
    with pytest.raises(ValueError, match=problem):
        load_autoencoder(str(tmp_path / vae), resolution)


def test_either_autoencoder_is_loaded_frozen_or_the_one_with_grains_alone(make_vae, make_autoencoder_kl, tmp_path):
    for name, vae in (("d2it", make_vae()), ("kl", make_autoencoder_kl())):
        vae.save_pretrained(tmp_path / name)
        loaded = load_autoencoder(str(tmp_path / name), 32)
        assert type(loaded) is type(vae) and same_weights(loaded, vae)
        assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    assert isinstance(load_autoencoder(str(tmp_path / "d2it"), 32, with_grains=True), DynamicAutoencoderKL)
    with pytest.raises(ValueError, match="`vae`.*kl.*DynamicAutoencoderKL.*'AutoencoderKL'"):
        load_autoencoder(str(tmp_path / "kl"), 32, with_grains=True)
    assert load_autoencoder(str(tmp_path / "kl"), 36)  # a multiple of its cell
    with pytest.raises(ValueError, match="`resolution`.* 4,.* 34"):
        load_autoencoder(str(tmp_path / "kl"), 34)
