# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the content model learns to predict: noise, velocity, or the flow from data to noise.

The forward process is diffusers' scheduler; here stand the target, the weight of a timestep, and the scheduler that
samples what was trained. `make_objective` picks one by name.
"""

from functools import partial

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from .draws import draw_integers


OBJECTIVES = ("epsilon", "v_prediction", "flow_matching")
_SCHEDULE = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear", "clip_sample": False}  # sec. 4.1


class DiffusionObjective:
    """Noise (the paper's) or velocity (Salimans and Ho, arXiv:2202.00512) on 1000 discrete steps.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        snr_gamma: clip the signal-to-noise ratio that weighs a timestep (min-SNR, Hang et al., arXiv:2303.09556; 5 in
            the paper); None weighs all alike.
        learn_sigma: the network predicts the variance too.
    """

    def __init__(self, prediction_type: str = "epsilon", snr_gamma: float | None = None, learn_sigma: bool = False):
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"`snr_gamma` must be positive or None, got {snr_gamma}.")
        variance_type = "learned_range" if learn_sigma else "fixed_small"
        self.scheduler = DDPMScheduler(**_SCHEDULE, prediction_type=prediction_type, variance_type=variance_type)
        self.snr_gamma = snr_gamma

    def sample_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        """(B,) int64, uniform over 0 ... 999, a generator an image."""
        return draw_integers(self.scheduler.config.num_train_timesteps, generators)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t of latents z_0 and noise, both tied (B, C, hR, wR)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should have predicted, tied like its arguments."""
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Weight of each image's loss, (B,); None for equal ones."""
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        # A velocity error is one of z_0 times snr + 1, a noise error one times snr.
        scale = snr if self.scheduler.config.prediction_type == "epsilon" else snr + 1
        return snr.clamp_max(self.snr_gamma) / scale

    def predicted_latents(
        self, prediction: torch.Tensor, noised: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The estimate of z_0 that a prediction stands for."""
        alpha = self.scheduler.alphas_cumprod.to(noised.device)[timesteps][:, None, None, None]
        if self.scheduler.config.prediction_type == "epsilon":
            return (noised - (1 - alpha).sqrt() * prediction.float()) / alpha.sqrt()
        return alpha.sqrt() * noised - (1 - alpha).sqrt() * prediction.float()

    def sampling_scheduler(self) -> DDIMScheduler:
        """The scheduler of the trained pipeline. It ignores a learned variance; to use it:
        `DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned_range")`."""
        config = dict(self.scheduler.config)
        # Left in, it would reach solvers made from this config, and some of them cut a prediction to three channels.
        del config["variance_type"]
        return DDIMScheduler.from_config(config, timestep_spacing="trailing")


class FlowMatchingObjective:
    """Straight paths from data to noise (rectified flow, Liu et al., arXiv:2209.03003): z_t = (1 - s) z_0 + s noise.

    The network predicts noise - z_0. Its timestep is 1000 s, and s is logit-normal, as in Stable Diffusion 3 (Esser et
    al., arXiv:2403.03206).
    """

    def __init__(self):
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def sample_timesteps(self, generators: list[torch.Generator]) -> torch.Tensor:
        """(B,) float32 in (0, 1000), a generator an image."""
        draw = partial(compute_density_for_timestep_sampling, "logit_normal", 1, 0.0, 1.0)
        share = torch.cat([draw(device=one.device, generator=one) for one in generators])
        return share * self.scheduler.config.num_train_timesteps

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t of latents z_0 and noise, both tied (B, C, hR, wR)."""
        # The scheduler's own `scale_noise` knows only its 1000 timesteps and looks each up by itself.
        share = (timesteps / self.scheduler.config.num_train_timesteps)[:, None, None, None]
        return (1 - share) * latents + share * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """noise - z_0, tied like its arguments."""
        return noise - latents

    def weights(self, timesteps: torch.Tensor) -> None:
        """The density of the timesteps is the only weight."""
        return None

    def sampling_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler of the trained pipeline."""
        return self.scheduler


def make_objective(
    name: str, snr_gamma: float | None = None, learn_sigma: bool = False
) -> DiffusionObjective | FlowMatchingObjective:
    """The objective of the training flags.

    Args:
        name: one of `OBJECTIVES`.
        snr_gamma: min-SNR weighting; not for flow matching.
        learn_sigma: predict the variance; not for flow matching, which has none.

    Raises:
        ValueError: the name is unknown, or flow matching is asked for what it does not have.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {name!r}.")
    if name != "flow_matching":
        return DiffusionObjective(name, snr_gamma, learn_sigma)
    if snr_gamma is not None or learn_sigma:
        asked = "learn_sigma" if learn_sigma else "snr_gamma"
        raise ValueError(f"`{asked}` belongs to epsilon and v_prediction; objective 'flow_matching' has no such term.")
    return FlowMatchingObjective()
