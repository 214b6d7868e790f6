# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What an adaptive model spends: tokens, multiply-adds and seconds of its real forward passes.

All that is measured here follows from the two things that an adaptive model supplies (`budgets.AdaptiveDenoiser`).

Shapes:
    B images
"""

import inspect
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..budgets import AdaptiveDenoiser


class ForwardMeter:
    """Notes what the forward passes of a denoiser cost, while the block lasts.

        with ForwardMeter(pipe.transformer) as meter:
            pipe(...)
        meter.tokens               # {"backbone": 64.0, "refine": 76.0}
        meter.step_seconds()       # of each step but the last

    Args:
        transformer: the denoiser; not compiled as a whole.
        counts_macs: whether multiply-adds are counted, which is slow: those of matrix products, convolutions and
            attention, as torch counts them. Elementwise ones are not.

    Raises:
        ValueError: the denoiser is no adaptive model.
    """

    def __init__(self, transformer: AdaptiveDenoiser, counts_macs: bool = False):
        self.transformer, self.counts_macs = transformer, counts_macs
        if not hasattr(transformer, "budget_argument"):
            raise ValueError(f"`transformer` must have a budget, got a {type(transformer).__name__}.")
        self._signature = inspect.signature(transformer.forward)
        self._tokens: list[dict[str, torch.Tensor]] = []
        self._macs: list[tuple[float, int]] = []  # of each pass, and its images
        self._starts: list = []

    def __enter__(self) -> "ForwardMeter":
        self._own = vars(self.transformer).get("forward")  # accelerate's hooks put theirs there
        self._forward, self.transformer.forward = self.transformer.forward, self._measured
        return self

    def __exit__(self, *error) -> None:
        del self.transformer.forward
        if self._own is not None:
            self.transformer.forward = self._own

    def _measured(self, *args, **kwargs):
        self._starts.append(_now(next(self.transformer.parameters()).device))
        inputs = self._signature.bind(*args, **kwargs).arguments
        if self.counts_macs:
            # Attention as two matrix products: a fused kernel that the counter does not know would count as nothing
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                output = self._forward(*args, **kwargs)
            self._macs.append((counter.get_total_flops() / 2, len(next(iter(inputs.values())))))
        else:
            output = self._forward(*args, **kwargs)
        tokens = self.transformer.count_tokens(inputs, output)
        self._tokens.append({stage: number.double().mean() for stage, number in tokens.items()})
        return output

    @property
    def tokens(self) -> dict[str, float]:
        """Of an image in a pass by stage, mean over images and passes."""
        stages = self._tokens[0]
        return {stage: torch.stack([one[stage] for one in self._tokens]).mean().item() for stage in stages}

    @property
    def macs(self) -> float:
        """Multiply-adds of an image in a pass, mean over passes."""
        return statistics.fmean(macs / number for macs, number in self._macs)

    @property
    def total_macs(self) -> float:
        """Multiply-adds of all images in all passes."""
        return math.fsum(macs for macs, _ in self._macs)

    def step_seconds(self) -> list[float]:
        """Seconds from the start of each pass to that of the next one: of the denoising steps but the last."""
        if self._starts and not isinstance(self._starts[0], float):
            torch.cuda.synchronize()
            return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._starts)]
        return [after - before for before, after in pairwise(self._starts)]


def _now(device: torch.device) -> Any:
    """The time; on CUDA as an event of the device, which nothing waits for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class TimedCall:
    """A call of the pipeline."""

    num_images: int
    seconds: float  # of the whole call
    step_seconds: list[float]  # of its denoising steps
    tokens: dict[str, float]  # of an image by stage, mean over its images


def cost_of(calls: Sequence[TimedCall]) -> dict[str, Any]:
    """What an image costs, over calls that drew images alike: means of what is counted, medians of what is timed.

    The last batch may be smaller than the others, and an image of it dearer: its time does not count.

    Returns:
        "tokens" by stage; "seconds_per_image", of the whole call; "seconds_per_step", both passes if
        guided: None with a single step.
    """
    num_images = sum(call.num_images for call in calls)
    full = max(call.num_images for call in calls)
    timed = [call for call in calls if call.num_images == full]
    steps = [seconds for call in timed for seconds in call.step_seconds]

    stages = calls[0].tokens
    return {
        "tokens": {
            stage: sum(call.tokens[stage] * call.num_images for call in calls) / num_images for stage in stages
        },
        "seconds_per_image": statistics.median(call.seconds for call in timed) / full,
        "seconds_per_step": statistics.median(steps) / full if steps else None,
    }
