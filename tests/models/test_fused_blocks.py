# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Fused blocks: the function of the modules, whatever happens to these, and nothing left behind."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig

from diffusers_d2it.grains import tie
from diffusers_d2it.models.layers import FeedForward, SelfAttention, SelfAttentionProcessor


Model = torch.nn.Module


def content_inputs(num_grains: int = 2) -> dict:
    generator = torch.Generator().manual_seed(0)
    grain_map = torch.randint(num_grains, (3, 4, 4), generator=generator)
    cells = 2**num_grains * 2
    latents = tie(torch.randn(3, 4, cells, cells, generator=generator), grain_map)
    return {"hidden_states": latents, "timestep": 500, "grain_map": grain_map, "class_labels": torch.arange(3)}


def grain_inputs() -> dict:
    state = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return {"hidden_states": state, "timestep": 500, "class_labels": torch.arange(3)}


@pytest.fixture(params=["content", "three grains", "grain"])
def model_and_inputs(request, make_content_model, make_grain_model) -> tuple[Model, dict]:
    made = {
        "content": lambda: (make_content_model(), content_inputs()),
        "three grains": lambda: (make_content_model(3), content_inputs(3)),
        "grain": lambda: (make_grain_model(), grain_inputs()),
    }
    return made[request.param]()


@torch.no_grad()
def run(model: Model, inputs: dict) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def fusions(model: Model) -> list:
    return [module.fusion for module in model.modules() if "fusion" in vars(module)]


def is_fused(model: Model) -> bool:
    return all(fusion.is_fused for fusion in fusions(model))


def count_products(function: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::addmm")


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The same function
# ---------------------------------------------------------------------------------------------------------------------


def test_fused_is_the_modules(model_and_inputs):
    model, inputs = model_and_inputs
    expected = run(model, inputs)
    assert not is_fused(model)
    plain = count_products(lambda: run(model, inputs))
    with model.fused_blocks():
        assert_close(run(model, inputs), expected)
        assert is_fused(model)
        fused = count_products(lambda: run(model, inputs))
    nets = [module for module in model.modules() if "fusion" in vars(module)]
    num_blocks = sum(len(net.transformer_blocks) for net in nets)
    assert plain - fused == 3 * num_blocks - len(nets)  # 2 of 3 projections of a block, all adaLN of a net but one


def test_nothing_is_left_behind_nor_touched(model_and_inputs):
    model, inputs = model_and_inputs
    weights_at = [p.data_ptr() for p in model.parameters()]
    names = list(model.state_dict())
    for _ in range(2):
        with model.fused_blocks():
            run(model, inputs)
            assert list(model.state_dict()) == names
        assert not any(fusion.is_fused for fusion in fusions(model))
    assert [p.data_ptr() for p in model.parameters()] == weights_at


def test_contexts_may_be_nested(make_grain_model):
    model = make_grain_model()
    with model.fused_blocks():
        with model.fused_blocks():
            run(model, grain_inputs())
        assert is_fused(model)
    assert not is_fused(model)


def test_the_context_ends_with_an_error(make_grain_model):
    model = make_grain_model()
    with pytest.raises(RuntimeError, match="stop"), model.fused_blocks():
        run(model, grain_inputs())
        raise RuntimeError("stop")
    assert not is_fused(model)


def test_training_inside_runs_on_the_modules(model_and_inputs):
    model, inputs = model_and_inputs
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)  # changes weights without counting it
    with model.fused_blocks():
        before = run(model, inputs)
        model(**inputs, return_dict=False)[0].square().mean().backward()
        assert all(p.grad is not None for p in model.transformer_blocks.parameters())
        optimizer.step()
        after = run(model, inputs)
        assert is_fused(model)
    assert_close(after, run(model, inputs))
    assert not torch.allclose(after, before, atol=1e-3)


