# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every scheduler of diffusers' Karras group keeps coarse codes tied, and gives them the right distribution."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers

from diffusers_d2it.grains import GrainLayout, check_tied, grain_map_to_cells, tie
from diffusers_d2it.pipelines.tied_scheduler import TiedScheduler


SCHEDULERS = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
BASE = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False)


def make_scheduler(name: str):
    return getattr(diffusers, name).from_config(BASE.config)


def gaussian_noise_prediction(model_input, timestep, std: float) -> torch.Tensor:
    """The noise that a perfect network predicts when the data are independent Gaussians of deviation `std`.

    The input has the variance of training, alpha std^2 + 1 - alpha, at a step that may lie between two trained ones.
    """
    position = torch.as_tensor(timestep, dtype=torch.float64)
    left = position.floor().long().clamp(0, 998)
    logits = torch.logit(BASE.alphas_cumprod.double())
    alpha = torch.sigmoid(logits[left] + (logits[left + 1] - logits[left]) * (position - left)).float()
    return model_input * (1 - alpha).sqrt() / (alpha * std**2 + 1 - alpha)


def run(name: str, grain_map: torch.Tensor, steps: int, std: float, channels: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    cells = 2 if grain_map.max() < 2 else 4
    layout = GrainLayout.from_grain_map(grain_map, cells.bit_length())
    scheduler = TiedScheduler(make_scheduler(name), layout, steps, generator=generator)
    batch, height, width = grain_map.shape
    latents = scheduler.prior(torch.randn(batch, channels, height * cells, width * cells, generator=generator))
    for t in scheduler.timesteps:
        check_tied(latents, grain_map)
        model_input, timestep = scheduler.model_input(latents, t)
        check_tied(model_input, grain_map)
        latents = scheduler.step(gaussian_noise_prediction(model_input, timestep, std), t, latents)
    return latents


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_grains", [2, 3])
def test_samples_stay_tied_at_every_step(name, num_grains):
    grain_map = torch.randint(num_grains, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    grain_map[0, 0, 0], grain_map[0, 0, 1] = 0, num_grains - 1
    latents = run(name, grain_map, steps=6, std=1.0)
    check_tied(latents, grain_map)
    assert latents.isfinite().all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_coarse_codes_have_the_variance_of_fine_ones(name):
    # A perfect network for Gaussian data of deviation 1/2 must give deviation 1/2 back, in coarse and fine regions
    # alike. A mean over the cells instead of one of them would halve the coarse one.
    grain_map = torch.arange(2).repeat(32).view(1, 8, 8).expand(16, 8, 8).contiguous()
    # EDM's own schedule has few steps at the trained end of the noise levels; 60 steps serve all
    latents = run(name, grain_map, steps=60, std=0.5)
    of_cell = grain_map_to_cells(grain_map, 2)[:, None].expand_as(latents)
    coarse = tie(latents, grain_map)[..., ::2, ::2][of_cell[..., ::2, ::2] == 0]
    fine = latents[of_cell == 1]
    assert fine.std().item() == pytest.approx(0.5, rel=0.15)
    assert coarse.std().item() == pytest.approx(fine.std().item(), rel=0.08)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_matching_gives_coarse_codes_the_variance_of_fine_ones(name):
    # The perfect network for Gaussian data of deviation 1/2: E[noise - z_0 | z_t] at z_t = (1 - s) z_0 + s noise
    grain_map = torch.arange(2).repeat(32).view(1, 8, 8).expand(16, 8, 8).contiguous()
    generator = torch.Generator().manual_seed(0)
    layout = GrainLayout.from_grain_map(grain_map, 2)
    steps = TiedScheduler(getattr(diffusers, name)(), layout, 40, generator=generator)
    latents = steps.prior(torch.randn(16, 4, 16, 16, generator=generator))
    for t in steps.timesteps:
        check_tied(latents, grain_map)
        model_input, timestep = steps.model_input(latents, t)
        share = timestep / 1000
        variance = ((1 - share) * 0.5) ** 2 + share**2
        latents = steps.step(model_input * (share - (1 - share) * 0.25) / variance, t, latents)
    check_tied(latents, grain_map)
    of_cell = grain_map_to_cells(grain_map, 2)[:, None].expand_as(latents)
    coarse = latents[..., ::2, ::2][of_cell[..., ::2, ::2] == 0]
    assert coarse.std().item() == pytest.approx(0.5, rel=0.1)
    assert latents[of_cell == 1].std().item() == pytest.approx(0.5, rel=0.1)


def test_without_the_tie_cells_of_a_code_drift_apart():
    # The reason for this class: a plain DDPM loop, the network's prediction tied, as every D2iT's is.
    grain_map = torch.zeros(4, 4, 4, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    scheduler = make_scheduler("DDPMScheduler")
    scheduler.set_timesteps(50)
    latents = tie(torch.randn(4, 4, 8, 8, generator=generator), grain_map)
    for t in scheduler.timesteps:
        noise = gaussian_noise_prediction(tie(latents, grain_map), t, std=1.0)
        latents = scheduler.step(noise, t, latents, generator=generator).prev_sample
    assert (latents - tie(latents, grain_map)).std() > 10
    assert run("DDPMScheduler", grain_map, steps=50, std=1.0).std() < 1.5


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_all_fine_map_changes_nothing(name):
    grain_map = torch.ones(1, 4, 4, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    plain = make_scheduler(name)
    plain.set_timesteps(8)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * plain.init_noise_sigma
    kwargs = {"generator": generator} if name == "DDPMScheduler" else {}
    for t in plain.timesteps:
        noise = gaussian_noise_prediction(plain.scale_model_input(latents, t), t, std=0.5)
        latents = plain.step(noise, t, latents, **kwargs).prev_sample
    assert torch.equal(latents, run(name, grain_map, steps=8, std=0.5))


def test_edm_scheduler_takes_noise_predictions_only():
    with pytest.raises(ValueError, match="epsilon"):
        layout = GrainLayout.from_grain_map(torch.zeros(1, 2, 2, dtype=torch.int64), 2)
        TiedScheduler(EDMEulerScheduler(prediction_type="v_prediction"), layout, 4)


def test_grain_scheduler_of_the_examples_recovers_a_known_map():
    # The state is one-hot, so a network that knows the map must be followed exactly.
    from diffusers_d2it import D2iTGrainModel

    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    grain_map = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    clean = D2iTGrainModel.state_from_grain_map(grain_map, 3)
    state = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps:
        state = scheduler.step(clean, t, state).prev_sample
    torch.testing.assert_close(state, clean, atol=1e-4, rtol=0)
