# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a training step draws besides noise: labels to drop, the fine ratio of a batch."""

import torch


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
