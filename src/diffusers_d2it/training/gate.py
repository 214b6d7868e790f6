# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""No update with a loss or a gradient that is not finite: one of them would make every weight NaN."""

import logging
import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator


logger = logging.getLogger(__name__)

_NUM_NAMED = 3  # weights named in a message


class GatedAccelerator(Accelerator):
    """An Accelerator that lets no update through whose loss or gradient is NaN or infinite.

    The gate stands in `clip_grad_norm_`, so a training loop needs no line for it: it raises there, before the
    optimizer has changed anything, or takes the gradients away, and the optimizer, which finds none, leaves its
    weights and moments as they are. All processes decide alike, because the gradient of all is judged.

    Under float16 the loss is scaled so that its gradients are just finite, and the scaler lowers the scale whenever
    they are not: that is no fault as long as there is a scale to lower.

    Args:
        max_skipped_steps: how many updates may be held back; with the next one the run stops.
        kwargs: of `Accelerator`.
    """

    def __init__(self, *, max_skipped_steps: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.max_skipped_steps = max_skipped_steps
        self.num_skipped_steps = 0
        self.gradient_norm = math.nan  # of the last update, before it was clipped
        self._losses: list[torch.Tensor] = []
        self._held_back = False

    def backward(self, loss: torch.Tensor, **kwargs) -> None:
        """Gradients of a loss; of one that is not finite they are NaN, in every process."""
        self._losses.append(loss.detach())
        super().backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan), **kwargs)

    def clip_grad_norm_(
        self, parameters: Iterable[torch.nn.Parameter], max_norm: float, norm_type: float = 2
    ) -> float:
        """Clip gradients, and return the norm that they had.

        Raises:
            FloatingPointError: the norm is not finite, and as many updates as may be have been held back before.
        """
        parameters = list(parameters)
        self.gradient_norm = float(super().clip_grad_norm_(parameters, max_norm, norm_type))
        losses, self._losses = self._losses, []
        if math.isfinite(self.gradient_norm):
            return self.gradient_norm
        self._held_back = True
        if self.scaler is None or self.scaler.get_scale() < 1:
            self._count(f"the loss is {_join(losses)}, the gradient's norm {self.gradient_norm}", parameters)
        for parameter in parameters:
            parameter.grad = None
        return self.gradient_norm

    def take_held_back(self) -> bool:
        """Whether an update was held back since the last call."""
        held_back, self._held_back = self._held_back, False
        return held_back

    def _count(self, what: str, parameters: list[torch.nn.Parameter]) -> None:
        names = {parameter: name for model in self._models for name, parameter in model.named_parameters()}
        bad = [p for p in parameters if p.grad is not None and not p.grad.isfinite().all()]
        named = ", ".join(names.get(parameter, "a weight without a name") for parameter in bad[:_NUM_NAMED])
        what = f"{what}: not finite are the gradients of {len(bad)} of {len(parameters)} weights, such as {named}"
        self.num_skipped_steps += 1
        if self.num_skipped_steps > self.max_skipped_steps:
            raise FloatingPointError(
                f"{what}. The update was not made, no checkpoint was written after it"
                + (f", and {self.max_skipped_steps} have been skipped before." if self.max_skipped_steps else ".")
                + " --skip_nonfinite_steps N goes on without N such updates."
            )
        if self.is_main_process:
            logger.warning("%s. Skipped: %d of at most %d.", what, self.num_skipped_steps, self.max_skipped_steps)


def _join(losses: list[torch.Tensor]) -> str:
    return ", ".join(f"{loss.item():g}" for loss in losses)
