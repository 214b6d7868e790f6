# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Whole graphs: torch.export, AOTInductor, ONNX and torch.compile of all networks give what plain ones give."""

import io
import shutil
from collections.abc import Callable

import pytest
import torch
from grain_maps import random_latents, random_map
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from diffusers_d2it.grains import tie
from diffusers_d2it.limits import can_be_read


pytestmark = pytest.mark.usefixtures("fresh_compiler")
Inputs = tuple[torch.Tensor | None, ...]
LABELS = torch.tensor([1, 10])
TIMESTEPS = torch.tensor([100.0, 900.0])


class Encode(nn.Module):
    """What a graph can be made of: a module with tensors in and out."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, grain_map: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        posterior, grain_map, entropy = self.vae.encode(pixels, grain_map, return_dict=False)
        return posterior.mode(), posterior.kl(), grain_map, entropy


class Decode(Encode):
    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents, return_dict=False)


def content_inputs(num_grains: int = 2, shape: tuple[int, int, int] = (2, 4, 4)) -> list[Inputs]:
    """Two random maps, those of a single grain, and one with one fine region."""
    single = torch.zeros(shape, dtype=torch.int64)
    single[0, 1, 1] = num_grains - 1
    constant = [torch.full(shape, grain) for grain in range(num_grains)]
    maps = [random_map(num_grains, shape, seed) for seed in (0, 1)] + [single, *constant]
    return [(tie(random_latents(one, num_grains, 4), one), TIMESTEPS, one, LABELS) for one in maps]


@pytest.fixture(params=["content-3", "content-8", "grain", "grain-ratio", "encode", "encode-map", "decode"])
def network(request, make_content_model, make_grain_model, make_vae, load_photos) -> tuple[nn.Module, list[Inputs]]:
    """A network and inputs of the same shapes that differ in all else."""
    name, _, kind = request.param.partition("-")
    generator = torch.Generator().manual_seed(0)
    if name == "content":
        num_grains, shape = (3, (2, 2, 3)) if kind == "3" else (2, (2, 3, 5) if kind == "8" else (2, 4, 4))
        model = make_content_model(num_grains, num_layers=1, window_size=8 if kind == "8" else 4)
        return model, content_inputs(num_grains, shape)
    if name == "grain":
        ratios = [torch.tensor([0.2, torch.nan]), torch.tensor([torch.nan, 1.0])] if kind else [None, None]
        states = torch.randn(2, 2, 2, 3, 4, generator=generator)
        return make_grain_model(num_layers=1), [(z, TIMESTEPS, LABELS, r) for z, r in zip(states, ratios)]
    photos = load_photos(32)[:4].view(2, 2, 3, 32, 32)
    if name == "decode":
        return Decode(make_vae()), [(z,) for z in torch.randn(2, 2, 4, 8, 8, generator=generator)]
    maps = [random_map(2, (2, 4, 4), seed) for seed in (0, 1)]
    return Encode(make_vae()), list(zip(photos, maps)) if kind else [(x,) for x in photos]


def assert_same(found: Callable, model: nn.Module, inputs: list[Inputs], atol: float = 1e-6) -> None:
    for one in inputs:
        pairs = zip(tree_leaves(found(*one)), tree_leaves(model(*one)), strict=True)
        for output, expected in pairs:
            torch.testing.assert_close(output, expected, atol=atol, rtol=atol)


def batches(inputs: Inputs) -> tuple:
    batch = torch.export.Dim("batch", max=32)
    return tuple(None if x is None else {0: batch} for x in inputs)


@torch.no_grad()
def test_an_exported_network_is_the_plain_one(network):
    model, inputs = network
    exported = torch.export.export(model, inputs[0], dynamic_shapes=batches(inputs[0]))
    image = tuple(None if x is None else x[:1] for x in inputs[1])
    assert_same(exported.module(), model, [*inputs, image])


@pytest.mark.parametrize("network", ["content", "grain-ratio", "encode", "decode"], indirect=True)
def test_a_compiled_network_is_one_graph_with_the_gradients_of_the_plain_one(network):
    model, inputs = network
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for one in inputs:
        results = []
        for run in (compiled, model):
            outputs = tree_leaves(run(*one))
            loss = sum(x.square().mean() for x in outputs if x.requires_grad)
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            results.append([*outputs, *gradients])
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)
    assert counter.frame_count == 1


@torch.no_grad()
def test_an_exported_network_takes_a_prepared_layout(make_content_model):
    model = make_content_model(3, num_layers=1)
    latents, timesteps, grain_map, labels = content_inputs(3)[0]
    inputs = (latents, timesteps, model.prepare_grain_map(grain_map), labels)
    exported = torch.export.export(model, inputs).module()
    assert_same(exported, model, [inputs, (-latents, timesteps + 1, *inputs[2:])])


@torch.no_grad()
def test_onnx_is_the_plain_network(network):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = network
    file = io.BytesIO()
    torch.onnx.export(model, inputs[0], dynamo=True, dynamic_shapes=batches(inputs[0]), verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: torch.Tensor | None) -> list[torch.Tensor]:
        given = (x.numpy() for x in inputs if x is not None)
        return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, given, strict=True)))]

    image = tuple(None if x is None else x[:1] for x in inputs[1])
    assert_same(run, model, [*inputs, image], atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@torch.no_grad()
def test_a_package_compiled_ahead_of_time_is_the_plain_network(make_grain_model, tmp_path):
    model = make_grain_model(num_layers=1)
    inputs = (torch.randn(2, 2, 2, 3), TIMESTEPS, LABELS)
    exported = torch.export.export(model, inputs)
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "grain.pt2"))
    assert_same(
        torch._inductor.aoti_load_package(path), model, [inputs, (-inputs[0], TIMESTEPS + 1, LABELS - 1)], 1e-5
    )


# ---- Values are looked at where that costs nothing ----


def test_values_are_read_on_the_cpu_and_outside_graphs_only():
    tensor, seen = torch.zeros(2), []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(can_be_read(x))
        return x + (1 if can_be_read(x) else 2)

    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return look(x)

    assert can_be_read(tensor) and can_be_read(nn.Parameter(tensor))
    assert not can_be_read(tensor.to("meta"))
    with FakeTensorMode() as fake:
        assert not can_be_read(fake.from_tensor(tensor))
    assert torch.equal(torch.compile(look, backend="eager")(tensor), tensor + 2)
    seen.clear()
    torch.vmap(look)(tensor)
    torch.jit.trace(look, tensor, check_trace=False)
    torch.export.export(Look(), (tensor,))
    assert seen == [False] * len(seen) and len(seen) >= 3


@torch.no_grad()
def test_no_network_reads_values_that_are_not_there(network):
    model, (inputs, *_) = network
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # reading is an error here, and on the meta device
        model(*tree_map_only(torch.Tensor, fake.from_tensor, inputs))
    model(*inputs)  # nothing that was kept is fake


@pytest.mark.parametrize("network", ["content-3", "grain-ratio", "decode"], indirect=True)
@torch.no_grad()
def test_no_step_reads_values_from_another_device(network):
    model, (inputs, *_) = network
    if hasattr(model, "prepare_grain_map"):  # how many tokens are packed is read from the map, once for all steps
        inputs = (*inputs[:2], model.prepare_grain_map(inputs[2]), inputs[3])  # which is moved by itself
    outputs = model.to("meta")(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs))
    assert all(x.is_meta for x in tree_leaves(outputs))


# ---- The autoencoder compiled as diffusers' models are ----


def test_a_compiled_autoencoder_compiles_what_pipelines_call(make_vae, load_photos):
    vae, plain = make_vae(), make_vae()
    counter = CompileCounterWithBackend("aot_eager")
    vae.compile(backend=counter, fullgraph=True)
    photos = load_photos(32)[:2]
    results = []
    for one in (vae, plain):
        posterior = one.encode(photos).latent_dist
        frames = [counter.frame_count]
        pixels = one.decode(posterior.mode()).sample
        frames.append(counter.frame_count)
        gradients = torch.autograd.grad(pixels.square().mean() + posterior.kl().mean(), list(one.parameters()))
        results.append((posterior.mode(), pixels, *gradients))
        if one is vae:
            assert 0 < frames[0] < frames[1]
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert vae.state_dict().keys() == plain.state_dict().keys()
