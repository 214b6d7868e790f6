# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Seconds of a training step of every arm, interleaved in one process: what equal seconds are counted with.

A step is forward, loss, backward, clipping, AdamW, with the maps of photographs at the arm's fine ratio. What else a
training does, reading the batch and averaging the weights, is left out: as it takes every arm as long, arms with short
steps get a few per cent more of them than their share.
"""

import statistics
import time
from collections.abc import Callable

import torch
from arms import ARMS, Arm, Preset, model_config
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from train_arm import without_refine_net

from diffusers_d2it import D2iTContentModel, DynamicAutoencoderKL
from diffusers_d2it.data import LatentCache, read_codes
from diffusers_d2it.grains import grain_map_from_entropy
from diffusers_d2it.losses import multi_grained_loss


def measure_step_times(
    cache: LatentCache, vae: DynamicAutoencoderKL, preset: Preset, device: torch.device
) -> dict[str, float]:
    """Median seconds of a step by arm: processor time on a CPU, which other work beside it does not lengthen."""
    loader = DataLoader(cache, preset.batch_size, collate_fn=cache.collate)
    batch = tree_map(lambda tensor: tensor.to(device), next(iter(loader)))
    steps = {name: _make_step(arm, preset, cache, vae, batch, device) for name, arm in ARMS.items() if arm.tied_noise}
    times = {name: [] for name in steps}
    for turn in range(preset.timed_steps + 2):
        for name, step in steps.items():
            seconds = _time(step, device)
            if turn >= 2:
                times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    # The same arithmetic, with other numbers
    return medians | {name: medians["d2it"] for name, arm in ARMS.items() if not arm.tied_noise}


def _make_step(
    arm: Arm, preset: Preset, cache: LatentCache, vae: DynamicAutoencoderKL, batch: dict, device: torch.device
) -> Callable[[], None]:
    sizes = {"in_channels": vae.config.latent_channels, "num_classes": cache.num_classes}
    model = D2iTContentModel(**(model_config(arm, preset) | sizes)).to(device)
    if arm.refine_share == 0:
        model = without_refine_net(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.learning_rate, fused=True)
    with torch.no_grad():
        moments, entropy = read_codes(vae, batch)
        grain_map = grain_map_from_entropy(entropy, vae.thresholds(arm.fine_ratio))
        latents = vae.scale_latents(vae.posterior(moments, grain_map).mode())

    def step() -> None:
        layout = model.prepare_grain_map(grain_map)
        noise = layout.tie(torch.randn_like(latents))
        timesteps = torch.randint(0, 1000, (len(latents),), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=preset.mixed_precision == "bf16"):
            prediction = model(latents + noise, timesteps, layout, batch["class_labels"]).sample
        multi_grained_loss(prediction, noise, layout, arm.grain_weights)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


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
