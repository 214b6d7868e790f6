# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Two processes train as one does on the batches of both: averaged gradients, and sharded weights."""

import json
from functools import partial
from pathlib import Path

import distributed_steps
import pytest
import torch
from accelerate import Accelerator
from distributed_steps import BATCH, NUM_STEPS, SHARDED, STEPS, make_grain_model, make_optimizer
from safetensors.torch import load_file
from script_runs import together
from small_runs import SmallRun

from diffusers_d2it.files.folders import verify


EVERYTHING = slice(0, BATCH)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """The folder that two processes have written to."""
    output = tmp_path_factory.mktemp("two")
    together(partial(distributed_steps.main, output), sharded=True)
    return output


def one_process(name: str) -> dict[str, torch.Tensor]:
    """Gradients of the first step and weights after the last, of the same images in one process."""
    model = STEPS[name].make_model()
    return distributed_steps.train(STEPS[name], model, EVERYTHING, torch.Tensor.backward, make_optimizer(model))


@pytest.mark.parametrize(
    "name, how", [*((name, "averaged") for name in STEPS), *((name, "sharded") for name in SHARDED)]
)
def test_gradients_and_weights_are_those_of_one_process(launched, name, how):
    first, second = (load_file(launched / f"{name}-{how}-{process}.safetensors") for process in (0, 1))
    expected = one_process(name)
    # Not all have one: what a softmax or a normalisation cancels has none
    nonzero = [values.abs().max() > 1e-9 for key, values in expected.items() if key.startswith("gradient.")]
    assert sum(nonzero) >= 0.7 * len(nonzero)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_learn_in_bfloat16(launched, name):
    model = STEPS[name].make_model()
    optimizer = make_optimizer(model)
    before = STEPS[name].loss(model, 0, EVERYTHING)
    before.backward()
    optimizer.step()
    after = STEPS[name].loss(model, 0, EVERYTHING).item()
    for process in (0, 1):
        loss = json.loads((launched / f"{process}.json").read_text())["losses"][name]
        assert loss == pytest.approx(after, abs=0.1 * (before.item() - after))


def test_a_sharded_run_is_saved_whole_and_resumed(launched, tmp_path):
    for process in (0, 1):
        facts = json.loads((launched / f"{process}.json").read_text())
        assert facts["num_processes"] == 2
        assert facts["checkpoints"] == {"sharded": True, "came_back": True, "goes_on": True}
    alone = SmallRun(Accelerator(cpu=True), tmp_path, make_grain_model())
    for step in range(NUM_STEPS):
        alone.update(step)
    alone.save(NUM_STEPS)
    one, two = (folder / f"checkpoint-{NUM_STEPS}" for folder in (tmp_path, launched / "checkpoints"))
    verify(two)
    for file in one.rglob("*.safetensors"):
        torch.testing.assert_close(load_file(two / file.relative_to(one)), load_file(file), rtol=0, atol=0)
