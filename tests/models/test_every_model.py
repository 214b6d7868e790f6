# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What all models have: gradients, precision, independent images, the services of diffusers."""

from functools import partial

import pytest
import torch
from alike import same_weights
from grain_maps import random_map
from peft import LoraConfig

from diffusers_d2it import D2iTGrainModel, DCDiTModel, DynamicAutoencoderKL
from diffusers_d2it.grains import tie


OF_GRAINS = ["make_vae", "make_grain_model", "make_content_model"]
TRANSFORMERS = [*OF_GRAINS[1:], "make_dcdit"]
MODELS = {f"{name}-{grains}": (name, {"num_grains": grains}) for name in OF_GRAINS for grains in (2, 3)}
MODELS["make_dcdit"] = ("make_dcdit", {})
MODELS["make_dcdit-norm"] = ("make_dcdit", {"conditioning_norm": True})


@pytest.fixture(params=MODELS)
def make(request):
    """make(**overrides): a tiny model of one of the classes, of two or three grains where it has any."""
    name, arguments = MODELS[request.param]
    return partial(request.getfixturevalue(name), **arguments)


@pytest.fixture(params=TRANSFORMERS)
def make_transformer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def inputs_for(photos):
    """inputs_for(model): arguments of three images that differ in all of them, as their first dimension."""

    def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        if isinstance(model, DynamicAutoencoderKL):
            size = 32 // model.region_size
            grain_map = torch.arange(3 * size**2).view(3, size, size) % model.num_grains
            return {"x": photos[:3, :, 16:48, 16:48], "grain_map": grain_map}
        generator = torch.Generator().manual_seed(0)
        arguments = {"timestep": torch.tensor([10, 500, 999])}
        if model.config.num_classes is not None:
            arguments["class_labels"] = torch.tensor([0, 9, 10])  # 10 is "no class"
        if isinstance(model, DCDiTModel):
            latents = torch.randn(3, 4, 8, 6, generator=generator)
            return arguments | {"hidden_states": latents, "budget": torch.tensor([1.0, 0.3, 0.6])}
        num_grains = model.config.num_grains
        if isinstance(model, D2iTGrainModel):
            arguments["hidden_states"] = torch.randn(3, num_grains, 4, 6, generator=generator)
            if model.config.fine_ratio_condition:
                arguments["fine_ratio"] = torch.tensor([0.3, float("nan"), 1.0])  # NaN leaves it open
            return arguments
        grain_map = random_map(num_grains)
        latents = torch.randn(3, 4, 4 * model.patch_size, 6 * model.patch_size, generator=generator)
        return arguments | {"hidden_states": tie(latents, grain_map), "grain_map": grain_map}

    return inputs


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """All that a model gives, (B, anything)."""
    inputs = {name: value.to(dtype) if name in ("x", "hidden_states") else value for name, value in inputs.items()}
    if not isinstance(model, DynamicAutoencoderKL):
        return model(**inputs, return_dict=False)[0].flatten(1)
    posterior = model.encode(**inputs).latent_dist
    image = model.decode(posterior.mode()).sample
    return torch.cat([posterior.parameters.flatten(1), posterior.kl()[:, None], image.flatten(1)], dim=1)


# ---- Images, gradients, precision ----


