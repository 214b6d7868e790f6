# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The training step of each model, by one process or by two that `main` is for.

What each of the two ends with goes to `<model>-<how>-<process>.safetensors`, where how is

    averaged    DDP, by accelerate
    sharded     FSDP2, by accelerate with the configuration eight-gpus-fsdp2.yaml
"""

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from script_runs import load_script
from small_runs import SmallRun
from torch import nn

from diffusers_d2it import D2iTContentModel, D2iTGrainModel, DCDiTModel, DynamicAutoencoderKL, load_preset
from diffusers_d2it.grains import GrainLayout
from diffusers_d2it.losses import dvae_loss, grain_loss, mse_loss, multi_grained_loss, ratio_loss
from diffusers_d2it.training.checkpoints import is_sharded


BATCH = 4  # images of an update, of all processes
NUM_STEPS = 3
SCHEDULER = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")


class Step(NamedTuple):
    """A model and its loss on the images `rows` of the update `step`."""

    make_model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int, slice], torch.Tensor]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_randomized(cls: type[nn.Module], preset: str) -> nn.Module:
    """With weights from a fixed seed, none of them zero: every path has a gradient."""
    torch.manual_seed(0)
    model = cls(**load_preset(preset))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model.double()


def make_dcdit() -> nn.Module:
    model = make_randomized(DCDiTModel, "dcdit-tiny")
    with torch.no_grad():  # far from one half, which rounding would cross, on both sides
        model.boundary_router.score.weight.mul_(1000)
        model.boundary_router.score.bias.fill_(-4)
    return model


def make_autoencoder() -> nn.Module:
    torch.manual_seed(0)
    return load_script("train_dvae.py").DvaeStep(DynamicAutoencoderKL(**load_preset("dvae-tiny"))).double()


def conditions(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grain maps (B, 4, 4), timesteps (B,) and labels (B,)."""
    generator = torch.Generator().manual_seed(100 + step)
    grain_map = torch.randint(2, (BATCH, 4, 4), generator=generator)
    return grain_map, torch.randint(1000, (BATCH,), generator=generator), torch.arange(BATCH)


def content_loss(model: nn.Module, step: int, rows: slice) -> torch.Tensor:
    grain_map, timesteps, labels = (values[rows] for values in conditions(step))
    layout = GrainLayout.from_grain_map(grain_map, num_grains=2)
    latents, noise = (layout.tie(draw(seed, BATCH, 4, 8, 8)[rows]) for seed in (step, 50 + step))
    noised = SCHEDULER.add_noise(latents, noise, timesteps)
    return multi_grained_loss(model(noised, timesteps, grain_map, labels).sample, noise, layout)["loss"]


def grain_model_loss(model: nn.Module, step: int, rows: slice) -> torch.Tensor:
    grain_map, timesteps, labels = (values[rows] for values in conditions(step))
    state = D2iTGrainModel.state_from_grain_map(grain_map, 2).double()
    noised = SCHEDULER.add_noise(state, draw(step, BATCH, 2, 4, 4)[rows], timesteps)
    share = torch.full((len(labels),), 0.5, dtype=torch.float64)
    return grain_loss(model(noised, timesteps, labels, share).logits, grain_map)["loss"]


def dcdit_loss(model: nn.Module, step: int, rows: slice) -> torch.Tensor:
    _, timesteps, labels = (values[rows] for values in conditions(step))
    latents, noise = (draw(seed, BATCH, 4, 8, 8)[rows] for seed in (step, 50 + step))
    output = model(SCHEDULER.add_noise(latents, noise, timesteps), timesteps, labels, budget=0.6)
    return mse_loss(output.sample, noise) + ratio_loss(output.boundary_probability, 4.0, group_size=1)


def autoencoder_loss(model: nn.Module, step: int, rows: slice) -> torch.Tensor:
    pixels = draw(step, BATCH, 3, 32, 32)[rows].clamp(-1, 1)
    generator = torch.Generator().manual_seed(step)
    torch.randn(rows.start, 4, 8, 8, generator=generator, dtype=torch.float64)  # the noise of the images before these
    return dvae_loss(pixels, *model(pixels, 0.5, generator), kl_weight=1e-2)["loss"]


