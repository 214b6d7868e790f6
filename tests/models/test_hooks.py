# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Guiders and processors of diffusers change the attention of a model as they say, or are refused."""

from types import MethodType

import pytest
import torch
from diffusers import FasterCacheConfig, LayerSkipConfig
from diffusers.guiders import PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import HookRegistry, apply_layer_skip
from diffusers.models.attention_processor import AttnProcessor2_0
from grain_maps import random_map

from diffusers_d2it import tie
from diffusers_d2it.models.layers import SelfAttentionProcessor


LAYER = 1


@pytest.fixture(params=["D2iT", "DC-DiT"])
def predict_by_either(request, make_dcdit):
    """`predict` of both models."""
    if request.param == "D2iT":
        return request.getfixturevalue("predict")
    model, latents = make_dcdit(), torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    return model, lambda: model(latents, torch.tensor(500.0), torch.tensor([1, 2])).sample.detach()


@pytest.fixture
def predict(make_content_model):
    """A model, and a function that predicts with it from fixed inputs."""
    model = make_content_model()
    grain_map = random_map(2, (2, 4, 4))
    latents = tie(torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0)), grain_map)
    return model, lambda: model(latents, torch.tensor(500.0), grain_map, torch.tensor([1, 2])).sample.detach()


@pytest.mark.parametrize(
    "settings, part, instead",
    [
        ({}, "", lambda self, hidden_states, *args: hidden_states),
        ({"skip_ff": False}, "attn", lambda self, hidden_states, *args: hidden_states),
        ({"skip_attention": False}, "ff", lambda self, hidden_states: hidden_states),
        (
            {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True},
            "attn",
            lambda self, hidden_states, *args: self.to_out[0](self.to_v(hidden_states)),
        ),
    ],
    ids=["block", "attention", "feed_forward", "scores"],
)
@torch.no_grad()
def test_a_skipped_layer_is_what_its_reference_computes(predict_by_either, settings, part, instead):
    model, prediction = predict_by_either
    whole = prediction()
    apply_layer_skip(model, LayerSkipConfig(indices=[LAYER], fqn="transformer_blocks", **settings))
    skipped = prediction()
    for module in model.modules():
        HookRegistry.check_if_exists_or_initialize(module).remove_hook("layer_skip_hook", recurse=False)
    assert torch.equal(prediction(), whole)

    block = model.transformer_blocks[LAYER]
    module = block.get_submodule(part)
    module.forward = MethodType(instead, module)
    torch.testing.assert_close(skipped, prediction())
    assert not torch.allclose(skipped, whole)


@pytest.mark.parametrize(
    "guider",
    [
        PerturbedAttentionGuidance(perturbed_guidance_layers=[LAYER], perturbed_guidance_stop=1.0),
        SkipLayerGuidance(skip_layer_config=LayerSkipConfig(indices=[LAYER]), skip_layer_guidance_stop=1.0),
    ],
    ids=lambda guider: type(guider).__name__,
)
@torch.no_grad()
def test_a_guider_changes_one_of_its_passes_and_leaves_nothing_behind(predict, guider):
    model, prediction = predict
    whole = prediction()
    guider.set_state(step=5, num_inference_steps=20, timestep=torch.tensor(500))
    passes = []
    for _ in guider.prepare_inputs({"hidden_states": (whole, whole)}):
        guider.prepare_models(model)
        passes.append(prediction())
        guider.cleanup_models(model)
    assert [torch.allclose(one, whole) for one in passes] == [True, True, False]
    assert torch.equal(prediction(), whole)


def test_one_processor_serves_all_attention_and_foreign_ones_are_refused(predict):
    class Halved(SelfAttentionProcessor):
        def __call__(self, attn, hidden_states, *layout):
            return super().__call__(attn, hidden_states, *layout) / 2

    model, prediction = predict
    whole = prediction()
    model.set_attn_processor(SelfAttentionProcessor())
    assert torch.equal(prediction(), whole)

    model.set_attn_processor(Halved())
    changed = prediction()
    assert {type(processor) for processor in model.attn_processors.values()} == {Halved}
    assert not torch.allclose(changed, whole)
    with pytest.raises(ValueError, match="`processor`.*AttnProcessor2_0"):
        model.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(prediction(), changed)


def test_caches_that_do_not_know_such_blocks_are_refused(make_content_model, make_grain_model):
    with pytest.raises(ValueError, match="`config`.*FasterCacheConfig"):
        make_content_model().enable_cache(FasterCacheConfig())
    assert not hasattr(make_grain_model(), "enable_cache")
