# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A bad update changes nothing: not a weight, not a moment, not the average."""

import math

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_d2it.training import FiniteGate


class Run:
    """A linear model, its optimizer and its average, and one update as the training scripts do it."""

    def __init__(self, skip_nonfinite_steps: int = 0, scale: float | None = None):
        self.accelerator = Accelerator(cpu=True)
        if scale is not None:  # as under float16, which accelerate leaves to GPUs
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema = EMAModel(self.model.parameters(), decay=0.9, foreach=True)
        self.gate = FiniteGate(self.accelerator, skip_nonfinite_steps)

    def update(self, factor: float = 1.0, constant: float = 0.0) -> torch.Tensor:
        """One update. Returns the norm of its gradients before they were clipped."""
        loss = self.model(torch.ones(4, 3)).square().mean() * factor + constant
        self.accelerator.backward(self.gate.watch(loss))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.gate.lets_through(norm):
            self.optimizer.step()
            self.ema.step(self.model.parameters())
        self.optimizer.zero_grad()
        return norm

    def state(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.ema.shadow_params, *moments]
        return [tensor.detach().clone() for tensor in tensors] + [torch.tensor(self.ema.optimization_step)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(left, right) for left, right in zip(a, b))


BAD = [{"factor": math.nan}, {"factor": math.inf}, {"constant": math.inf}, {"constant": math.nan}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_update_changes_nothing_and_the_next_one_goes_on_until_too_many_were_left_out(bad):
    run, undisturbed = Run(skip_nonfinite_steps=2), Run()
    for one in (run, undisturbed):
        one.update()
    before = run.state()
    run.update(**bad)
    assert same(run.state(), before)
    for one in (run, undisturbed):
        one.update()
    assert same(run.state(), undisturbed.state())
    run.update(**bad)
    assert run.gate.num_skipped_steps == 2
    before = run.state()
    with pytest.raises(FloatingPointError, match="loss.*(nan|inf).*weight.*`skip_nonfinite_steps`"):
        run.update(**bad)
    assert same(run.state(), before)


@pytest.fixture
def float16_run():
    run = Run(scale=4.0)
    yield run
    run.accelerator.state._mixed_precision = "no"  # shared by all Accelerators of a process


def test_a_loss_scaler_may_overflow_until_it_has_no_scale_left(float16_run):
    run = float16_run
    run.update()
    before = run.state()
    run.update(factor=math.inf)
    assert same(run.state(), before) and run.accelerator.scaler.get_scale() == 2.0
    run.update()
    assert not same(run.state(), before) and run.gate.num_skipped_steps == 0
    before = run.state()
    with pytest.raises(FloatingPointError, match="nan"):
        for _ in range(4):
            run.update(factor=math.nan)
    assert same(run.state(), before) and run.accelerator.scaler.get_scale() == 0.5


def test_the_gate_changes_no_bit_of_a_good_update():
    run, plain = Run(), torch.nn.Linear(3, 2)
    plain.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        norm = run.update()
        plain(torch.ones(4, 3)).square().mean().backward()
        assert norm == torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert same([*run.model.parameters()], [*plain.parameters()])


def test_a_negative_number_is_named():
    with pytest.raises(ValueError, match="`skip_nonfinite_steps`.*-1"):
        FiniteGate(Accelerator(cpu=True), -1)
