# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Between its steps the pipeline neither waits for the device nor compiles, as benchmarks/between_steps.py counts."""

import sys
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from between_steps import (  # noqa: E402
    SCHEDULERS,
    count_graphs,
    different_maps,
    host_traffic,
    make_scheduler,
    move_to_meta,
)


COPIES_ITSELF = {"UniPCMultistepScheduler"}  # diffusers sends its coefficients to the device and solves for them there


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def before_each_forward(pipe, act) -> None:
    """Let `act` do something with the latents before they go into the denoiser."""

    def hook(module, inputs) -> None:
        act(inputs[0])

    pipe.transformer.register_forward_pre_hook(hook)


def random_map(num_grains: int = 2, batch_size: int = 2) -> torch.Tensor:
    return torch.randint(num_grains, (batch_size, 4, 4), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# Host traffic
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_waits_for_the_device(make_pipeline, name):
    grain_map = random_map()
    pipe = move_to_meta(make_pipeline(scheduler=make_scheduler(name)), grain_map)
    of_loop, of_scheduler = host_traffic(pipe, grain_map)
    assert of_loop == []
    assert of_scheduler == [] or name in COPIES_ITSELF


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.3, 0.7)},
        {"guidance_power": 2.0},
    ],
)
def test_no_kind_of_guidance_waits_for_the_device(make_pipeline, options):
    grain_map = random_map()
    pipe = move_to_meta(make_pipeline(), grain_map)
    assert host_traffic(pipe, grain_map, **options) == ([], [])


@pytest.mark.parametrize("num_grains, num_classes, batch_size", [(3, 10, 2), (2, None, 1)])
def test_no_kind_of_model_waits_for_the_device(make_pipeline, num_grains, num_classes, batch_size):
    grain_map = random_map(num_grains, batch_size)
    pipe = move_to_meta(make_pipeline(num_grains, num_classes), grain_map)
    assert host_traffic(pipe, grain_map) == ([], [])


@pytest.mark.parametrize(
    "traffic",
    [
        lambda latents: torch.zeros(()).to(latents.device),
        lambda latents: torch.tensor(0.5, device=latents.device),
        lambda latents: latents.new_empty(2).copy_(torch.zeros(2)),
        lambda latents: latents[torch.tensor([0, 1])],
        lambda latents: torch.linalg.solve(latents, latents),
    ],
)
def test_traffic_is_noticed(make_pipeline, traffic):
    grain_map = random_map()
    pipe = move_to_meta(make_pipeline(), grain_map)
    before_each_forward(pipe, traffic)
    assert len(host_traffic(pipe, grain_map, num_inference_steps=4)[0]) == 3


def test_reading_a_value_is_noticed(make_pipeline):
    grain_map = random_map()
    pipe = move_to_meta(make_pipeline(), grain_map)
    before_each_forward(pipe, lambda latents: latents.amax().item())
    with pytest.raises(RuntimeError, match="meta"):
        host_traffic(pipe, grain_map)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_grains", [2, 3])
def test_graphs_of_the_first_two_maps_serve_all(make_pipeline, fresh_compiler, num_grains):
    pipe = make_pipeline(num_grains)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    grain_maps = [(num_grains - 1) * grain_map for grain_map in different_maps(20, (2, 4, 4))]
    graphs = count_graphs(pipe, grain_maps, num_inference_steps=3)
    assert graphs[0][0] >= 2  # they have been compiled, in the first step
    assert all(call == [call[-1]] * 3 for call in graphs)
    assert graphs[1][-1] == graphs[-1][-1]


def test_a_guidance_interval_compiles_in_the_first_call_alone(make_pipeline, fresh_compiler):
    pipe = make_pipeline()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    grain_maps = different_maps(5, (2, 4, 4))
    graphs = count_graphs(pipe, grain_maps, num_inference_steps=4, guidance_interval=(0.25, 0.75))
    assert all(call == [graphs[0][-1]] * 4 for call in graphs[1:])
