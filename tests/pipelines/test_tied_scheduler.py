# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every scheduler of diffusers' Karras group keeps coarse codes tied, and gives them the right distribution."""

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from grain_maps import random_map

from diffusers_d2it.grains import GrainLayout, grain_map_to_cells
from diffusers_d2it.pipelines.sampling_steps import TiedScheduler


SCHEDULERS = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
BASE = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False)

STD = 0.8  # of the data; not EDM's sigma_data of 0.5, for which its network has nothing to say


def make_scheduler(name: str):
    return getattr(diffusers, name).from_config(BASE.config)


def noise_prediction(model_input: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The noise that a perfect network predicts when the data are independent Gaussians of deviation STD.

    The input has the variance of training, alpha STD^2 + 1 - alpha, at a step that may lie between two trained ones.
    """
    position = torch.as_tensor(timestep, dtype=torch.float64)
    left = position.floor().long().clamp(0, 998)
    logits = torch.logit(BASE.alphas_cumprod.double())
    alpha = torch.sigmoid(logits[left] + (logits[left + 1] - logits[left]) * (position - left)).float()
    return model_input * (1 - alpha).sqrt() / (alpha * STD**2 + 1 - alpha)


def flow_prediction(model_input: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """E[noise - z_0 | z_t] at z_t = (1 - s) z_0 + s noise, for Gaussian data of deviation STD."""
    share = timestep / 1000
    return model_input * (share - (1 - share) * STD**2) / (((1 - share) * STD) ** 2 + share**2)


def run(scheduler, grain_map: torch.Tensor, steps: int, predict=noise_prediction, num_grains: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    layout = GrainLayout.from_grain_map(grain_map, num_grains)
    tied = TiedScheduler(scheduler, layout, steps, generator=generator)
    batch, height, width = grain_map.shape
    latents = tied.prior(torch.randn(batch, 4, height * layout.cells, width * layout.cells, generator=generator))
    for t in tied.timesteps:
        model_input, timestep = tied.model_input(latents, t)
        layout.check_tied(model_input)
        latents = tied.step(predict(model_input, timestep), t, latents)
        layout.check_tied(latents)
    return latents


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_of_three_grains_stay_tied_at_every_step(name):
    assert run(make_scheduler(name), random_map(3, (2, 3, 5)), steps=6, num_grains=3).isfinite().all()


@pytest.mark.parametrize("name", [*SCHEDULERS, "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_coarse_codes_have_the_variance_of_fine_ones(name):
    # A perfect network for Gaussian data must give their deviation back, in coarse and fine regions alike. A mean over
    # the cells instead of one of them would halve the coarse one.
    grain_map = torch.arange(2).repeat(32).view(1, 8, 8).expand(16, 8, 8).contiguous()
    flow = name.startswith("Flow")
    scheduler = getattr(diffusers, name)() if flow else make_scheduler(name)
    # EDM's own schedule has few steps at the trained end of the noise levels; 60 steps serve all
    latents = run(scheduler, grain_map, 60, flow_prediction if flow else noise_prediction)
    of_cell = grain_map_to_cells(grain_map, 2)[:, None].expand_as(latents)
    coarse, fine = latents[..., ::2, ::2][of_cell[..., ::2, ::2] == 0], latents[of_cell == 1]
    assert fine.std().item() == pytest.approx(STD, rel=0.15)
    assert coarse.std().item() == pytest.approx(fine.std().item(), rel=0.08)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_all_fine_map_changes_nothing(name):
    grain_map = torch.ones(1, 4, 4, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    plain = make_scheduler(name)
    plain.set_timesteps(8)
    latents = torch.randn(1, 4, 8, 8, generator=generator) * plain.init_noise_sigma
    kwargs = {"generator": generator} if name == "DDPMScheduler" else {}
    for t in plain.timesteps:
        noise = noise_prediction(plain.scale_model_input(latents, t), t)
        latents = plain.step(noise, t, latents, **kwargs).prev_sample
    assert torch.equal(latents, run(make_scheduler(name), grain_map, 8))


def test_edm_scheduler_takes_noise_predictions_only():
    layout = GrainLayout.from_grain_map(torch.zeros(1, 2, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="'epsilon'.*'v_prediction'"):
        TiedScheduler(EDMEulerScheduler(prediction_type="v_prediction"), layout, 4)
