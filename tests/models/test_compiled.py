# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Compiled models and blocks: the function of the plain ones, and one graph for all maps and numbers of tokens."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers.utils import is_torch_version
from grain_maps import random_latents
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_d2it import D2iTContentModel, DCDiTModel
from diffusers_d2it.grains import tie
from diffusers_d2it.models.refine_net import pack_levels


pytestmark = pytest.mark.usefixtures("fresh_compiler")
COMPILED = pytest.mark.parametrize("compiled", ["blocks", "model"])


def compile(model: D2iTContentModel, compiled: str, **options) -> None:
    (model.compile if compiled == "model" else model.compile_repeated_blocks)(**options)


def inputs_for(grain_map: torch.Tensor, num_grains: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tied latents, timesteps, labels."""
    batch = torch.arange(len(grain_map))
    return tie(random_latents(grain_map, num_grains, 4), grain_map), batch * 100 + 100, batch


def maps(num_grains: int = 2, shape: tuple[int, int, int] = (2, 6, 5)) -> list[torch.Tensor]:
    """Maps of all shares: one grain only, one finest region, random ones."""
    single = torch.zeros(shape, dtype=torch.int64)
    single[0, 1, 1] = num_grains - 1
    constant = [torch.full(shape, grain) for grain in range(num_grains)]
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(3, 1, 1, 1, generator=generator)
    random = [(torch.rand(shape, generator=generator) < share).long() * (num_grains - 1) for share in shares]
    return [*random, single, *constant]


# ---- Rounded layouts ----


@pytest.mark.parametrize("num_grains, window_size", [(2, 4), (2, 2), (3, 4), (3, 8)])
def test_a_rounded_layout_is_the_same_function(make_content_model, num_grains, window_size):
    model = make_content_model(num_grains, window_size=window_size)
    for grain_map in maps(num_grains):
        latents, timesteps, labels = inputs_for(grain_map, num_grains)
        outputs, gradients = [], []
        for rounded in (False, True):
            levels = pack_levels(grain_map, num_grains, window_size, rounded)
            layout = replace(model.prepare_grain_map(grain_map), levels=levels)
            model.zero_grad()
            output = model(latents, timesteps, layout, labels).sample
            output.square().mean().backward()
            outputs.append(output.detach())
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
        for exact, same in zip(*gradients):
            torch.testing.assert_close(exact, same, atol=1e-6, rtol=1e-4)


def test_rounding_adds_less_than_a_sixteenth():
    # Four lists, each by less than a 64th of all windows
    for grain_map in maps(shape=(8, 16, 16)):
        exact, rounded = (pack_levels(grain_map, 2, 4, r)[0] for r in (False, True))
        assert rounded.rounded and len(rounded.groups) == 4
        added = len(rounded.tokens) - len(exact.tokens)
        assert 0 <= added <= 4 * grain_map.numel() / 16
        nowhere = rounded.tokens == 4 * grain_map.numel()
        assert nowhere.sum() == added
        assert torch.equal(rounded.tokens[~nowhere].sort().values, exact.tokens.sort().values)
    assert not pack_levels(maps()[0], 2, 8, rounded=True)[0].rounded  # large windows are not


# ---- Compiled blocks ----


@pytest.mark.parametrize("num_grains, train", [(3, False), (2, True)])
@COMPILED
def test_one_graph_serves_every_map(make_content_model, compiled, num_grains, train):
    model, plain = (make_content_model(num_grains, num_layers=1) for _ in range(2))
    assert not model.prepare_grain_map(maps(num_grains)[0]).levels[0].rounded  # for compiled ones only
    counter = CompileCounterWithBackend("aot_eager" if train else "eager")
    compile(model, compiled, backend=counter, fullgraph=True)
    assert model.prepare_grain_map(maps(num_grains)[0]).levels[0].rounded
    with torch.set_grad_enabled(train):
        for grain_map in maps(num_grains):
            latents, timesteps, labels = inputs_for(grain_map, num_grains)
            output = model(latents, timesteps, model.prepare_grain_map(grain_map), labels).sample
            expected = plain(latents, timesteps, grain_map, labels).sample
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
            if train:
                output.square().mean().backward()
    # The whole model, or DiTBlock and the RefineBlock of every level
    assert counter.frame_count == (1 if compiled == "model" else num_grains)


def test_a_compiler_gives_the_same_numbers(make_content_model):
    model, plain = make_content_model(), make_content_model()
    model.compile_repeated_blocks(fullgraph=True)
    with torch.no_grad():
        for grain_map in maps()[:2]:
            latents, timesteps, labels = inputs_for(grain_map)
            output = model(latents, timesteps, grain_map, labels).sample
            expected = plain(latents, timesteps, grain_map, labels).sample
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


# ---- A number of tokens that changes ----


BUDGETS = [1.0, 0.5, torch.tensor([0.3, 1.0, 0.02]), torch.tensor([1.0, 0.9, 1.0]), 0.01, 0.2]


def chunked(make_dcdit, train: bool, **config) -> tuple[DCDiTModel, DCDiTModel]:
    """A model whose router keeps most cells, and a copy."""
    model = make_dcdit(**config)
    with torch.no_grad():
        model.boundary_router.score.weight.mul_(60)
        model.boundary_router.score.bias.zero_()
    return model.train(train), copy.deepcopy(model)


def check_chunked(model: DCDiTModel, plain: DCDiTModel, train: bool, budgets: list) -> None:
    """Noise, and gradients where it trains, of the same cells."""
    generator = torch.Generator().manual_seed(0)
    with torch.set_grad_enabled(train):
        for budget in budgets:
            latents = torch.randn(3, 4, 8, 6, generator=generator)
            arguments = latents, torch.tensor([999, 500, 3]), torch.tensor([0, 7, 10])
            output, expected = (net(*arguments, budget=budget) for net in (model, plain))
            assert output.kept.equal(expected.kept)
            torch.testing.assert_close(output.sample, expected.sample, atol=1e-5, rtol=1e-5)
            if train:
                for net, found in ((model, output), (plain, expected)):
                    net.zero_grad()
                    (found.sample.square().mean() + found.boundary_probability.mean()).backward()
                for ours, theirs in zip(model.parameters(), plain.parameters()):
                    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_one_graph_of_a_block_serves_every_number_of_tokens(make_dcdit, train):
    model, plain = chunked(make_dcdit, train, num_layers=3)
    counter = CompileCounterWithBackend("aot_eager" if train else "eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    check_chunked(model, plain, train, BUDGETS)
    assert counter.frame_count == 1


def test_a_compiled_model_that_chunks_is_the_same_function(make_dcdit):
    """It breaks where the number of tokens is read, and what follows is one graph for all of them."""
    model, plain = chunked(make_dcdit, True, num_layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    check_chunked(model, plain, True, BUDGETS)
    before = counter.frame_count
    check_chunked(model, plain, True, [0.4, 0.7, torch.tensor([0.1, 0.2, 0.3])])
    assert counter.frame_count == before


# ---- Pictures, and errors ----


@pytest.mark.skipif(is_torch_version("<", "2.13"), reason="an earlier torch cannot")
def test_one_graph_encodes_pictures_of_every_size(make_vae, fresh_compiler):
    vae, counter = make_vae(), CompileCounterWithBackend("eager")
    encode = torch.compile(vae.encode, fullgraph=True, dynamic=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    for height, width in ((48, 32), (64, 80), (32, 32)):  # of a square first, one graph would be of squares
        pixels = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
        found, expected = encode(pixels), vae.encode(pixels)
        assert torch.equal(found.grain_map, expected.grain_map)
        assert torch.equal(found.latent_dist.mode(), expected.latent_dist.mode())
    assert counter.frame_count == 1


@COMPILED
def test_a_failing_compiler_is_an_error_with_its_cause(make_content_model, compiled):
    def fails(graph, example_inputs):
        raise RuntimeError("no such instruction")

    model, grain_map = make_content_model(), maps()[0]
    compile(model, compiled, backend=fails)
    latents, timesteps, labels = inputs_for(grain_map)
    with torch.no_grad(), pytest.raises(TorchDynamoException, match="no such instruction"):
        model(latents, timesteps, grain_map, labels)


@COMPILED
def test_errors_of_the_caller_stay_errors(make_content_model, compiled):
    model, grain_map = make_content_model(), maps()[0]
    compile(model, compiled, backend="eager")
    latents, timesteps, labels = inputs_for(grain_map)
    layout = model.prepare_grain_map(grain_map)
    with pytest.raises(ValueError, match="class_labels"):
        model(latents, timesteps, layout, labels[:1])
    with pytest.raises(RuntimeError, match="dtype|type"):
        model(latents.double(), timesteps, layout, labels)
