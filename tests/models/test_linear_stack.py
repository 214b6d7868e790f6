# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Stacked projections: the function of the separate layers, whatever happens to these layers."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig

from diffusers_d2it import D2iTContentModel
from diffusers_d2it.grains import tie


Model = torch.nn.Module


def content_inputs() -> dict:
    generator = torch.Generator().manual_seed(0)
    grain_map = torch.randint(2, (3, 4, 4), generator=generator)
    latents = tie(torch.randn(3, 4, 8, 8, generator=generator), grain_map)
    return {"hidden_states": latents, "timestep": 500, "grain_map": grain_map, "class_labels": torch.arange(3)}


def grain_inputs() -> dict:
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(3, 2, 4, 4, generator=generator)
    return {"hidden_states": state, "timestep": 500, "class_labels": torch.arange(3)}


@pytest.fixture(params=["content", "grain"])
def model_and_inputs(request, make_content_model, make_grain_model) -> tuple[Model, dict]:
    """A model that has stacked its projections, and its inputs."""
    made = {"content": (make_content_model, content_inputs), "grain": (make_grain_model, grain_inputs)}
    make, inputs = made[request.param]
    model, inputs = make(), inputs()
    run(model, inputs)
    assert is_stacked(model)
    return model, inputs


def run(model: Model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def run_plain(model: Model, inputs: dict) -> torch.Tensor:
    """Every layer by itself: what training computes."""
    with torch.enable_grad():
        return model(**inputs, return_dict=False)[0].detach()


def is_stacked(model: Model) -> bool:
    """Whether the layers of every stack lie in one piece of memory."""
    blocks = [m for m in model.modules() if hasattr(m, "adaln") and hasattr(m, "attn")]
    groups = [(b.attn.to_q, b.attn.to_k, b.attn.to_v) for b in blocks] + [[b.adaln for b in model.transformer_blocks]]
    return all(len({layer.weight.untyped_storage().data_ptr() for layer in group}) == 1 for group in groups)


def count_products(function: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::addmm")


def assert_runs_as_plain(model: Model, inputs: dict, before: torch.Tensor | None = None) -> None:
    output = run(model, inputs)
    torch.testing.assert_close(output, run_plain(model, inputs), atol=1e-6, rtol=1e-5)
    if before is not None:
        assert not torch.allclose(output, before, atol=1e-3), "the change left the output as it was"


def test_stacked_is_separate(model_and_inputs):
    model, inputs = model_and_inputs
    assert_runs_as_plain(model, inputs)
    blocks = [m for m in model.modules() if hasattr(m, "adaln") and hasattr(m, "attn")]
    stacked, plain = (count_products(lambda f=f: f(model, inputs)) for f in (run, run_plain))
    nets = 1 + len(getattr(model, "refine_nets", ()))
    assert plain - stacked == 3 * len(blocks) - nets  # 2 of 3 projections of a block, and all adaLN but one of a net


def test_weights_keep_their_names_and_are_held_once(model_and_inputs, tmp_path):
    model, inputs = model_and_inputs
    fresh = type(model).from_config(model.config)
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(memory.values()) == sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # layers of one stack in different shards
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    torch.testing.assert_close(run(loaded, inputs), run(model, inputs), atol=1e-6, rtol=1e-5)


def add_in_place(model: Model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)


def load_others(assign: bool) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        state = {name: value + 0.05 for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


def replace_data(model: Model) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.05


def add_adapter(model: Model) -> None:
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "adaln"], init_lora_weights=False))


def replace_layers(model: Model) -> None:
    block = model.transformer_blocks[0]
    for parent, name in ((block.attn, "to_k"), (block, "adaln")):
        layer = getattr(parent, name)
        new = torch.nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
        setattr(parent, name, new)


@pytest.mark.parametrize(
    "change", [add_in_place, load_others(False), load_others(True), replace_data, add_adapter, replace_layers]
)
def test_changed_layers_are_seen(model_and_inputs, change):
    torch.manual_seed(0)
    model, inputs = model_and_inputs
    before = run(model, inputs)
    change(model)
    assert_runs_as_plain(model, inputs, before)


