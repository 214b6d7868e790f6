# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Maps that are drawn: by the grain model (sec. 3.2.2 of arXiv:2504.09454), whole or around others, or by chance."""

import inspect
import math

import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from ..models.transformer_d2it_grain import D2iTGrainModel
from .grain_maps import DRAWN
from .sampling_steps import SamplingSteps


_CERTAIN = 1e4  # logits of a region that is held, beyond those of any model


@torch.no_grad()
def sample_grain_map(
    model: D2iTGrainModel,
    scheduler: KarrasDiffusionSchedulers,
    size: tuple[int, int],
    class_ids: torch.Tensor | None,
    batch_size: int,
    num_inference_steps: int = 10,
    guidance_scale: float = 1.0,
    fine_ratio: float | list[float | None] | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | None = None,
    held: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw grain maps from noise (sec. 3.2.2): diffusion over one-hot maps, argmax of the last logits (Eq. 4).

    Regions that are held are put back at every step, their grain noised to it, and the others are drawn given them.
    The noise of a held region has the sign of its grain, so that the region speaks for it from the first step on; and
    where the scheduler takes `eta` every step draws fresh noise, so that the others can follow. Without both the seam
    is rougher than a map that is drawn whole, and with both it is not, at the same number of passes
    (`reproduction/editing.py`; drawing steps anew, as RePaint does, takes more passes and gains less).

    Args:
        model: the grain model.
        scheduler: a scheduler with prediction_type "sample".
        size: (h, w) sides of the map.
        class_ids: (B,) int64, or None for an unconditional model.
        batch_size: B.
        num_inference_steps: steps of the scheduler.
        guidance_scale: classifier-free guidance on the logits; 1 is without.
        fine_ratio: share of regions in the finest grain, of each map or of all, met exactly; None leaves it to the
            model.
        generator: one, or one for each map.
        device: where to draw; default: the model's.
        held: (B, h, w) int64, the grain of regions that are given, `DRAWN` elsewhere; None draws all.

    Returns:
        (B, h, w) int64.

    Raises:
        ValueError: the logits are not finite: the model or the scheduler has diverged; or the share cannot be met,
            as too many or too few regions are held fine.
    """
    device = device or model.device
    num_grains, num_classes = model.config.num_grains, model.config.num_classes
    ratios = fine_ratio if isinstance(fine_ratio, list) else [fine_ratio] * batch_size
    counts = [
        None if one is None else _num_fine(one, held[i] if held is not None else None, size, num_grains)
        for i, one in enumerate(ratios)
    ]
    condition = None
    if ratios != [None] * batch_size and model.config.fine_ratio_condition:
        condition = torch.tensor([math.nan if one is None else float(one) for one in ratios], device=device)
    guided = num_classes is not None and guidance_scale != 1.0
    null_ids = torch.full_like(class_ids, num_classes) if guided else None

    takes_eta = held is not None and "eta" in inspect.signature(scheduler.step).parameters
    steps = SamplingSteps(scheduler, num_inference_steps, device, generator, eta=1.0 if takes_eta else None)
    noise = randn_tensor((batch_size, num_grains, *size), generator=generator, device=device, dtype=torch.float32)
    state = steps.prior(noise)  # (B, k, h, w)
    if held is not None:
        held = held.to(device)
        is_held = (held != DRAWN)[:, None]  # (B, 1, h, w)
        clean = model.state_from_grain_map(held.clamp_min(0), num_grains).contiguous()  # (B, k, h, w), as the noise
        speaking = clean * noise.abs()  # noise with the sign of the grain
        # Before the first step, as `add_noise` sends a timestep to the device
        held_at = [steps.noised(clean, speaking, i) for i in range(len(steps.timesteps))]
    for i, t in enumerate(steps.timesteps):
        if held is not None:
            state = torch.where(is_held, held_at[i], state)
        model_input, model_t = steps.model_input(state, t)
        model_input = model_input.to(model.dtype)
        # Copied, because a CUDA graph writes its next output to the same place
        logits = model(model_input, model_t, class_ids, condition).logits.to(torch.float32, copy=True)
        if guided:
            null_logits = model(model_input, model_t, null_ids, condition).logits.float()
            logits = null_logits + guidance_scale * (logits - null_logits)
        state = steps.step(model.expected_state(logits), t, state)
    if not logits.isfinite().all():
        raise ValueError("`grain_model` ended in logits that are not finite: the model or its scheduler diverged.")
    if held is not None:  # they come first or last where a share of fine regions is counted
        logits = torch.where(is_held, clean * _CERTAIN, logits)
    return grain_map_from_logits(logits, counts)


def grain_map_from_logits(logits: torch.Tensor, num_fine: list[int | None]) -> torch.Tensor:
    """The most likely grain of each region; of maps with a number, so many regions, the likeliest ones, are fine."""
    if num_fine == [None] * len(logits):
        return logits.argmax(dim=1)
    coarser = logits[:, :-1]
    fineness = (logits[:, -1] - coarser.logsumexp(dim=1)).flatten(1)  # (B, h * w)
    rank = fineness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    counts = torch.tensor([-1 if number is None else number for number in num_fine], device=logits.device)[:, None]
    fine = (rank < counts).view_as(logits[:, -1])
    trimmed = coarser.argmax(dim=1).masked_fill(fine, logits.shape[1] - 1)
    return torch.where((counts < 0)[..., None], logits.argmax(dim=1), trimmed)


def _num_fine(fine_ratio: float, held: torch.Tensor | None, size: tuple[int, int], num_grains: int) -> int:
    """How many regions of a map are fine, those `held` (h, w) included.

    Raises:
        ValueError: more are held fine, or fewer are left.
    """
    regions = size[0] * size[1]
    number = round(fine_ratio * regions)
    lowest = 0 if held is None else int((held == num_grains - 1).sum())
    highest = regions if held is None else lowest + int((held == DRAWN).sum())
    if not lowest <= number <= highest:
        raise ValueError(
            f"`fine_ratio` must lie in [{lowest / regions:.4g}, {highest / regions:.4g}] with this `grain_map`, whose"
            f" held regions have their grain, got {fine_ratio}."
        )
    return number


def random_grain_map(
    shape: tuple[int, int, int],
    num_grains: int,
    fine_ratio: float | list[float],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> torch.Tensor:
    """Independent regions, fine with probability `fine_ratio`, of all or of each, the coarser grains equally likely.

    The random maps of Table 5.
    """
    batch_size, height, width = shape
    normal = randn_tensor((batch_size, 2, height, width), generator=generator, device=device)
    uniform = torch.special.ndtr(normal).unbind(dim=1)
    coarser = (uniform[1] * (num_grains - 1)).long().clamp_max(num_grains - 2)
    ratio = torch.as_tensor(fine_ratio, dtype=torch.float32, device=device).reshape(-1, 1, 1)
    return torch.where(uniform[0] < ratio, num_grains - 1, coarser)
