# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The block that is written out: the block's function, and only where its modules do nothing else."""

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig

from diffusers_d2it.models.layers import DiTBlock, SelfAttentionProcessor
from diffusers_d2it.models.plain_block import BlockWeights, plain_block


@pytest.fixture
def block() -> DiTBlock:
    torch.manual_seed(0)
    block = DiTBlock(32, 2)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block


@torch.no_grad()
def test_it_is_the_block(block):
    tokens, conditioning = torch.randn(3, 10, 32), torch.randn(3, 32)
    expected = block(tokens, conditioning)
    block.attn.stack_projections(tokens)
    weights = BlockWeights.of(block, tokens)
    modulation = block.modulation(conditioning)
    torch.testing.assert_close(plain_block(tokens, modulation, weights), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, tokens, atol=0.1)


def run(model) -> torch.Tensor:
    state = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(state, 500, torch.arange(2)).logits


def test_models_leave_the_modules_out_and_come_back_to_them(make_grain_model):
    model, calls = make_grain_model(), []
    plain = run(model)
    assert all(weights is not None for weights in model.adaln._weights)
    for module in model.modules():
        if type(module).__name__ in ("SelfAttention", "FeedForward"):
            module.register_forward_hook(lambda module, args, output: calls.append(module))
    torch.testing.assert_close(run(model), plain, atol=1e-6, rtol=1e-5)
    assert len(calls) == 2 * len(model.transformer_blocks)


def hook_a_layer(model):
    model.transformer_blocks[0].ff.linear_1.register_forward_hook(lambda module, args, output: output + 1)


def hook_attention(model):
    model.transformer_blocks[0].attn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def add_an_adapter(model):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["ff.linear_1", "to_out.0"], init_lora_weights=False))


def replace_the_processor(model):
    class Doubled(SelfAttentionProcessor):
        def __call__(self, attn, hidden_states):
            return 2 * super().__call__(attn, hidden_states)

    model.transformer_blocks[0].attn.processor = Doubled()


def replace_forward(model):
    ff = model.transformer_blocks[0].ff
    ff.forward = lambda hidden_states: 2 * type(ff).forward(ff, hidden_states)


@pytest.mark.parametrize(
    "change", [hook_a_layer, hook_attention, add_an_adapter, replace_the_processor, replace_forward]
)
def test_what_modules_do_beside_is_not_left_out(make_grain_model, change):
    model = make_grain_model()
    before = run(model)
    change(model)
    after = run(model)
    with torch.enable_grad():
        state = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        by_modules = model(state, 500, torch.arange(2)).logits.detach()
    torch.testing.assert_close(after, by_modules, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)
    assert model.adaln._weights[0] is None
    untouched = change is not add_an_adapter
    assert (model.adaln._weights[1] is not None) == untouched


def test_a_chosen_attention_is_taken(make_grain_model):
    model = make_grain_model()
    before = run(model)
    with attention_backend("_native_math"):
        torch.testing.assert_close(run(model), before, atol=1e-6, rtol=1e-5)
        assert model.adaln._weights[0] is None
    run(model)
    assert model.adaln._weights[0] is not None
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(run(model), before, atol=1e-6, rtol=1e-5)
    assert model.adaln._weights[0] is None


def test_a_cache_that_hooks_attention_is_asked(make_grain_model):
    model = make_grain_model()
    run(model)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)
    run(model)
    assert model.adaln._weights[0] is None


def test_a_hook_on_all_modules_sees_them(make_grain_model):
    model, calls = make_grain_model(), []
    run(model)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: calls.append(module))
    try:
        run(model)
    finally:
        hook.remove()
    assert model.transformer_blocks[0].ff.linear_2 in calls
