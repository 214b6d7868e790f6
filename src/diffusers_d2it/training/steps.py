# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pieces of a training step: labels to drop, the fine ratio of a batch, losses to log."""

import torch
from accelerate import Accelerator


def drop_labels(
    class_labels: torch.Tensor, num_classes: int | None, share: float, generator: torch.Generator
) -> torch.Tensor | None:
    """Replace a random share of the labels by "no class", index `num_classes`; None for an unconditional model."""
    if num_classes is None:
        return None
    dropped = torch.rand(class_labels.shape, generator=generator, device=class_labels.device) < share
    return class_labels.masked_fill(dropped, num_classes)


def draw_fine_ratio(ratios: list[float] | None, generator: torch.Generator) -> float | None:
    """The fine ratio of a batch: None for the autoencoder's own, the one given, or uniform between two.

    A model that has seen many ratios serves many budgets: the same weights sample at any of them.
    """
    if ratios is None:
        return None
    if len(ratios) == 1:
        return ratios[0]
    low, high = ratios
    return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()


class LossMeans:
    """Means of the losses of an update, over its forward passes and all processes.

        means = LossMeans(accelerator)
        means.add(losses)           # after every forward pass
        values = means.take()       # after every update, on every process

    Args:
        accelerator: joins the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._losses: list[dict[str, torch.Tensor]] = []

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Keep the scalars of one forward pass, without waiting for them."""
        self._losses.append({name: value.detach().float() for name, value in losses.items()})

    def take(self) -> dict[str, float]:
        """The means since the last call: the one moment where the process waits for its device."""
        names = list(self._losses[0])
        stacked = torch.stack([torch.stack([losses[name] for name in names]) for losses in self._losses])
        self._losses.clear()
        return dict(zip(names, self.accelerator.reduce(stacked.mean(dim=0), "mean").tolist()))
