# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Steps of training that are measured against one another: ours in its variants, and that of the original DiT."""

import copy
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import Bench
from diffusers.training_utils import EMAModel
from original_dit import CHANNELS, DiTShape, OriginalDiT
from peers import sharing_weights
from photo_maps import maps_of_shares, photograph_entropies
from torch import nn

from diffusers_d2it import D2iTContentModel
from diffusers_d2it.grains import GrainLayout, tie
from diffusers_d2it.losses import multi_grained_loss
from diffusers_d2it.objectives import DiffusionObjective
from diffusers_d2it.training import FiniteGate


NUM_BATCHES = 4
LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999  # sec. 4.1
PACKED, CHECKPOINTED, COMPILED = "packed", "packed, checkpointed", "packed, compiled"
COMPILED_CHECKPOINTED, DENSE, ORIGINAL = "packed, compiled, checkpointed", "dense", "original DiT"


@dataclass(frozen=True)
class Batch:
    """What a latent cache gives to a step."""

    latents: torch.Tensor  # z_0, tied, (B, C, H, W)
    grain_map: torch.Tensor  # (B, h, w)
    class_labels: torch.Tensor  # (B,)

    def images(self, start: int, stop: int) -> "Batch":
        return Batch(*(x[start:stop] for x in astuple(self)))


def make_batches(shape: DiTShape, batch_size: int, fine_ratio: float, device: str) -> list[Batch]:
    """Batches of random latents on the maps of photographs, with this share of fine regions over all batches."""
    entropy = photograph_entropies(NUM_BATCHES * batch_size, 16 * shape.side, region_size=16)
    maps = maps_of_shares(entropy, (1 - fine_ratio, fine_ratio)).to(device)
    latents = torch.randn(len(maps), CHANNELS, shape.sample_size, shape.sample_size, device=device)
    labels = torch.randint(shape.num_classes, (len(maps),), device=device)
    rows = zip(tie(latents, maps).split(batch_size), maps.split(batch_size), labels.split(batch_size))
    return [Batch(*row) for row in rows]


class Training:
    """Our training: one set of weights, moments and averages for all variants of the packed content model."""

    def __init__(self, model: D2iTContentModel, device: str):
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if device == "cuda" else "no")
        self.objective = DiffusionObjective()
        self.weights = list(model.parameters())
        optimizer = torch.optim.AdamW(self.weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.ema = EMAModel(self.weights, decay=EMA_DECAY, foreach=True)
        self.gate = FiniteGate(self.accelerator)

    def noised(self, layout: GrainLayout, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fresh noise, timesteps and noised latents of a batch."""
        noise = layout.tie(torch.randn_like(batch.latents))
        timesteps = torch.randint(1000, (len(noise),), device=noise.device)
        return noise, timesteps, self.objective.add_noise(batch.latents, noise, timesteps)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Loss of a batch, the layout of whose map is found on the way, as in training."""
        layout = model.prepare_grain_map(batch.grain_map)
        noise, timesteps, noised = self.noised(layout, batch)
        with self.accelerator.autocast():
            prediction = model(noised, timesteps, layout, batch.class_labels).sample
        return multi_grained_loss(prediction, noise, layout)["loss"]

    def step(self, model: nn.Module, batch: Batch) -> None:
        self.accelerator.backward(self.gate.watch(self.loss(model, batch)))
        if self.gate.lets_through(self.accelerator.clip_grad_norm_(self.weights, 1.0)):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.weights)


class OriginalTraining:
    """Training of the original DiT, with autocast to bfloat16 on an accelerator; otherwise as it was published."""

    def __init__(self, shape: DiTShape, device: str):
        self.device = device
        self.objective = DiffusionObjective()
        self.model = OriginalDiT(shape).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def step(self, batch: Batch) -> None:
        noise = torch.randn_like(batch.latents)
        timesteps = torch.randint(1000, (len(noise),), device=noise.device)
        noised = self.objective.add_noise(batch.latents, noise, timesteps)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            prediction = self.model(noised, timesteps, batch.class_labels)
        loss = F.mse_loss(prediction.float(), noise)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # published before `backward`: the peak is the same
        with torch.no_grad():
            for averaged, weight in zip(self.ema.parameters(), self.model.parameters()):
                averaged.mul_(EMA_DECAY).add_(weight, alpha=1 - EMA_DECAY)


def memory_of(bench: Bench, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> float:
    """GiB that a training needs at the peak of a step: what it keeps, weights, average, moments, and what comes up."""
    peak = bench.peak_memory(step)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return peak / 2**10 + sum(tensor.nbytes for tensor in [*weights, *weights, *moments]) / 2**30


def variants(model: D2iTContentModel, compile_too: bool) -> dict[str, D2iTContentModel]:
    """The packed model, eager and compiled, with and without checkpointed blocks, on the same weights."""
    names = (CHECKPOINTED, COMPILED, COMPILED_CHECKPOINTED) if compile_too else (CHECKPOINTED,)
    models = {name: sharing_weights(model) for name in names}
    for name, variant in models.items():
        if "checkpointed" in name:
            variant.enable_gradient_checkpointing()
        if "compiled" in name:
            variant.compile_repeated_blocks()
    return {PACKED: model} | models