def test_an_adapter_keeps_its_layers_out_of_the_stack(make_content_model):
    model, inputs = make_content_model(), content_inputs()
    run(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["transformer_blocks.0.attn.to_q"], init_lora_weights=False))
    run(model, inputs)
    assert model.transformer_blocks[0].attn.qkv.weight is None
    assert model.transformer_blocks[1].attn.qkv.weight is not None


def test_moved_to_another_dtype_and_back(model_and_inputs):
    model, inputs = model_and_inputs
    before = run(model, inputs)
    model.to(torch.float64)
    assert_nothing_is_kept(model)
    precise = run(
        model, {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    )
    torch.testing.assert_close(precise.float(), before, atol=1e-5, rtol=1e-5)
    model.to(torch.float32)
    torch.testing.assert_close(run(model, inputs), before)


def assert_nothing_is_kept(model: Model) -> None:
    """No stack holds on to memory that weights have been moved out of."""
    nets = [net for net in model.modules() if hasattr(net, "transformer_blocks")]
    stacks = [net.adaln for net in nets]
    assert all(stack.weight is None and not stack._weights and not stack._state for stack in stacks)
    assert all(block.attn.qkv.weight is None for net in nets for block in net.transformer_blocks)


def test_a_copy_has_its_own_weights(model_and_inputs):
    model, inputs = model_and_inputs
    before = run(model, inputs)
    copied = copy.deepcopy(model)
    run(copied, inputs)
    add_in_place(copied)
    assert torch.equal(run(model, inputs), before)
    assert_runs_as_plain(copied, inputs, before)


def test_trains_after_inference(model_and_inputs):
    # Also when the first call was in inference mode, whose tensors no gradient could be taken of
    model, inputs = model_and_inputs
    fresh = type(model).from_config(model.config)
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        fresh(**inputs)
    for one in (model, fresh):
        one(**inputs, return_dict=False)[0].square().mean().backward()
        torch.optim.AdamW(one.parameters(), lr=1e-2).step()
    assert is_stacked(fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))
    assert_runs_as_plain(fresh, inputs)


def test_separate_layers_compute_the_same_to_the_last_bit(model_and_inputs):
    model, inputs = model_and_inputs
    fresh = copy.deepcopy(model)
    assert not is_stacked(fresh)
    assert torch.equal(run_plain(model, inputs), run_plain(fresh, inputs))


def test_parts_that_would_not_be_aligned_are_not_stacked(make_content_model):
    model, inputs = make_content_model(attention_head_dim=12), content_inputs()
    assert_runs_as_plain(model, inputs)
    assert model.transformer_blocks[0].attn.qkv.weight is None


def test_a_forward_without_gradients_leaves_a_backward_in_waiting_alone(make_content_model):
    inputs = content_inputs()
    gradients = []
    for interrupted in (False, True):
        model = make_content_model().train()
        loss = model(**inputs).sample.square().mean()
        if interrupted:
            run(model, inputs)
            assert is_stacked(model)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_half_the_blocks_offloaded(make_content_model):
    # accelerate keeps offloaded weights on the meta device until their layer is called
    from accelerate import cpu_offload

    model, inputs = make_content_model(), content_inputs()
    before = run(model, inputs)
    cpu_offload(model.transformer_blocks[0], execution_device="cpu")
    torch.testing.assert_close(run(model, inputs), before, atol=1e-6, rtol=1e-5)
    assert model.adaln.weight is None and model.transformer_blocks[1].attn.qkv.weight is not None


def test_unfused_projects_with_separate_layers(make_content_model):
    model, inputs = make_content_model(), content_inputs()
    before = run(model, inputs)
    fused = count_products(lambda: run(model, inputs))
    model.unfuse_qkv_projections()
    torch.testing.assert_close(run(model, inputs), before, atol=1e-6, rtol=1e-5)
    num_blocks = len(model.transformer_blocks) + len(model.refine_nets[0].transformer_blocks)
    assert count_products(lambda: run(model, inputs)) == fused + 2 * num_blocks
    model.fuse_qkv_projections()
    assert count_products(lambda: run(model, inputs)) == fused
    assert list(model.state_dict()) == list(D2iTContentModel.from_config(model.config).state_dict())
