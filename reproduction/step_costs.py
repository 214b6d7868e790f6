# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a training step of every arm costs: what equal seconds and equal multiply-adds are counted with.

A step is forward, loss, backward, clipping, AdamW, with the maps of photographs at the arm's fine ratio; of DC-DiT
with a quarter of the cells natural, which training aims at, and the mean of the budgets that it draws. Seconds are
interleaved in one process. What else a training does, reading the batch and averaging the weights, is left out: as it
takes every arm as long, arms with short steps get a few per cent more of them than their share. Multiply-adds are
those of an image in the forward pass; backward has twice as many in all arms.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from arms import ARMS, CHUNKED_ARMS, Arm, ChunkedArm, Preset, model_config
from cell_dit import CellDiT
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from train_arm import without_refine_net

from diffusers_d2it import D2iTContentModel, DCDiTModel, DynamicAutoencoderKL, LatentCodec
from diffusers_d2it.data import LatentCache, read_codes
from diffusers_d2it.evaluation import ForwardMeter
from diffusers_d2it.grains import grain_map_from_entropy
from diffusers_d2it.losses import mse_loss, multi_grained_loss, ratio_loss


NATURAL_SHARE = 0.25  # of DC-DiT's cells


def measure_step_costs(
    cache: LatentCache, vae: DynamicAutoencoderKL, preset: Preset, device: torch.device
) -> dict[str, dict[str, float]]:
    """By arm: "seconds", median, on a CPU processor time, which other work does not lengthen; and "macs"."""
    loader = DataLoader(cache, preset.batch_size, collate_fn=cache.collate)
    batch = tree_map(lambda tensor: tensor.to(device), next(iter(loader)))
    arms = {name: arm for name, arm in ARMS.items() if arm.tied_noise} | CHUNKED_ARMS
    steps = {name: make_step(arm, preset, cache.num_classes, vae, batch) for name, arm in arms.items()}
    macs = {}
    for name, step in steps.items():
        with ForwardMeter(step.model, counts_macs=True) as meter:
            step.loss()
        macs[name] = meter.macs
    times = {name: [] for name in steps}
    for turn in range(preset.timed_steps + 2):
        for name, step in steps.items():
            seconds = _time(step, device)
            if turn >= 2:
                times[name].append(seconds)
    costs = {"seconds": {name: statistics.median(found) for name, found in times.items()}, "macs": macs}
    for found in costs.values():  # the same arithmetic, with other numbers
        found |= {name: found["d2it"] for name, arm in ARMS.items() if not arm.tied_noise}
    return costs


@dataclass(frozen=True)
class Step:
    """A training step without what reads the batch."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self) -> None:
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_step(arm: Arm | ChunkedArm, preset: Preset, num_classes: int, vae: DynamicAutoencoderKL, batch: dict) -> Step:
    config = model_config(arm, preset) | {"in_channels": vae.config.latent_channels, "num_classes": num_classes}
    autocast = torch.autocast(vae.device.type, torch.bfloat16, enabled=preset.mixed_precision == "bf16")
    make = _chunked_loss if isinstance(arm, ChunkedArm) else _grained_loss
    model, loss = make(arm, config, vae, batch, autocast)
    return Step(model, loss, torch.optim.AdamW(model.parameters(), lr=preset.learning_rate, fused=True))


def _grained_loss(arm: Arm, config: dict, vae: DynamicAutoencoderKL, batch: dict, autocast: torch.autocast) -> tuple:
    model = D2iTContentModel(**config).to(vae.device)
    if arm.refine_share == 0:
        model = without_refine_net(model)
    with torch.no_grad():
        moments, entropy = read_codes(vae, batch)
        grain_map = grain_map_from_entropy(entropy, vae.thresholds(arm.fine_ratio))
        latents = vae.scale_latents(vae.posterior(moments, grain_map).mode())

    def loss() -> torch.Tensor:
        layout = model.prepare_grain_map(grain_map)
        noise = layout.tie(torch.randn_like(latents))
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        with autocast:
            prediction = model(latents + noise, timesteps, layout, batch["class_labels"]).sample
        return multi_grained_loss(prediction, noise, layout, arm.grain_weights)["loss"]

    return model, loss


def _chunked_loss(
    arm: ChunkedArm, config: dict, vae: DynamicAutoencoderKL, batch: dict, autocast: torch.autocast
) -> tuple:
    model = (CellDiT if arm.every_cell else DCDiTModel)(**config).to(vae.device)
    with torch.no_grad():
        codec = LatentCodec(vae)
        latents = codec.scale(codec.posterior(codec.moments(batch)).mode())
        if not arm.every_cell:
            timesteps = torch.full((len(latents),), 500, device=latents.device)
            logits = model(latents, timesteps, batch["class_labels"]).boundary_probability.flatten().logit()
            model.boundary_router.score.bias -= logits.quantile(1 - NATURAL_SHARE)

    def loss() -> torch.Tensor:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        with autocast:
            output = model(latents + noise, timesteps, batch["class_labels"], budget=statistics.mean(arm.budgets))
        return mse_loss(output.sample, noise) + 0.03 * ratio_loss(output.boundary_probability, 1 / NATURAL_SHARE)

    return model, loss


def _time(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start