def test_weights_of_inference_mode_are_left_to_the_modules(make_pipeline):
    with torch.inference_mode():
        pipe = make_pipeline()
        with pipe.transformer.fused_blocks():
            run(pipe.transformer, content_inputs())
            assert not pipe.transformer.fusion.is_fused
        assert pipe(3, num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_threads_share_a_model(make_grain_model):
    model, inputs = make_grain_model(num_layers=6), grain_inputs()
    expected = run(model, inputs)
    for _ in range(20):
        with model.fused_blocks(), ThreadPoolExecutor(4) as pool:
            for output in pool.map(lambda _: run(model, inputs), range(8)):
                assert_close(output, expected)


def test_without_memory_for_copies_the_modules_run(make_grain_model, monkeypatch, caplog):
    model, inputs = make_grain_model(), grain_inputs()
    expected = run(model, inputs)

    def out_of_memory(tensors):
        raise torch.OutOfMemoryError("of the device")

    with model.fused_blocks():
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cat", out_of_memory)
            model.fusion._up_to_date(model.transformer_blocks, torch.zeros(3, 32))
        assert torch.equal(run(model, inputs), expected)
        assert not is_fused(model)
    assert "no memory" in caplog.text


def test_accelerate_saves_every_weight(make_content_model, tmp_path):
    # It leaves out tensors that share memory
    from safetensors.torch import load_file

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(make_content_model())
    with model.fused_blocks():
        run(model, content_inputs())
        accelerator.save_model(model, str(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_the_pipeline_fuses_for_a_call(make_pipeline):
    pipe, seen = make_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append(is_fused(pipe.transformer))
        return {}

    pipe(3, num_inference_steps=3, callback_on_step_end=callback)
    assert seen == [True, True, True]
    assert not is_fused(pipe.transformer) and not is_fused(pipe.grain_model)


# ---------------------------------------------------------------------------------------------------------------------
# Changes between two forwards of a context
# ---------------------------------------------------------------------------------------------------------------------


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


def tie_weights(model: Model) -> None:
    model.transformer_blocks[1].adaln.weight = model.transformer_blocks[0].adaln.weight


def append_a_block(model: Model) -> None:
    model.transformer_blocks.append(copy.deepcopy(model.transformer_blocks[0]))


@pytest.mark.parametrize(
    "change", [add_in_place, load_others(False), load_others(True), replace_data, tie_weights, append_a_block]
)
def test_other_weights_are_fused_anew(model_and_inputs, change):
    model, inputs = model_and_inputs
    with model.fused_blocks():
        before = run(model, inputs)
        change(model)
        after = run(model, inputs)
        assert is_fused(model)
    assert_close(after, run(model, inputs))
    assert not torch.allclose(after, before, atol=1e-4)


def add_adapter(*targets: str) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))

    return change


def hook_a_layer(name: str) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        layer = model.transformer_blocks[0].get_submodule(name)
        layer.register_forward_hook(lambda module, args, output: 10 * output.roll(1, dims=-1))

    return change


def replace_the_processor(model: Model) -> None:
    class Doubled(SelfAttentionProcessor):
        def __call__(self, attn, hidden_states):
            return 2 * super().__call__(attn, hidden_states)

    model.transformer_blocks[0].attn.processor = Doubled()


def change_the_norm(model: Model) -> None:
    model.transformer_blocks[0].norm1.eps = 1.0


def replace_the_norm(model: Model) -> None:
    model.transformer_blocks[0].norm2 = torch.nn.RMSNorm(model.transformer_blocks[0].adaln.in_features)


def replace_the_processor_by_a_function(model: Model) -> None:
    model.transformer_blocks[0].attn.processor = lambda attn, hidden_states: attn.to_out[0](hidden_states)


def replace_forward(model: Model) -> None:
    ff = model.transformer_blocks[0].ff
    ff.forward = lambda hidden_states: 2 * type(ff).forward(ff, hidden_states)


def replace_feed_forward(model: Model) -> None:
    class Negated(FeedForward):
        def forward(self, hidden_states):
            return -super().forward(hidden_states)

    block = model.transformer_blocks[0]
    block.ff = put_weights(block.ff, Negated(block.adaln.in_features, 4.0))


def put_weights(old: Model, new: Model) -> Model:
    new.load_state_dict(old.state_dict())
    return new


def replace_attention(model: Model) -> None:
    class Negated(SelfAttention):
        def forward(self, hidden_states):
            return -super().forward(hidden_states)

    block = model.transformer_blocks[0]
    block.attn = put_weights(block.attn, Negated(block.adaln.in_features, block.attn.heads))


def test_weights_of_a_class_of_their_own_are_left_to_the_modules(make_grain_model):
    # As quantised and sharded ones are: what they do in a product is their own business
    class Packed(torch.nn.Parameter):
        pass

    model, inputs = make_grain_model(), grain_inputs()
    with model.fused_blocks():
        before = run(model, inputs)
        layer = model.transformer_blocks[0].ff.linear_1
        layer.weight = Packed(2 * layer.weight.detach())
        after = run(model, inputs)
        assert not is_fused(model)
    assert torch.equal(after, run(model, inputs))
    assert not torch.allclose(after, before, atol=1e-4)


def leave_out_feed_forward(model: Model) -> None:
    model.transformer_blocks[0].ff = torch.nn.Identity()


@pytest.mark.parametrize(
    "change",
    [
        add_adapter("to_q", "adaln"),
        add_adapter("linear_1", "to_out.0"),
        *(hook_a_layer(name) for name in ("", "norm1", "norm2", "attn", "attn.to_k", "attn.to_out.0", "ff", "adaln")),
        hook_a_layer("ff.linear_2"),
        change_the_norm,
        replace_the_norm,
        replace_the_processor_by_a_function,
        replace_the_processor,
        replace_forward,
        replace_feed_forward,
        replace_attention,
        leave_out_feed_forward,
    ],
)
def test_what_modules_do_beside_is_not_left_out(model_and_inputs, change):
    model, inputs = model_and_inputs
    with model.fused_blocks():
        before = run(model, inputs)
        change(model)
        after = run(model, inputs)
        assert not model.fusion.is_fused
    assert torch.equal(after, run(model, inputs))
    assert not torch.allclose(after, before, atol=1e-4)


def test_a_chosen_attention_is_taken(make_grain_model):
    model, inputs = make_grain_model(), grain_inputs()
    with model.fused_blocks():
        before = run(model, inputs)
        with attention_backend("_native_math"):
            assert_close(run(model, inputs), before)
            assert not is_fused(model)
        run(model, inputs)
        assert is_fused(model)
        with attention_backend("native"):  # afterwards the default is what it was: the next line changes it
            model.set_attention_backend("_native_math")
            assert_close(run(model, inputs), before)
            assert not is_fused(model)


def test_a_hook_on_all_modules_sees_them(make_grain_model):
    model, calls = make_grain_model(), []
    with model.fused_blocks():
        run(model, grain_inputs())
        hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(module))
        try:
            run(model, grain_inputs())
        finally:
            hook.remove()
    block = model.transformer_blocks[0]
    assert {block.adaln, block.attn.to_q, block.attn.to_out[0], block.ff, block.ff.linear_2} <= set(calls)


