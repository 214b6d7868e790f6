# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A run of a few updates whose state is all that a training has, without a script; numbers for one without a state."""

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusers_d2it import D2iTGrainModel
from diffusers_d2it.training import Checkpoints, FiniteGate


class Numbers(torch.utils.data.Dataset):
    """0 to 7."""

    seed = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(float(place[1]))}


class SmallRun:
    """A model with optimizer, schedule and average, and updates by gradients that were drawn.

    Args:
        accelerator: with as many processes as weights are to be spread over.
        output_dir: of its checkpoints.
        model: a grain model.
        **kwargs: of `Checkpoints`.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, model: D2iTGrainModel, **kwargs):
        self.model = model
        if accelerator.num_processes > 1:
            mesh = init_device_mesh("cpu", (accelerator.num_processes,))
            for block in self.model.transformer_blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.ema = EMAModel(self.model.parameters(), decay=0.9, foreach=True)
        self.gate = FiniteGate(accelerator)
        state = (self.model, self.ema, {"optimizer": self.optimizer}, self.schedule, self.gate)
        self.checkpoints = Checkpoints(accelerator, output_dir, *state, **kwargs)

    def update(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.model.parameters())

    def save(self, step: int) -> None:
        """Save a checkpoint, and wait until it stands."""
        self.checkpoints.save(step)
        self.checkpoints.finish()

    def tensors(self) -> list[torch.Tensor]:
        """Weights, average and moments, as this process holds them."""
        moments = [value for p in self.model.parameters() for _, value in sorted(self.optimizer.state[p].items())]
        found = [*self.model.parameters(), *self.ema.shadow_params, *moments]
        return [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone() for tensor in found]
