# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""DC-DiT as a whole, against the plain form of `plain_dcdit.py`, and the properties that it promises."""

from contextlib import nullcontext

import plain_dcdit
import pytest
import torch
from accelerate.utils import send_to_device
from diffusers.models.attention_dispatch import attention_backend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_d2it import DCDiTModel, load_preset
from diffusers_d2it.models.chunking import Chunks


PARAMETERS = {"dcdit-s": 34_367_241, "dcdit-b": 136_343_049, "dcdit-l": 468_563_977, "dcdit-xl": 688_409_865}
TINY = load_preset("dcdit-tiny")


def make(seed: int = 0, **changes) -> DCDiTModel:
    """A model none of whose weights is zero, that keeps about half of the cells."""
    torch.manual_seed(seed)
    model = DCDiTModel(**TINY | changes).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1 or not weight.any():
                weight.add_(0.2 * torch.randn_like(weight))
        score = getattr(model.boundary_router, "score", None)
        if score is not None:
            score.weight.mul_(4)
            score.bias.zero_()
    return model


def inputs(height: int = 8, width: int = 8, batch: int = 3) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    latents = torch.randn(batch, 4, height, width, dtype=torch.float64)
    return latents, torch.tensor([999, 500, 3])[:batch], torch.tensor([0, 7, 10])[:batch]


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_of_the_paper(name):
    with torch.device("meta"):
        model = DCDiTModel(**load_preset(name), out_channels=8)
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize(
    "changes, sides",
    [
        ({}, (8, 8)),
        ({"smoothing_sigma": 2.0, "out_channels": 8}, (5, 7)),
        ({"num_conv_layers": 1, "num_attention_heads": 3, "conv_reduction": 2, "norm_num_groups": 8}, (4, 9)),
        ({"conditioning_norm": True, "position_patch_size": 2}, (5, 7)),
    ],
)
def test_is_the_plain_form(changes, sides):
    """Noise, kept cells and every gradient, in float64."""
    model, given, budgets = make(**changes), inputs(*sides), [0.5, 1.0, 0.1]
    output = model(*given, budget=torch.tensor(budgets))
    noise, probability, kept = plain_dcdit.forward(model, *given, budgets)
    assert output.kept.equal(kept) and 3 < kept.sum() < kept.numel()
    # The sinusoids of the timestep and of the positions are of float32
    torch.testing.assert_close(output.sample, noise, atol=2e-5, rtol=1e-5)
    weight = torch.randn_like(noise)
    gradients = [
        torch.autograd.grad((weight * sample).sum() + p.double().square().sum(), list(model.parameters()))
        for sample, p in ((output.sample, output.boundary_probability), (noise, probability))
    ]
    for (name, parameter), ours, plain in zip(model.named_parameters(), *gradients):
        scale = plain.abs().max().clamp(min=1e-3)
        assert (ours - plain).abs().max() < 3e-4 * scale, name
        assert parameter.ndim == 1 or ours.any(), name


@pytest.mark.parametrize("router", ["predictability", "cosine"])
def test_an_image_is_the_same_alone(router):
    model, (latents, timesteps, labels) = make(router=router), inputs()
    budgets = torch.tensor([1.0, 0.3, 0.7])
    together = model(latents, timesteps, labels, budget=budgets)
    for i in range(3):
        part = slice(i, i + 1)
        alone = model(latents[part], timesteps[part], labels[part], budget=budgets[i].item())
        assert alone.kept.equal(together.kept[part])
        torch.testing.assert_close(alone.sample, together.sample[part], atol=1e-6, rtol=1e-6)


def test_a_smaller_budget_keeps_a_part():
    model, given = make(), inputs()
    kept = [model(*given, budget=budget).kept for budget in (0.01, 0.2, 0.5, 0.9, 1.0)]
    for fewer, more in zip(kept, kept[1:]):
        assert (fewer <= more).all() and fewer.sum() < more.sum()
    assert kept[0].flatten(1).sum(dim=1).tolist() == [1, 1, 1]


def test_a_new_model_predicts_nothing_and_a_router_learns():
    torch.manual_seed(0)
    model, (latents, timesteps, labels) = DCDiTModel(**TINY), inputs()
    output = model(latents.float(), timesteps, labels)
    assert not output.sample.any() and output.kept.float().mean() < 0.25
    assert output.kept[:, 0, 0].all() and output.kept[:, -1, -1].all()
    output.boundary_probability.mean().backward()
    assert model.boundary_router.score.weight.grad.any()