def test_hooks_of_caches_are_asked(make_content_model):
    model, inputs = make_content_model(num_layers=4), content_inputs()
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with model.fused_blocks(), model.cache_context("cond"):
        run(model, inputs)
        assert not model.fusion.is_fused


def test_offloaded_weights_are_waited_for(make_content_model):
    # accelerate keeps them on the meta device until their layer is called
    model, inputs = make_content_model(), content_inputs()
    expected = run(model, inputs)
    cpu_offload(model.transformer_blocks[0], execution_device="cpu")
    with model.fused_blocks():
        assert_close(run(model, inputs), expected)
        assert not model.fusion.is_fused


def test_weights_that_change_at_every_step_are_not_copied_for_ever(make_grain_model):
    model, inputs = make_grain_model(), grain_inputs()
    with model.fused_blocks():
        for step in range(6):
            run(model, inputs)
            assert model.fusion.is_fused == (step < 3)
            add_in_place(model)


def test_dtypes(model_and_inputs):
    model, inputs = model_and_inputs
    floats = {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    with model.fused_blocks():
        before = run(model, inputs)
        model.to(torch.float64)
        precise = run(model, inputs | {name: value.double() for name, value in floats.items()})
        assert is_fused(model)
        torch.testing.assert_close(precise.float(), before, atol=1e-5, rtol=1e-5)
        model.to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):  # the modules cast by themselves
            rough = run(model, inputs)
            assert not is_fused(model)
        assert (rough - before).norm() < 0.05 * before.norm()


def test_a_copy_has_its_own_weights(make_grain_model):
    model, inputs = make_grain_model(), grain_inputs()
    with model.fused_blocks():
        before = run(model, inputs)
        copied = copy.deepcopy(model)
        add_in_place(copied)
        assert_close(run(model, inputs), before)
        changed = run(copied, inputs)
    assert_close(changed, run(copied, inputs))
    assert not torch.allclose(changed, before, atol=1e-3)
    for parameter in copied.parameters():
        parameter.data.add_(0.05)  # nothing sees this, and it is in no context that would have to
    assert not is_fused(copied)
    assert not torch.allclose(run(copied, inputs), changed, atol=1e-3)
