# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""No update with a loss or a gradient that is not finite: one of them would make every weight NaN."""

import logging
import math

import torch
from accelerate import Accelerator

from ..words import listed


logger = logging.getLogger(__name__)

_NUM_NAMED = 3  # weights in a message


class FiniteGate:
    """Tells whether an update may be made; all processes are told alike, because the gradient of all is judged.

        accelerator.backward(gate.watch(loss))
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            if gate.lets_through(norm):
                optimizer.step()
                ema.step(model.parameters())
            optimizer.zero_grad()

    Under float16 the loss is scaled so that its gradients are just finite, and the scale is lowered whenever they are
    not: that is no fault as long as there is a scale to lower.

    Args:
        accelerator: the Accelerator, which has prepared the models.
        skip_nonfinite_steps: how many updates may be left out; with the next one the run stops.

    Raises:
        ValueError: `skip_nonfinite_steps` is negative.
    """

    def __init__(self, accelerator: Accelerator, skip_nonfinite_steps: int = 0):
        if skip_nonfinite_steps < 0:
            raise ValueError(f"`skip_nonfinite_steps` must be at least 0, got {skip_nonfinite_steps}.")
        self.accelerator = accelerator
        self.skip_nonfinite_steps = skip_nonfinite_steps
        self.num_skipped_steps = 0
        self._losses: list[torch.Tensor] = []

    def watch(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, scalar; the gradients of one that is not finite become NaN, in every process."""
        self._losses.append(loss.detach())
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)

    def lets_through(self, norm: torch.Tensor | float) -> bool:
        """Whether the gradients of an update are finite.

        Args:
            norm: of all gradients, from `Accelerator.clip_grad_norm_`.

        Raises:
            FloatingPointError: they are not, and as many updates as may be have been left out before.
        """
        losses, self._losses = self._losses, []
        if math.isfinite(norm):
            return True
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < 1:
            values = ", ".join(f"{loss.item():g}" for loss in losses)
            self._count(f"the loss is {values}, the gradient's norm {float(norm)}")
        if scaler is not None:
            scaler.update()  # which has seen these gradients: it lowers the scale
        return False

    def _count(self, what: str) -> None:
        weights = [named for model in self.accelerator._models for named in model.named_parameters()]
        gradients = {name: weight.grad for name, weight in weights if weight.grad is not None}
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        what += f": not finite are the gradients of {len(bad)} of {len(gradients)} weights, {listed(bad, _NUM_NAMED)}"
        self.num_skipped_steps += 1
        if self.num_skipped_steps > self.skip_nonfinite_steps:
            raise FloatingPointError(
                f"{what}. The update was not made, no checkpoint was written after it, and"
                f" {self.skip_nonfinite_steps} were left out before, which is all that `skip_nonfinite_steps` allows."
            )
        if self.accelerator.is_main_process:
            logger.warning("%s. Left out: %d of %d.", what, self.num_skipped_steps, self.skip_nonfinite_steps)
