# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The caches of diffusers: they skip blocks of the content model, and what they hold serves one stretch of a call."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from grain_maps import check_tied


STEPS = 12
BLOCKS = 4  # of the Multi-grained Net
INTERVAL = (0.25, 0.75)
FIRST_OF_STRETCH = (0, 3, 9)  # where steps without guidance and guided ones of this interval begin
WHOLE_BLOCKS = [r"transformer_blocks\.\d+", r"refine_nets\.\d+"]


def first_block(pipe, fires: bool):
    return FirstBlockCacheConfig(threshold=0.8 if fires else 0.0)


def taylorseer(pipe, fires: bool, **settings):
    return TaylorSeerCacheConfig(
        cache_interval=3 if fires else 1, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, **settings
    )


def taylorseer_on_blocks(pipe, fires: bool):
    return taylorseer(pipe, fires, cache_identifiers=WHOLE_BLOCKS)


def mag(pipe, fires: bool):
    ratios = [1.0 if fires else 1.5] * STEPS
    return MagCacheConfig(threshold=0.1, num_inference_steps=STEPS, mag_ratios=ratios)


def pyramid_attention_broadcast(pipe, fires: bool):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2 if fires else 1,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


CACHES = pytest.mark.parametrize(
    "cache", [first_block, taylorseer, taylorseer_on_blocks, mag, pyramid_attention_broadcast]
)


@pytest.fixture
def pipe(make_pipeline, make_content_model):
    """A pipeline whose network is no small perturbation of the identity: a wrong residual shows in the samples."""
    pipe = make_pipeline(transformer=make_content_model(num_layers=BLOCKS))
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(2)
    return pipe


def count_attention(transformer, blocks) -> Callable[[], list[int]]:
    """A function that tells how many of these blocks computed attention, at every forward since its last call."""
    counts = []
    transformer.register_forward_pre_hook(lambda *_: counts.append(0))

    def count(*_) -> None:
        counts[-1] += 1

    for block in blocks:
        block.attn.to_out[0].register_forward_hook(count)

    def read() -> list[int]:
        taken = counts.copy()
        counts.clear()
        return taken

    return read


@pytest.fixture
def computed(pipe):
    """Attention of the Multi-grained Net, as counted by `count_attention`."""
    return count_attention(pipe.transformer, pipe.transformer.transformer_blocks)


def sample(pipe, batch_size: int = 2, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    grain_map = (torch.rand(batch_size, 4, 4, generator=generator) > 0.5).long()
    latents = pipe(
        list(range(batch_size)),
        grain_map=grain_map,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="latent",
        **({"guidance_interval": (0.0, 1.0)} | kwargs),
    ).images
    check_tied(latents, grain_map)
    return latents


def relative_error(samples: torch.Tensor, expected: torch.Tensor) -> float:
    return ((samples - expected).norm() / expected.norm()).item()


@CACHES
def test_a_cache_skips_blocks_begins_anew_where_guidance_does_and_leaves_no_trace(pipe, computed, cache):
    """One that never fires changes nothing. What it holds is that of another batch, or of a step long past."""
    plain = sample(pipe, guidance_interval=INTERVAL)
    pipe.transformer.enable_cache(cache(pipe, fires=False))
    assert torch.equal(sample(pipe, guidance_interval=INTERVAL), plain)
    pipe.transformer.disable_cache()
    refined = count_attention(pipe.transformer, pipe.transformer.refine_nets[0].transformer_blocks)
    pipe.transformer.enable_cache(cache(pipe, fires=True))
    computed()
    samples = sample(pipe, guidance_interval=INTERVAL)
    steps = computed()
    assert [steps[first] for first in FIRST_OF_STRETCH] == [BLOCKS] * 3
    assert len(steps) == STEPS and sum(steps) < 0.75 * BLOCKS * STEPS
    assert 1e-5 < relative_error(samples, plain) < 0.05
    assert (sum(refined()) < STEPS) == (cache in (taylorseer_on_blocks, pyramid_attention_broadcast))
    pipe.transformer.disable_cache()
    computed()
    assert torch.equal(sample(pipe, guidance_interval=INTERVAL), plain)
    assert computed() == [BLOCKS] * STEPS


@CACHES
def test_a_call_finds_nothing_of_the_one_before_nor_of_one_that_failed(pipe, cache):
    def fail(pipe, step, timestep, tensors):
        if step == STEPS // 2:
            raise RuntimeError("stopped")
        return tensors

    pipe.transformer.enable_cache(cache(pipe, fires=True))
    expected = {batch_size: sample(pipe, batch_size) for batch_size in (3, 1)}
    with pytest.raises(RuntimeError, match="stopped"):
        sample(pipe, batch_size=3, callback_on_step_end=fail)
    for batch_size in (1, 3, 3):
        assert torch.equal(sample(pipe, batch_size), expected[batch_size])


def test_compiled_blocks_are_skipped_alike(pipe, fresh_compiler):
    pipe.transformer.enable_cache(taylorseer_on_blocks(pipe, fires=True))
    expected = sample(pipe)
    pipe.transformer.compile_repeated_blocks(backend="eager")
    assert relative_error(sample(pipe), expected) < 1e-5


def test_taylorseer_in_lite_mode_is_refused(pipe):
    """Its patterns blank the blocks of a model and cache a layer that this model does not have."""
    with pytest.raises(ValueError, match="`use_lite_mode`.*cache_identifiers"):
        pipe.transformer.enable_cache(TaylorSeerCacheConfig(use_lite_mode=True))
    assert not pipe.transformer.is_cache_enabled
