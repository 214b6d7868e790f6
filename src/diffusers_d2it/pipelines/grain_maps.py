# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every way to a grain map: the grain model (sec. 3.2.2, arXiv:2504.09454), chance (Table 5), an image's entropy."""

import copy

import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from ..data.images import ImageInput, image_to_pixels
from ..grains import grain_map_from_entropy
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.transformer_d2it_grain import D2iTGrainModel
from .tied_scheduler import step_generator_kwargs


@torch.no_grad()
def sample_grain_map(
    model: D2iTGrainModel,
    scheduler: KarrasDiffusionSchedulers,
    size: tuple[int, int],
    class_ids: torch.Tensor | None,
    batch_size: int,
    num_inference_steps: int = 10,
    guidance_scale: float = 1.0,
    fine_ratio: float | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Draw grain maps from noise (sec. 3.2.2): diffusion over one-hot maps, argmax of the last logits (Eq. 4).

    Args:
        model: the grain model.
        scheduler: a scheduler with prediction_type "sample".
        size: (h, w) sides of the map.
        class_ids: (B,) int64, or None for an unconditional model.
        batch_size: B.
        num_inference_steps: steps of the scheduler.
        guidance_scale: classifier-free guidance on the logits; 1 is without.
        fine_ratio: share of regions in the finest grain, met exactly; None leaves it to the model.
        generator: one, or one for each map.
        device: where to draw; default: the model's.

    Returns:
        (B, h, w) int64.

    Raises:
        ValueError: the logits are not finite: the model or the scheduler has diverged.
    """
    device = device or model.device
    num_grains, num_classes = model.config.num_grains, model.config.num_classes
    ratio = None
    if fine_ratio is not None and model.config.fine_ratio_condition:
        ratio = torch.full((batch_size,), float(fine_ratio), device=device)
    guided = num_classes is not None and guidance_scale != 1.0
    null_ids = torch.full_like(class_ids, num_classes) if guided else None

    scheduler = copy.deepcopy(scheduler)  # as in TiedScheduler
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    step_kwargs = step_generator_kwargs(scheduler, generator)
    state = randn_tensor((batch_size, num_grains, *size), generator=generator, device=device, dtype=torch.float32)
    state = state * scheduler.init_noise_sigma  # (B, k, h, w)
    for t, model_t in zip(scheduler.timesteps, scheduler.timesteps.to(device)):
        model_input = scheduler.scale_model_input(state, t).to(model.dtype)
        # Copied, because a CUDA graph writes its next output to the same place
        logits = model(model_input, model_t, class_ids, ratio).logits.to(torch.float32, copy=True)
        if guided:
            null_logits = model(model_input, model_t, null_ids, ratio).logits.float()
            logits = null_logits + guidance_scale * (logits - null_logits)
        state = scheduler.step(model.expected_state(logits), t, state, return_dict=False, **step_kwargs)[0]
    if not logits.isfinite().all():
        raise ValueError("`grain_model` ended in logits that are not finite: the model or its scheduler diverged.")
    return grain_map_from_logits(logits, fine_ratio)


def grain_map_from_logits(logits: torch.Tensor, fine_ratio: float | None) -> torch.Tensor:
    """The most likely grain of each region; with a ratio, the regions likeliest to be fine are."""
    if fine_ratio is None:
        return logits.argmax(dim=1)
    coarser = logits[:, :-1]
    fineness = (logits[:, -1] - coarser.logsumexp(dim=1)).flatten(1)  # (B, h * w)
    num_fine = round(fine_ratio * fineness.shape[1])
    ranked = fineness.argsort(dim=1, descending=True, stable=True)
    fine = torch.zeros_like(fineness, dtype=torch.bool).scatter(1, ranked[:, :num_fine], True)
    return coarser.argmax(dim=1).masked_fill(fine.view_as(logits[:, -1]), logits.shape[1] - 1)


def random_grain_map(
    shape: tuple[int, int, int],
    num_grains: int,
    fine_ratio: float,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """Independent regions, fine with probability `fine_ratio`, the coarser grains equally likely (Table 5)."""
    batch_size, height, width = shape
    normal = randn_tensor((batch_size, 2, height, width), generator=generator, device=device)
    uniform = torch.special.ndtr(normal).unbind(dim=1)
    coarser = (uniform[1] * (num_grains - 1)).long().clamp_max(num_grains - 2)
    return torch.where(uniform[0] < fine_ratio, num_grains - 1, coarser)


@torch.no_grad()
def grain_map_of_image(
    vae: DynamicAutoencoderKL, image: ImageInput, fine_ratio: float | None, device: torch.device
) -> torch.Tensor:
    """The grain maps of images by their entropy, (B, h, w) int64; see `D2iTPipeline.grain_map_from_image`."""
    return grain_map_from_entropy(vae.region_entropy(image_to_pixels(image).to(device)), vae.thresholds(fine_ratio))