def test_autocast_keeps_router_and_dechunking_in_float32():
    model, (latents, timesteps, labels) = make().float(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(latents.float(), timesteps, labels)
    exact = model(latents.float(), timesteps, labels)
    assert output.boundary_probability.dtype == torch.float32
    assert (output.kept == exact.kept).float().mean() > 0.9
    assert (output.sample - exact.sample).abs().mean() < 0.1 * exact.sample.abs().mean()


class Waits(TorchFunctionMode):
    """Notes what an accelerator is waited for: values of tensors that become Python's or shapes, and the way there."""

    NAMES = {"tolist", "numpy", "cpu", "__array__", "tensor"}  # beside what operators do, as for item() and bool()

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.operators = _OperatorWaits(self.found)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.found.append(func.__name__)
        with self.operators:
            return func(*args, **kwargs or {})


class _OperatorWaits(TorchDispatchMode):
    OF_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = bool(self.OF_VALUES & set(func.tags))
        if func is torch.ops.aten.index.Tensor:  # reads masks only
            reads = any(index is not None and index.dtype == torch.bool for index in args[1])
        if reads:
            self.found.append(str(func))
        return func(*args, **kwargs or {})


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "native"])
def test_the_device_is_waited_for_once(backend):
    """For the lengths. Values of arguments are looked at where that costs nothing, on a CPU: here there are none."""
    model, (latents, timesteps, _) = make(num_classes=None), inputs()
    if backend is not None:
        model.set_attention_backend(backend)
    for number in (1.0, 0.3):
        with Waits() as waits:
            model(latents, timesteps, budget=number)
        assert waits.found == ["tolist"]
    with Waits() as waits:
        latents[latents > 0].sum().item()
        bool(torch.tensor(1).any())
    assert len(waits.found) == 4


@torch.no_grad()
@pytest.mark.parametrize("chosen", ["model", "context"])
def test_a_backend_that_takes_no_mask(chosen):
    model, given = make().float(), inputs()
    given = given[0].float(), *given[1:]
    expected = model(*given).sample
    if chosen == "model":
        model.set_attention_backend("_native_flash")
    with attention_backend("_native_flash") if chosen == "context" else nullcontext():
        torch.testing.assert_close(model(*given).sample, expected)


def test_layers_may_lie_on_several_devices():
    """What a block is given moves with it, as `accelerate` moves what is on another device than a block."""
    chunks = Chunks.of(torch.rand(2, 8, 8) > 0.5)
    moved = send_to_device(chunks, "meta")
    tensors = [name for name, value in vars(chunks).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6 and all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert moved.lengths == chunks.lengths and chunks.cells.device.type == "cpu" and chunks.to() is chunks


def test_weights_of_eight_bits_pass_gradients_on():
    """To adapters over them: what computes is cast back after a pass, but the graph of a convolution keeps it."""
    model, (latents, *given) = make().bfloat16(), inputs()
    model.requires_grad_(False).enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    latents = latents.bfloat16().requires_grad_()
    model(latents, *given).sample.float().square().mean().backward()
    assert latents.grad.any() and latents.grad.isfinite().all()


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"norm_num_groups": 16}, "norm_num_groups"),  # one channel a group
        ({"conv_reduction": 5}, "conv_reduction"),
        ({"attention_head_dim": 20}, "attention_head_dim"),
        ({"router": "random"}, "router"),
        ({"out_channels": 5}, "out_channels"),
        ({"position_patch_size": 3}, "position_patch_size"),  # of 8 cells
    ],
)
def test_bad_configurations(changes, key):
    with pytest.raises(ValueError, match=f"`{key}`"):
        DCDiTModel(**TINY | changes)


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, float("nan"), "1", True, torch.ones(2), torch.tensor([0.0, 1, 1])])
def test_bad_budgets(budget):
    with pytest.raises(ValueError, match="`budget`"):
        make()(*inputs(), budget=budget)


def test_bad_latents_and_labels():
    model, (latents, timesteps, labels) = make(), inputs()
    with pytest.raises(ValueError, match="`hidden_states`"):
        model(latents[:, :3], timesteps, labels)
    with pytest.raises(ValueError, match="`class_labels`"):
        model(latents, timesteps, labels + 1)


@torch.no_grad()
def test_the_router_of_a_model_in_half_precision_is_not(make_dcdit, tmp_path):
    """Which cells are tokens is decided in float32, of the same features."""
    make_dcdit().save_pretrained(tmp_path)
    exact, rough = (DCDiTModel.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (
        rough.dtype
        == torch.bfloat16
        == rough.conv_in.weight.dtype
        == rough.transformer_blocks[0].ff.linear_1.weight.dtype
    )
    assert rough.residual_proj.weight.dtype == rough.boundary_router.proj.weight.dtype == torch.float32
    features = torch.randn(2, 8, 8, 64)
    found = [model._boundary_probability(features) for model in (exact, rough)]
    assert found[0].equal(found[1]) and 0 < (found[0] > 0.5).float().mean() < 1
    latents, timesteps, labels = torch.randn(2, 4, 8, 8), torch.tensor([999, 3]), torch.tensor([0, 10])
    output = rough(latents.bfloat16(), timesteps, labels, budget=0.5)
    assert output.sample.dtype == torch.bfloat16 and output.sample.isfinite().all()