@torch.no_grad()
def test_an_image_depends_on_its_own_arguments_alone_and_on_all_of_them(make, inputs_for):
    model = make()
    inputs = inputs_for(model)
    together = run(model, inputs)
    alone = torch.cat([run(model, {name: value[i : i + 1] for name, value in inputs.items()}) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    values = {"timestep": 900, "class_labels": 5, "fine_ratio": 0.8, "budget": 0.2}
    for name, value in inputs.items():
        changed = value.clone()
        # Latents that are tied to a map are tied to every finer one
        changed[0] = values.get(name, -value[0] if value.is_floating_point() else value.max())
        output = run(model, inputs | {name: changed})
        assert (output[0] - together[0]).abs().max() > 1e-4, name
        torch.testing.assert_close(output[1:], together[1:], rtol=1e-4, atol=1e-5, msg=name)


def test_every_parameter_gets_a_gradient(make, inputs_for):
    model = make().train()
    run(model, inputs_for(model)).square().mean().backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.abs().max() < 1e-12
        # a bias of all keys shifts all scores of a query alike, so its gradient is zero in every attention
        if not name.endswith("to_k.bias")
    ]
    assert without == []


def test_gradient_checkpointing_runs_blocks_again_and_changes_nothing(make, inputs_for):
    results = []
    for checkpointing in (False, True):
        model = make().train()
        blocks = [block for block in model.modules() if type(block).__name__ in model._no_split_modules]
        runs = dict.fromkeys(blocks, 0)
        for block in blocks:
            block.register_forward_pre_hook(lambda block, _, runs=runs: runs.update({block: runs[block] + 1}))
        if checkpointing:
            model.enable_gradient_checkpointing()
        output = run(model, inputs_for(model))
        assert set(runs.values()) == {1}
        output.square().mean().backward()
        assert set(runs.values()) == {2 if checkpointing else 1}
        results.append((output.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0])


@torch.no_grad()
def test_bfloat16_is_close_to_float32(make, inputs_for):
    model = make()
    inputs = inputs_for(model)
    if isinstance(model, DCDiTModel):  # all cells are tokens: else those at one half are in one of the two alone
        model.boundary_router.score.bias.fill_(10.0)
        inputs["budget"] = torch.ones(3)
    exact = run(model, inputs)
    rough = run(model.to(torch.bfloat16), inputs, torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


# ---- Conditions of both transformers ----


@torch.no_grad()
def test_a_scalar_timestep_is_the_same_for_every_image(make_transformer, inputs_for):
    model = make_transformer()
    inputs = inputs_for(model)
    expected = run(model, inputs | {"timestep": torch.tensor([500, 500, 500])})
    for timestep in (500, 500.0, torch.tensor(500), torch.tensor([500])):
        assert torch.equal(run(model, inputs | {"timestep": timestep}), expected)


@torch.no_grad()
def test_an_unconditional_model_takes_no_labels(make_transformer, inputs_for):
    model = make_transformer(num_classes=None)
    inputs = inputs_for(model)
    assert run(model, inputs).isfinite().all()
    assert not any("label_embed" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="`class_labels`.*num_classes"):
        run(model, inputs | {"class_labels": torch.tensor([0, 1, 2])})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("timestep", torch.tensor([1, 2]), r"`timestep`.*\(3,\).*\(2,\)"),
        ("timestep", torch.zeros(3, 1), r"`timestep`.*\(3, 1\)"),
        ("class_labels", None, "`class_labels`.*10"),
        ("class_labels", torch.tensor([0, 1, 11]), "`class_labels`.*0 ... 10.*0 to 11"),
        ("class_labels", torch.tensor([0, -1, 1]), "`class_labels`.*-1 to 1"),
        ("class_labels", torch.tensor([0, 1]), r"`class_labels`.*\(3,\).*\(2,\)"),
        ("class_labels", torch.tensor([0.0, 1.0, 2.0]), "`class_labels`.*int64.*float32"),
        ("class_labels", torch.tensor([0, 1, 2], dtype=torch.int32), "`class_labels`.*int64.*int32"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(make_transformer, inputs_for, name, value, message):
    model = make_transformer()
    with pytest.raises(ValueError, match=message):
        run(model, inputs_for(model) | {name: value})


# ---- Services of diffusers ----


def test_declared_names_are_parts_of_the_model(make):
    model = make()
    classes = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules and set(model._no_split_modules) | set(model._repeated_blocks) <= classes
    assert all(hasattr(model, name) for name in getattr(model, "_group_offload_block_modules", None) or [])


@torch.no_grad()
def test_fused_projections_are_the_same_attention(make_transformer, inputs_for):
    model = make_transformer()
    inputs = inputs_for(model)
    separate = run(model, inputs)
    model.fuse_qkv_projections()
    attentions = [module for module in model.modules() if hasattr(module, "fused_projections")]
    assert attentions and all(attention.fused_projections for attention in attentions)
    torch.testing.assert_close(run(model, inputs), separate, rtol=1e-4, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), separate)


@torch.no_grad()
def test_layerwise_casting_stores_weights_in_eight_bits_and_computes_with_them(make, inputs_for):
    """The result is that of a model whose weights were rounded; norms and the outermost layers keep theirs."""
    model, rounded = make(), make()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert set(stored.values()) == {torch.float8_e4m3fn, torch.float32}
    kept = {name for name, dtype in stored.items() if dtype == torch.float32}
    assert kept >= {name for name in stored if "norm" in name or "patch_embed" in name or "conv_in" in name}
    for name, parameter in rounded.named_parameters():
        parameter.copy_(parameter.to(stored[name]).float())
    inputs = inputs_for(model)
    torch.testing.assert_close(run(model, inputs), run(rounded, inputs), rtol=1e-4, atol=1e-5)


def test_a_lora_adapter_starts_as_the_identity_and_alone_is_trained(make_transformer, inputs_for):
    model = make_transformer()
    inputs = inputs_for(model)
    with torch.no_grad():
        expected = run(model, inputs)
    attentions = sum(name.endswith("to_q") for name, _ in model.named_modules())
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    output = run(model, inputs)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    output.sum().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert all("lora" in name for name in trained)
    assert len(trained) == 2 * 4 * attentions  # A and B of each


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("make_vae", {"num_grains": 3, "scaling_factor": 0.8, "shift_factor": -0.1, "use_post_quant_conv": True}),
        ("make_grain_model", {"num_grains": 3}),
        ("make_grain_model", {"num_classes": None, "fine_ratio_condition": False}),
        ("make_content_model", {"num_grains": 3, "out_channels": 8, "frequency_shift": 1.0}),
        ("make_content_model", {"num_classes": None}),
        ("make_dcdit", {"out_channels": 8, "router": "cosine", "smoothing_sigma": 2.0}),
        ("make_dcdit", {"num_classes": None}),
        ("make_dcdit", {"conditioning_norm": True, "position_patch_size": 2}),
    ],
)
@torch.no_grad()
def test_a_saved_model_is_the_same_model(request, name, overrides, inputs_for, tmp_path):
    model = request.getfixturevalue(name)(**overrides)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ours, theirs = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (model, loaded))
    assert ours == theirs
    assert same_weights(loaded, model)
    inputs = inputs_for(model)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