STEPS = {
    "autoencoder": Step(make_autoencoder, autoencoder_loss),
    "grain": Step(partial(make_randomized, D2iTGrainModel, "grain-tiny"), grain_model_loss),
    "content": Step(partial(make_randomized, D2iTContentModel, "content-tiny"), content_loss),
    "dcdit": Step(make_dcdit, dcdit_loss),
}
SHARDED = ("grain", "content", "dcdit")


def train(step: Step, model: nn.Module, rows: slice, backward: Callable, optimizer) -> dict[str, torch.Tensor]:
    """Take some steps. Returns the gradients of the first and the weights after the last, by name."""
    results = {}
    for index in range(NUM_STEPS):
        backward(step.loss(model, index, rows))
        if index == 0:
            results |= {f"gradient.{name}": whole(weight.grad) for name, weight in named_weights(model)}
        optimizer.step()
        optimizer.zero_grad()
    return results | {f"weight.{name}": whole(weight) for name, weight in named_weights(model)}


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def named_weights(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    for name, weight in model.named_parameters():
        yield name.removeprefix("module."), weight


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, of all shards."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def train_prepared(accelerator: Accelerator, name: str, rows: slice) -> dict[str, torch.Tensor]:
    model = STEPS[name].make_model()
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    return train(STEPS[name], model, rows, accelerator.backward, optimizer)


def start_again(sharded: bool) -> None:
    """Let the next Accelerator of this process be of another kind."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = "true" if sharded else "false"


def make_sharding_accelerator(mixed_precision: str) -> Accelerator:
    """An Accelerator of the configuration that was launched, which shards."""
    start_again(sharded=True)
    # It shards on accelerators only, and would average here: processes of a CPU must pass as such
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    assert accelerator.is_fsdp2
    return accelerator


def loss_in_bfloat16(name: str, rows: slice) -> float:
    """Of the images of all processes, after one step."""
    accelerator = make_sharding_accelerator("bf16")
    model = STEPS[name].make_model().float()
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    accelerator.backward(STEPS[name].loss(model, 0, rows))
    optimizer.step()
    return accelerator.reduce(STEPS[name].loss(model, 0, rows).detach(), "mean").item()


def make_grain_model(seed: int = 0) -> D2iTGrainModel:
    torch.manual_seed(seed)
    return D2iTGrainModel(**load_preset("grain-tiny"))


def save_and_resume(output_dir: Path) -> dict[str, bool]:
    """Save a run whose weights are sharded, resume it in another one, and go on with both; what held, by name."""
    accelerator = Accelerator(cpu=True)
    run = SmallRun(accelerator, output_dir, make_grain_model())
    for step in range(NUM_STEPS):
        run.update(step)
    run.save(NUM_STEPS)
    other = SmallRun(accelerator, output_dir, make_grain_model(seed=1))
    resumed = other.checkpoints.resume(output_dir / f"checkpoint-{NUM_STEPS}")
    came_back = all(map(torch.equal, run.tensors(), other.tensors()))
    for one in (run, other):
        one.update(NUM_STEPS)
    return {
        "sharded": is_sharded(run.model) and is_sharded(other.model),
        "came_back": came_back and resumed == NUM_STEPS,
        "goes_on": all(map(torch.equal, run.tensors(), other.tensors())),
    }


def main(output: Path) -> None:
    start_again(sharded=False)
    accelerator = Accelerator(cpu=True)
    num_rows = BATCH // accelerator.num_processes
    rows = slice(accelerator.process_index * num_rows, (accelerator.process_index + 1) * num_rows)

    def save(name: str, how: str, results: dict[str, torch.Tensor]) -> None:
        save_file(results, output / f"{name}-{how}-{accelerator.process_index}.safetensors")

    for name in STEPS:
        save(name, "averaged", train_prepared(accelerator, name, rows))
    losses = {}
    for name in SHARDED:
        save(name, "sharded", train_prepared(make_sharding_accelerator("no"), name, rows))
        losses[name] = loss_in_bfloat16(name, rows)
    start_again(sharded=False)
    checkpoints = save_and_resume(output / "checkpoints")
    facts = {"num_processes": accelerator.num_processes, "losses": losses, "checkpoints": checkpoints}
    (output / f"{accelerator.process_index}.json").write_text(json.dumps(facts))
    accelerator.end_training()
