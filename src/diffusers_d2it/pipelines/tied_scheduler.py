# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A diffusers scheduler that keeps the codes of a grain map tied."""

from typing import Any

import torch

from ..grains import GrainLayout
from .sampling_steps import SamplingSteps


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
