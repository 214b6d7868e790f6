# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A bad update changes nothing: not a weight, not a moment, not the average."""

import math

import pytest
import torch

from diffusers_d2it.training.averaging import WeightAverage
from diffusers_d2it.training.gate import GatedAccelerator


class Run:
    """A linear model, its optimizer and its average, and one update as the training scripts do it."""

    def __init__(self, max_skipped_steps: int = 0, scale: float | None = None):
        self.accelerator = GatedAccelerator(max_skipped_steps=max_skipped_steps, cpu=True)
        if scale is not None:  # as under float16, which accelerate leaves to GPUs
            self.accelerator.native_amp = True
            self.accelerator.state._mixed_precision = "fp16"
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema = WeightAverage(self.accelerator, self.model, decay=0.9)

    def update(self, factor: float = 1.0, constant: float = 0.0) -> None:
        loss = self.model(torch.ones(4, 3)).square().mean() * factor + constant
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())

    def state(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.ema.shadow_params, *moments]
        return [tensor.detach().clone() for tensor in tensors] + [torch.tensor(self.ema.optimization_step)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(left, right) for left, right in zip(a, b))


BAD = [{"factor": math.nan}, {"factor": math.inf}, {"constant": math.inf}, {"constant": math.nan}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_update_raises_and_changes_nothing(bad):
    run = Run()
    run.update()
    before = run.state()
    with pytest.raises(FloatingPointError, match="the loss is (nan|inf), the gradient's norm nan: .* such as weight"):
        run.update(**bad)
    assert same(run.state(), before)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_update_that_may_be_skipped_changes_nothing_and_the_next_one_goes_on(bad):
    run, undisturbed = Run(max_skipped_steps=2), Run()
    for one in (run, undisturbed):
        one.update()
    before = run.state()
    run.update(**bad)
    assert same(run.state(), before)
    for one in (run, undisturbed):
        one.update()
    assert same(run.state(), undisturbed.state())
    run.update(**bad)
    assert run.accelerator.num_skipped_steps == 2
    with pytest.raises(FloatingPointError, match="2 have been skipped before"):
        run.update(**bad)


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
    assert not same(run.state(), before) and run.accelerator.num_skipped_steps == 0
    before = run.state()
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        for _ in range(4):
            run.update(factor=math.nan)
    assert same(run.state(), before) and run.accelerator.scaler.get_scale() == 0.5


def test_the_gate_changes_no_bit_of_a_good_update():
    run, plain = Run(), torch.nn.Linear(3, 2)
    plain.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        run.update()
        plain(torch.ones(4, 3)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert run.accelerator.gradient_norm == norm.item()  # before it was clipped
    assert same([*run.model.parameters()], [*plain.parameters()])


def test_the_average_is_diffusers_own_where_nothing_is_skipped():
    from diffusers.training_utils import EMAModel

    run = Run()
    reference = EMAModel([parameter.clone() for parameter in run.model.parameters()], decay=0.9, foreach=True)
    for _ in range(3):
        run.update()
        reference.step(run.model.parameters())
    assert same(run.ema.shadow_params, reference.shadow_params)
