# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The moving average of a model's weights, the model that a training is for."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from .gate import GatedAccelerator


class WeightAverage(EMAModel):
    """diffusers' moving average, which stands still where the gate held an update back.

    It is made after `prepare`: under FSDP it is sharded as the weights are.

    Args:
        accelerator: the Accelerator with the gate.
        model: the trained model.
        decay: of the average, once it has warmed up.
    """

    def __init__(self, accelerator: GatedAccelerator, model: torch.nn.Module, decay: float):
        super().__init__(model.parameters(), decay=decay, foreach=True)
        self.accelerator = accelerator

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Move towards the weights after an update."""
        if not self.accelerator.take_held_back():
            super().step(parameters)


@contextmanager
def use_ema(ema: EMAModel, model: torch.nn.Module) -> Iterator[None]:
    """Run a block with the averaged weights in the model, and the trained ones back afterwards."""
    training = model.training
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        ema.restore(model.parameters())
        model.train(training)
