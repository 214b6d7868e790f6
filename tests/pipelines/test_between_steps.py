# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Between its steps the pipeline neither waits for the device nor compiles, as benchmarks/between_steps.py counts.

For every scheduler, and for two grains, its smallest form does: tests/benchmarks.
"""

import pytest
import torch
from grain_maps import random_map
from script_runs import BENCHMARKS, importing_from


with importing_from(BENCHMARKS):
    from between_steps import count_graphs, different_maps, host_traffic, move_to_meta

# ---- Host traffic ----


@pytest.mark.parametrize(
    "num_grains, num_classes, options",
    [
        (2, 10, {"guidance_scale": 1.0}),
        (2, 10, {"guidance_interval": (0.3, 0.7)}),
        (2, 10, {"guidance_power": 2.0}),
        (3, 10, {}),
        (2, None, {}),
    ],
)
def test_no_kind_of_guidance_or_model_waits_for_the_device(make_pipeline, num_grains, num_classes, options):
    grain_map = random_map(num_grains, (1 if num_classes is None else 2, 4, 4))
    pipe = move_to_meta(make_pipeline(num_grains, num_classes), grain_map)
    assert host_traffic(pipe, grain_map, **options) == ([], [])


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
    grain_map = random_map(2, (2, 4, 4))
    pipe = move_to_meta(make_pipeline(), grain_map)
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: (traffic(inputs[0]), None)[1])
    assert len(host_traffic(pipe, grain_map, num_inference_steps=4)[0]) == 3


def test_reading_a_value_is_noticed(make_pipeline):
    pipe = move_to_meta(make_pipeline(), random_map(2, (2, 4, 4)))
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: (inputs[0].amax().item(), None)[1])
    with pytest.raises(RuntimeError, match="meta"):
        host_traffic(pipe, random_map(2, (2, 4, 4)))


# ---- Graphs ----


@pytest.mark.parametrize("num_grains, steps, options", [(3, 3, {}), (2, 4, {"guidance_interval": (0.25, 0.75)})])
def test_graphs_of_the_first_two_maps_serve_all(make_pipeline, fresh_compiler, num_grains, steps, options):
    pipe = make_pipeline(num_grains)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    grain_maps = [(num_grains - 1) * grain_map for grain_map in different_maps(10, (2, 4, 4))]
    graphs = count_graphs(pipe, grain_maps, num_inference_steps=steps, **options)
    assert graphs[0][0] >= (1 if options else 2)  # they have been compiled, in the first step
    assert all(call == [call[-1]] * steps for call in (graphs[1:] if options else graphs))
    assert graphs[1][-1] == graphs[-1][-1]
    if options:  # a guidance interval compiles in the first call alone
        assert graphs[0][-1] == graphs[1][-1]
