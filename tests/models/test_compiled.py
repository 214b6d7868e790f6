# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Compiled models and blocks, rounded layouts: the function of the plain ones, one graph for all maps, a way back."""

import logging

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_d2it import D2iTContentModel
from diffusers_d2it.grain_layout import GrainLayout
from diffusers_d2it.grains import tie
from diffusers_d2it.models import fallbacks


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    fallbacks.warn_once.cache_clear()
    yield
    torch._dynamo.reset()


def inputs_for(grain_map: torch.Tensor, cells: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tied latents, timesteps, labels."""
    generator = torch.Generator().manual_seed(0)
    batch, height, width = grain_map.shape
    latents = torch.randn(batch, 4, height * cells, width * cells, generator=generator)
    return tie(latents, grain_map), torch.arange(batch) * 100 + 100, torch.arange(batch)


def maps(num_grains: int = 2, shape: tuple[int, int, int] = (2, 6, 5)) -> list[torch.Tensor]:
    """Maps of all shares: one grain only, one finest region, random ones."""
    single = torch.zeros(shape, dtype=torch.int64)
    single[0, 1, 1] = num_grains - 1
    constant = [torch.full(shape, grain) for grain in range(num_grains)]
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(4, 1, 1, 1, generator=generator)
    random = [(torch.rand(shape, generator=generator) < share).long() * (num_grains - 1) for share in shares]
    return [single, *constant, *random]


# ---------------------------------------------------------------------------------------------------------------------
# Rounded layouts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_grains, window_size", [(2, 4), (2, 2), (3, 4), (3, 8)])
def test_a_rounded_layout_is_the_same_function(make_content_model, num_grains, window_size):
    model = make_content_model(num_grains, window_size=window_size)
    for grain_map in maps(num_grains):
        latents, timesteps, labels = inputs_for(grain_map, model.patch_size)
        outputs, gradients = [], []
        for rounded in (False, True):
            layout = GrainLayout.from_grain_map(grain_map, num_grains, window_size, rounded)
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
        exact, rounded = (GrainLayout.from_grain_map(grain_map, 2, 4, r).levels[0] for r in (False, True))
        assert rounded.rounded and len(rounded.groups) == 4
        added = len(rounded.tokens) - len(exact.tokens)
        assert 0 <= added <= 4 * grain_map.numel() / 16
        nowhere = rounded.tokens == 4 * grain_map.numel()
        assert nowhere.sum() == added
        assert torch.equal(rounded.tokens[~nowhere].sort().values, exact.tokens.sort().values)


def test_large_windows_are_not_rounded():
    layout = GrainLayout.from_grain_map(maps()[5], 2, 8, rounded=True)
    assert not layout.levels[0].rounded


# ---------------------------------------------------------------------------------------------------------------------
# Compiled blocks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_grains, train", [(2, False), (3, False), (2, True)])
@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_one_graph_serves_every_map(make_content_model, compiled, num_grains, train):
    model = make_content_model(num_grains, num_layers=1)
    counter = CompileCounterWithBackend("aot_eager" if train else "eager")
    (model.compile if compiled == "model" else model.compile_repeated_blocks)(backend=counter, fullgraph=True)
    plain = make_content_model(num_grains, num_layers=1)
    with torch.set_grad_enabled(train), model.fused_blocks():
        for grain_map in maps(num_grains):
            latents, timesteps, labels = inputs_for(grain_map, model.patch_size)
            output = model(latents, timesteps, model.prepare_grain_map(grain_map), labels).sample
            expected = plain(latents, timesteps, grain_map, labels).sample
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
            if train:
                output.square().mean().backward()
    # The whole model, or DiTBlock and the RefineBlock of every level
    assert counter.frame_count == (1 if compiled == "model" else num_grains)


@pytest.mark.parametrize("compiled", ["blocks", "model", "elsewhere"])
def test_graphs_see_that_weights_have_been_replaced(make_content_model, compiled):
    # Compiled blocks run fused, on copies of which they cannot see that the layers have other weights now
    model, plain = make_content_model(), make_content_model()
    if compiled == "blocks":
        model.compile_repeated_blocks(backend="eager")
    elif compiled == "model":
        model.compile(backend="eager")
    called = torch.compile(model, backend="eager") if compiled == "elsewhere" else model
    grain_map = maps()[5]
    latents, timesteps, labels = inputs_for(grain_map)
    layout = model.prepare_grain_map(grain_map)
    with torch.no_grad(), model.fused_blocks():
        before = called(latents, timesteps, layout, labels).sample
        assert model.fusion.is_fused == (compiled == "blocks")
        for change in (0.05, -0.02):
            for parameter in (*model.parameters(), *plain.parameters()):
                parameter.data = parameter.data + change
            output = called(latents, timesteps, layout, labels).sample
            expected = plain(latents, timesteps, grain_map, labels).sample
            torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
            assert not torch.allclose(output, before, atol=1e-3)


def test_a_compiler_gives_the_same_numbers(make_content_model):
    model, plain = make_content_model(), make_content_model()
    model.compile_repeated_blocks(fullgraph=True)
    with torch.no_grad(), model.fused_blocks():
        for grain_map in maps()[4:7]:
            latents, timesteps, labels = inputs_for(grain_map)
            output = model(latents, timesteps, grain_map, labels).sample
            torch.testing.assert_close(
                output, plain(latents, timesteps, grain_map, labels).sample, atol=1e-5, rtol=1e-5
            )


def test_layouts_are_rounded_for_compiled_blocks_only(make_content_model):
    model, grain_map = make_content_model(), maps()[5]
    assert not model.prepare_grain_map(grain_map).levels[0].rounded
    model.compile_repeated_blocks(backend="eager")
    assert model.prepare_grain_map(grain_map).levels[0].rounded
    assert model.prepare_guided_grain_map(grain_map).levels[0].rounded


# ---------------------------------------------------------------------------------------------------------------------
# The way back
# ---------------------------------------------------------------------------------------------------------------------


def fails(graph, example_inputs):
    raise RuntimeError("no such instruction on this machine")


def one_warning(caplog) -> str:
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "diffusers_d2it" in r.name]
    assert len(messages) == 1, messages
    return messages[0]


@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_a_failing_compiler_leaves_the_plain_model(make_content_model, caplog, compiled):
    model, plain = make_content_model(), make_content_model()
    (model.compile if compiled == "model" else model.compile_repeated_blocks)(backend=fails)
    for grain_map in maps()[4:6]:
        latents, timesteps, labels = inputs_for(grain_map)
        with torch.no_grad():
            output = model(latents, timesteps, model.prepare_grain_map(grain_map), labels).sample
            expected = plain(latents, timesteps, grain_map, labels).sample
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    message = one_warning(caplog)
    assert "D2iTContentModel" in message and "no such instruction on this machine" in message


@torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
def test_a_missing_compiler_leaves_the_plain_blocks(make_grain_model, caplog):
    model, plain = make_grain_model(), make_grain_model()
    model.compile_repeated_blocks()
    state = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(2):
            logits = model(state, 500, torch.arange(2)).logits
            torch.testing.assert_close(logits, plain(state, 500, torch.arange(2)).logits)
    assert "compiler" in one_warning(caplog)


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_shape_too_many_leaves_the_plain_blocks(make_content_model, caplog):
    model, plain = make_content_model(), make_content_model()
    model.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=False)
    for shape in ((1, 4, 4), (2, 4, 6), (3, 6, 4)):
        grain_map = maps(shape=shape)[5]
        latents, timesteps, labels = inputs_for(grain_map)
        with torch.no_grad():
            output = model(latents, timesteps, grain_map, labels).sample
            torch.testing.assert_close(output, plain(latents, timesteps, grain_map, labels).sample)
    assert "recompile limit" in one_warning(caplog)


@pytest.mark.parametrize("compiled", ["blocks", "model"])
def test_errors_of_the_caller_stay_errors(make_content_model, compiled, caplog):
    model = make_content_model()
    (model.compile if compiled == "model" else model.compile_repeated_blocks)(backend="eager", fullgraph=True)
    grain_map = maps()[5]
    latents, timesteps, labels = inputs_for(grain_map)
    layout = model.prepare_grain_map(grain_map)
    with pytest.raises(ValueError, match="class_labels"):
        model(latents, timesteps, layout, labels[:1])
    with pytest.raises(RuntimeError, match="dtype|type"):
        model(latents.double(), timesteps, layout, labels)
    assert not [record for record in caplog.records if "uncompiled" in record.getMessage()]


def test_a_model_that_came_back_is_as_if_never_compiled(make_content_model):
    model, grain_map = make_content_model(), maps()[5]
    model.compile_repeated_blocks(backend=fails)
    latents, timesteps, labels = inputs_for(grain_map)
    assert model.prepare_grain_map(grain_map).levels[0].rounded
    with torch.no_grad():
        model(latents, timesteps, grain_map, labels)
    assert not model.prepare_grain_map(grain_map).levels[0].rounded


def test_windows_too_large_to_be_rounded_are_named(make_content_model, caplog):
    model, grain_map = make_content_model(window_size=8), maps()[5]
    model.compile_repeated_blocks(backend="eager")
    assert not model.prepare_grain_map(grain_map).levels[0].rounded
    model.prepare_grain_map(grain_map)
    assert "windows of 8 tokens" in one_warning(caplog)


def test_a_map_on_another_device_is_moved_with_one_warning(make_content_model, caplog):
    model, grain_map = make_content_model(), maps()[5]
    layout = model.prepare_grain_map(grain_map)
    latents, timesteps, labels = inputs_for(grain_map)
    model = D2iTContentModel.from_config(model.config).to("meta")
    with torch.no_grad():
        for _ in range(2):
            output = model(latents.to("meta"), timesteps.to("meta"), layout, labels.to("meta")).sample
    assert output.shape == latents.shape and output.device.type == "meta"
    assert "`grain_map` is on cpu, `hidden_states` are on meta" in one_warning(caplog)
