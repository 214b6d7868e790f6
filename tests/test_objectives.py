# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Targets and weights of the objectives against their definitions and against diffusers' schedulers."""

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from grain_maps import check_tied

from diffusers_d2it.grains import tie
from diffusers_d2it.objectives import OBJECTIVES, make_objective


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tied(generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise and their map: (3, 4, 8, 8), (3, 4, 8, 8), (3, 4, 4)."""
    grain_map = torch.randint(2, (3, 4, 4), generator=generator)
    latents, noise = (tie(torch.randn(3, 4, 8, 8, generator=generator), grain_map) for _ in range(2))
    return latents, noise, grain_map


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_perfect_prediction_is_denoised_to_the_latents(name, tied, generator):
    # The sampling scheduler must read the target as the training objective means it, from pure noise to z_0.
    latents, noise, grain_map = tied
    objective = make_objective(name)
    scheduler = objective.sampling_scheduler()
    scheduler.set_timesteps(10)
    sample = objective.add_noise(latents, noise, scheduler.timesteps[:1].expand(3))
    check_tied(sample, grain_map)
    for t in scheduler.timesteps:
        sample = scheduler.step(objective.target(latents, noise, t.expand(3)), t, sample).prev_sample
    torch.testing.assert_close(sample, latents, atol=2e-3, rtol=0)
    check_tied(objective.target(latents, noise, objective.sample_timesteps([generator] * 3)), grain_map)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_latents_by_the_clipped_ratio(name, tied):
    # Its definition (arXiv:2303.09556, Eq. 5): min(SNR, gamma) on the squared error of z_0, whatever is predicted.
    latents, noise, _ = tied
    objective = make_objective(name, snr_gamma=5.0)
    timesteps = torch.tensor([50, 400, 900])
    noised = objective.add_noise(latents, noise, timesteps)
    target = objective.target(latents, noise, timesteps)
    found = objective.predicted_latents(target, noised, timesteps)
    torch.testing.assert_close(found, latents, atol=1e-3, rtol=1e-3)
    prediction = target + 0.1
    error = (objective.predicted_latents(prediction, noised, timesteps) - latents).pow(2).mean(dim=(1, 2, 3))
    alphas = objective.scheduler.alphas_cumprod[timesteps]
    expected = (alphas / (1 - alphas)).clamp_max(5.0) * error
    weighted = objective.weights(timesteps) * (prediction - target).pow(2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(weighted, expected, atol=1e-6, rtol=2e-3)
    assert make_objective(name).weights(timesteps) is None


def test_flow_matching_noises_like_its_scheduler(tied):
    latents, noise, _ = tied
    objective = make_objective("flow_matching")
    timesteps = objective.scheduler.timesteps[[10, 500, 990]]
    expected = objective.scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(objective.add_noise(latents, noise, timesteps), expected)


def test_flow_matching_draws_timesteps_mostly_in_the_middle(generator):
    timesteps = make_objective("flow_matching").sample_timesteps([generator] * 20_000)
    assert timesteps.min() > 0 and timesteps.max() < 1000
    # Logit-normal: half of the draws lie within sigmoid(-0.6745) ... sigmoid(0.6745)
    middle = ((timesteps > 337.5) & (timesteps < 662.5)).float().mean().item()
    assert middle == pytest.approx(0.5, abs=0.02)


def test_a_learned_variance_reaches_ddpm_and_no_other_solver():
    objective = make_objective("epsilon", learn_sigma=True)
    assert objective.scheduler.config.variance_type == "learned_range"
    config = objective.sampling_scheduler().config
    assert DPMSolverMultistepScheduler.from_config(config).config.variance_type is None
    assert DDPMScheduler.from_config(config).config.variance_type == "fixed_small"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "x0"}, "`objective`.*epsilon.*'x0'"),
        ({"name": "flow_matching", "snr_gamma": 5.0}, "`snr_gamma`.*flow_matching"),
        ({"name": "flow_matching", "learn_sigma": True}, "`learn_sigma`.*flow_matching"),
        ({"name": "epsilon", "snr_gamma": 0.0}, "`snr_gamma`"),
        ({"name": "epsilon", "snr_gamma": float("nan")}, "`snr_gamma`"),
    ],
)
def test_bad_objectives_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_objective(**arguments)
