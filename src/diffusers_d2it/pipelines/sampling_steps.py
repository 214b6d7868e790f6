# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The steps of any scheduler of diffusers that works here: the only way a pipeline takes one."""

import copy
import inspect
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, LMSDiscreteScheduler, PNDMScheduler

from ..grains import GrainLayout
from .schedulers import is_flow, reads_variance


class SamplingSteps:
    """Steps of any scheduler of diffusers' Karras group, or of flow matching.

        steps = SamplingSteps(scheduler, num_inference_steps=25, device=device, generator=generator)
        latents = steps.prior(noise)
        for t in steps.timesteps:
            model_input, timestep = steps.model_input(latents, t)
            noise_prediction = model(model_input, timestep, class_ids).sample
            latents = steps.step(noise_prediction, t, latents)

    `timesteps` stay on the CPU, where schedulers look up their coefficients: from an accelerator many would read one
    back at every step. What the network reads lies on the device from the start. So no step waits for the device.

    Args:
        scheduler: the scheduler, of which a copy takes the steps: other calls may be under way with it.
        num_inference_steps: number of steps.
        device: where the latents are.
        generator: for schedulers that draw noise.
        timesteps, sigmas: steps of one's own instead of their number.
        eta: for schedulers that take it.

    Raises:
        ValueError: the scheduler does not take steps of one's own, or `eta`.
    """

    def __init__(
        self,
        scheduler,
        num_inference_steps: int,
        device: torch.device | str = "cpu",
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float | None = None,
    ):
        self.scheduler = scheduler = copy.deepcopy(scheduler)
        self._edm = _EDMPreconditioning(scheduler) if isinstance(scheduler, EDMEulerScheduler) else None
        own = {name: steps for name, steps in (("timesteps", timesteps), ("sigmas", sigmas)) if steps is not None}
        _check_taken(scheduler.set_timesteps, own)
        scheduler.set_timesteps(**own or {"num_inference_steps": num_inference_steps}, device="cpu")
        self.timesteps, self.skipped = scheduler.timesteps, 0
        network_timesteps = self.timesteps if self._edm is None else self._edm.timesteps(self.timesteps)
        if network_timesteps.is_floating_point():
            network_timesteps = network_timesteps.float()  # not every device has float64
        self._on_device = dict(zip(map(float, self.timesteps), network_timesteps.to(device)))
        self._reads_variance = reads_variance(scheduler)
        self._step_kwargs = _step_generator_kwargs(scheduler, generator)
        if eta is not None:
            _check_taken(scheduler.step, {"eta": eta})
            self._step_kwargs["eta"] = eta

    def tie(self, latents: torch.Tensor) -> torch.Tensor:
        """What every sample is put through, whether a step, noise or a callback has made it: here nothing."""
        return latents

    def prior(self, noise: torch.Tensor) -> torch.Tensor:
        """The first sample, from standard normal noise (B, C, H, W)."""
        # Schedulers of flow matching start from the noise itself and read the sample as it is.
        return self.tie(noise) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def start_at(self, strength: float) -> None:
        """Leave out the first steps, so that a share `strength` of them, rounded down, is taken.

        Raises:
            ValueError: it is more than none, and less than one step; or the scheduler cannot begin among its steps.
        """
        order = getattr(self.scheduler, "order", 1)
        number = -(-len(self.timesteps) // order)  # of steps; one of a higher order has several timesteps
        taken = int(number * strength + 1e-6)  # 0.29 of 100 steps are 29
        if strength > 0 and taken == 0:
            raise ValueError(f"`strength` must be at least 1 / {number}, one of {number} steps, got {strength}.")
        if 0 < taken < number and isinstance(self.scheduler, PNDMScheduler | LMSDiscreteScheduler):
            name = type(self.scheduler).__name__
            raise ValueError(f"`strength` must be 0 or 1 with {name}, which needs its first steps, got {strength}.")
        self.skipped = order * (number - taken)
        self.timesteps = self.timesteps[self.skipped :]
        if hasattr(self.scheduler, "set_begin_index"):  # else it is looked up, on the device
            self.scheduler.set_begin_index(self.skipped)

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, i: int) -> torch.Tensor:
        """Clean latents as the sample that is read at step `i` of `timesteps`; after the last, as they are."""
        if i == len(self.timesteps):
            return latents
        t, noise = self.timesteps[i : i + 1], self.tie(noise)
        if is_flow(self.scheduler):
            share = t.item() / self.scheduler.config.num_train_timesteps
            return (1 - share) * latents + share * noise
        return self.scheduler.add_noise(latents, noise, t).to(latents.dtype)

    def is_halfway(self, i: int) -> bool:
        """Whether the sample after step `i` is a trial of a scheduler of second order, not that of the next step."""
        return i + 1 < len(self.timesteps) and not getattr(self.scheduler, "state_in_first_order", True)

    def model_input(self, latents: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the network reads at step `t` of `timesteps`: its input, as it was trained on, and its timestep."""
        scaled = latents
        if hasattr(self.scheduler, "scale_model_input"):
            scaled = self.scheduler.scale_model_input(latents, t)
        if self._edm is not None:
            scaled = self._edm.model_input(latents, t)
        return scaled, self._on_device[float(t)]

    def step(self, model_output: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The next sample. A variance that the network predicts beside is left out where no one reads it."""
        if not self._reads_variance:
            model_output = model_output[:, : latents.shape[1]]
        if self._edm is not None:
            model_output = self._edm.model_output(model_output, t, latents)
        previous = self.scheduler.step(model_output, t, latents, return_dict=False, **self._step_kwargs)[0]
        return self.tie(previous.to(latents.dtype))


class TiedScheduler(SamplingSteps):
    """Steps over latents with grains: a coarse code stays one value.

    Schedulers act on single cells and draw independent noise for each. Every sample that leaves this class has been
    tied, so a loop written with it cannot forget to (without the tie the cells of a code drift apart without bound).

        steps = TiedScheduler(scheduler, layout, num_inference_steps=25, device=device, generator=generator)
        latents = steps.prior(noise)
        for t in steps.timesteps:
            model_input, timestep = steps.model_input(latents, t)
            noise_prediction = model(model_input, timestep, layout).sample
            latents = steps.step(noise_prediction, t, latents)

    Args:
        scheduler, num_inference_steps, device, generator, timesteps, sigmas, eta: as of `SamplingSteps`.
        layout: of the grain map.
    """

    def __init__(self, scheduler, layout: GrainLayout, *args: Any, **kwargs: Any):
        super().__init__(scheduler, *args, **kwargs)
        self.layout = layout

    def tie(self, latents: torch.Tensor) -> torch.Tensor:
        """Every cell of a code as its top-left one, which follows exactly the process that the code should follow."""
        return self.layout.tie(latents)


def _check_taken(method, arguments: dict) -> None:
    """Raise a ValueError that names an argument which a method of a scheduler does not take."""
    for name in arguments:
        if name not in inspect.signature(method).parameters:
            raise ValueError(f"`{name}` is not taken by `scheduler`, a {type(method.__self__).__name__}.")


def _step_generator_kwargs(scheduler, generator: torch.Generator | list[torch.Generator] | None) -> dict:
    """What `scheduler.step` takes so that its noise comes from `generator`; call it after `scheduler.set_timesteps`.

    DPMSolverSDEScheduler alone draws its noise from seeds that it holds itself: they are drawn from the generator.
    """
    if hasattr(scheduler, "noise_sampler_seed"):
        generators = generator if isinstance(generator, list) else [generator]
        seeds = [
            scheduler.config.noise_sampler_seed
            if one is None
            else int(torch.randint(2**31, (), generator=one, device=one.device))
            for one in generators
        ]
        scheduler.noise_sampler_seed = seeds if isinstance(generator, list) else seeds[0]
    accepted = inspect.signature(scheduler.step).parameters
    return {"generator": generator} if "generator" in accepted else {}


class _EDMPreconditioning:
    """Lets a network trained to predict noise on a discrete schedule stand where EDMEulerScheduler expects EDM's F.

    Karras et al., arXiv:2206.00364, Table 1: the scheduler forms D = c_skip x + c_out F, the network gives
    D = x - sigma eps; the network's input is x / sqrt(1 + sigma^2), at the training step that has this sigma.
    """

    def __init__(self, scheduler: EDMEulerScheduler):
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                "EDMEulerScheduler works here with prediction_type 'epsilon', got"
                f" {scheduler.config.prediction_type!r}."
            )
        # from_config keeps the betas of the scheduler it was made from; the paper's are the default (sec. 4.1).
        betas = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
        betas = {key: scheduler.config.get(key, value) for key, value in betas.items()}
        cumulative = DDPMScheduler(**betas).alphas_cumprod
        self.log_sigmas = ((1 - cumulative) / cumulative).sqrt().log().numpy()
        self.sigma_data = scheduler.config.sigma_data

    def timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        log_sigmas = 4 * timesteps.double().numpy()  # the scheduler's timesteps are log(sigma) / 4
        steps = np.interp(log_sigmas, self.log_sigmas, np.arange(len(self.log_sigmas)))
        return torch.from_numpy(steps).float()

    def model_input(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return latents * (1 + np.exp(8 * t.item())) ** -0.5

    def model_output(self, noise: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        sigma = np.exp(4 * t.item())
        variance = sigma**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / variance, sigma * self.sigma_data / variance**0.5
        denoised = latents - sigma * noise
        return (denoised - c_skip * latents) / c_out
