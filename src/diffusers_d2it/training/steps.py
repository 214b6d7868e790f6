# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pieces of a training step: labels to drop, the fine ratio of a batch, what is logged of it."""

import time

import torch

from ..grains import cells_per_region, fine_share, grain_map_to_cells
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from .gate import GatedAccelerator


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


def grain_signals(
    vae: DynamicAutoencoderKL,
    grain_map: torch.Tensor,
    fine_ratio: float | None = None,
    latents: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Early signs of something wrong with the grains of a batch.

    Args:
        vae: the autoencoder that the maps are of.
        grain_map: (B, h, w) int64.
        fine_ratio: what `vae.thresholds` was asked for.
        latents: (B, C, hR, wR) of this map.

    Returns:
        "fine_share" of the regions; "fine_drift", how far that is from the ratio asked for: if it stays away from 0,
        these are not the images that the thresholds were counted on. With latents "latent_std_grain_<i>", coarsest 0:
        all cells together have about 1 once the autoencoder knows its scale. NaN where no region has that grain.
    """
    if fine_ratio is None:
        fine_ratio = vae.grain_ratios[-1]
    share = fine_share(grain_map, vae.num_grains).mean()
    signals = {"fine_share": share, "fine_drift": share - fine_ratio}
    if latents is not None:
        latents = latents.detach().float()
        grain_of_cell = grain_map_to_cells(grain_map, cells_per_region(latents, grain_map))
        for grain in range(vae.num_grains):
            of_grain = (grain_of_cell == grain).float().unsqueeze(1)
            num_values = of_grain.sum() * latents.shape[1]
            mean = (latents * of_grain).sum() / num_values
            variance = ((latents - mean).square() * of_grain).sum() / num_values
            signals[f"latent_std_grain_{grain}"] = variance.sqrt()
    return signals


class StepLog:
    """What is logged of an update: means of its losses over forward passes and processes, gradient norm, speed.

        log = StepLog(accelerator, args.train_batch_size)
        log.add(losses)             # after every forward pass
        values = log.take()         # after every update, on every process

    Args:
        accelerator: joins the processes.
        batch_size: images of a process in a forward pass.
    """

    def __init__(self, accelerator: GatedAccelerator, batch_size: int):
        self.accelerator = accelerator
        self.batch_size = batch_size
        self._scalars: list[dict[str, torch.Tensor]] = []
        self._last_time = time.perf_counter()

    def add(self, scalars: dict[str, torch.Tensor]) -> None:
        """Keep the scalars of one forward pass, without waiting for them."""
        self._scalars.append({name: value.detach().float() for name, value in scalars.items()})

    def take(self) -> dict[str, float]:
        """The means since the last call, "gradient_norm" before it was clipped, and "images_per_second" in all."""
        names = list(self._scalars[0])
        stacked = torch.stack([torch.stack([scalars[name] for name in names]) for scalars in self._scalars])
        num_images = len(self._scalars) * self.batch_size * self.accelerator.num_processes
        self._scalars.clear()
        values = dict(zip(names, self.accelerator.reduce(stacked.mean(dim=0), "mean").tolist()))
        now = time.perf_counter()
        values["gradient_norm"] = self.accelerator.gradient_norm
        values["images_per_second"] = num_images / (now - self._last_time)
        self._last_time = now
        return values
