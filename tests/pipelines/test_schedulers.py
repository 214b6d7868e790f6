# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Schedulers as people change them: those that work end at the data, the others are refused in words."""

from contextlib import suppress

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusers_d2it import D2iTContentModel, GrainLayout, load_preset
from diffusers_d2it.pipelines.sampling_steps import TiedScheduler
from diffusers_d2it.pipelines.schedulers import check_scheduler, is_flow


NAMES = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler") and "Flax" not in name)
DIFFUSION = {"prediction_type": "epsilon", "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}
DIFFUSION |= {"clip_sample": False, "num_train_timesteps": 1000}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
CUMULATIVE = DDPMScheduler(beta_start=1e-4, beta_end=0.02).alphas_cumprod


def made(name, of_flow):
    """A scheduler with settings of a checkpoint, None where its class cannot be made of them."""
    try:
        return getattr(diffusers, name).from_config(FLOW if of_flow else DIFFUSION)
    except (TypeError, ValueError, ImportError, AttributeError):
        return None


def is_taken(name, of_flow):
    with suppress(ValueError):
        check_scheduler(made(name, of_flow), TRANSFORMER, of_flow)
        return True
    return False


def each(cases):
    ids = [f"{name}-{'flow' if of_flow else 'diffusion'}" for name, of_flow in cases]
    return pytest.mark.parametrize("name, of_flow", cases, ids=ids)


TRANSFORMER = D2iTContentModel(**load_preset("content-tiny"))
CASES = [(name, of_flow) for of_flow in (False, True) for name in NAMES if made(name, of_flow) is not None]
TAKEN = [case for case in CASES if is_taken(*case)]


def noise_at(latents, data, t, of_flow):
    """What a perfect model of data that is one point predicts."""
    if of_flow:
        return (latents - data) * 1000 / max(float(t), 1e-3)  # of z = (1 - s) data + s noise
    log_ratio = ((1 - CUMULATIVE) / CUMULATIVE).log()
    low = int(min(max(float(t), 0), 998))
    share = 1 / (1 + torch.lerp(log_ratio[low], log_ratio[low + 1], float(t) - low).exp())
    return (latents - share.sqrt() * data) / (1 - share).sqrt()


@pytest.mark.filterwarnings("ignore")
@each(CASES)
def test_a_scheduler_ends_at_the_data_or_is_refused(name, of_flow):
    """From noise, and from the data noised to a step in the midst."""
    scheduler = made(name, of_flow)
    generator = torch.Generator().manual_seed(0)
    layout, data = GrainLayout.from_grain_map(torch.ones(1, 2, 2).long(), 2), torch.randn(1, 4, 4, 4)
    for strength in (1.0, 0.9, 0.5, 0.2):
        try:
            check_scheduler(scheduler, TRANSFORMER, of_flow)
            steps = TiedScheduler(scheduler, layout, 20, "cpu", generator)
            steps.start_at(strength)
        except ValueError as error:
            assert name in str(error)
            return
        noise = torch.randn(data.shape, generator=generator)
        latents = steps.prior(noise) if strength == 1 else steps.noised(data, noise, 0)
        for t in steps.timesteps:
            model_input, timestep = steps.model_input(latents, t)
            latents = steps.step(noise_at(model_input, data, timestep, of_flow), t, latents)
        assert (latents - data).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore")
@each(TAKEN)
def test_a_picture_is_noised_to_every_step(name, of_flow):
    """A perfect model finds in it, at the step that reads it, the noise that it was given."""
    scheduler, generator = made(name, of_flow), torch.Generator().manual_seed(0)
    layout, data = GrainLayout.from_grain_map(torch.ones(1, 2, 2).long(), 2), torch.randn(1, 4, 4, 4)
    noise = torch.randn(data.shape, generator=generator)
    steps = TiedScheduler(scheduler, layout, 10, "cpu", generator)
    if name in ("LMSDiscreteScheduler", "PNDMScheduler"):
        with pytest.raises(ValueError, match=f"`strength`.*{name}"):
            steps.start_at(0.5)
        return
    steps.start_at(0.5)
    latents = steps.noised(data, noise, 0)
    for i, t in enumerate(steps.timesteps):
        model_input, timestep = steps.model_input(latents, t)
        found = noise_at(model_input, data, timestep, of_flow)
        share = float(t) / 1000 if of_flow else (1 - CUMULATIVE[int(float(timestep))]).sqrt()
        if i == 0 or not steps.is_halfway(i - 1):
            assert ((found - (noise - data if of_flow else noise)) * share).abs().max() < 0.05
        latents = steps.step(found, t, latents)
        if not steps.is_halfway(i):
            latents = steps.noised(data, noise, i + 1)
    assert torch.equal(latents, data)


def test_every_scheduler_that_is_known_to_work_is_taken():
    taken = {flow: {name for name, of_flow in TAKEN if of_flow == flow} for flow in (False, True)}
    assert {kind.name for kind in diffusers.schedulers.KarrasDiffusionSchedulers} < taken[False]
    assert {"FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"} <= taken[True] and len(taken[True]) > 5


def test_it_is_looked_at_when_the_pipeline_is_called(make_pipeline):
    pipe = make_pipeline()
    flow = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    assert not is_flow(pipe.scheduler) and is_flow(flow.scheduler)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe(1, num_inference_steps=1)
    for one, scheduler in (
        (pipe, FlowMatchEulerDiscreteScheduler()),
        (pipe, diffusers.LCMScheduler()),
        (flow, DDIMScheduler()),
        (flow, UniPCMultistepScheduler()),
    ):
        one.scheduler = scheduler
        with pytest.raises(ValueError, match=f"`scheduler`.*{type(scheduler).__name__}"):
            one(1, num_inference_steps=1)
    flow.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    flow(1, num_inference_steps=1)


def test_steps_of_ones_own(make_pipeline):
    pipe = make_pipeline()
    settings = {"grain_map": "fine", "output_type": "pt"}

    def draw(pipe, **own):
        return pipe(1, generator=torch.Generator().manual_seed(0), **settings, **own).images

    pipe.scheduler.set_timesteps(4)
    assert torch.equal(draw(pipe, num_inference_steps=4, eta=0), draw(pipe, num_inference_steps=4))
    assert not torch.equal(draw(pipe, num_inference_steps=4, eta=1.0), draw(pipe, num_inference_steps=4))
    flow = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    sigmas = [1.0, 0.75, 0.5, 0.25]
    assert torch.equal(draw(flow, sigmas=sigmas), draw(flow, num_inference_steps=4, sigmas=sigmas))
    assert flow.num_timesteps == 4
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(draw(pipe, timesteps=[900, 500, 100]), draw(pipe, timesteps=[900, 500, 100]))
    assert pipe.num_timesteps == 3
    for one, own in (
        (flow, {"eta": 0.5}),
        (pipe, {"sigmas": sigmas}),
        (pipe, {"eta": 2.0}),
        (pipe, {"timesteps": [-1]}),
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(own))}`"):
            draw(one, **own)
