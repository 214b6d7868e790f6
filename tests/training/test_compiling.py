# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Compiled blocks, and attention written out, in half precision on a CPU: the gradients of plain ones."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from diffusers_d2it import DynamicAutoencoderKL
from diffusers_d2it.losses import dvae_loss, mse_loss, multi_grained_loss, ratio_loss


BF16 = torch.autocast("cpu", torch.bfloat16)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.flatten().clone() for name, p in model.named_parameters() if p.grad is not None}


def same_directions(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> bool:
    """Whether rounding alone tells gradients apart: as a whole, and of every weight that has much of one."""
    assert found.keys() == exact.keys()
    largest = max(gradient.norm() for gradient in exact.values())
    much = [name for name in exact if exact[name].norm() > 0.01 * largest]
    assert len(much) > len(exact) // 3
    cosines = [torch.cosine_similarity(found[name], exact[name], dim=0) for name in much]
    whole = torch.cosine_similarity(torch.cat([*found.values()]), torch.cat([*exact.values()]), dim=0)
    return whole > 0.95 and min(cosines) > 0.8


def assert_compiled_like_eager(model: torch.nn.Module, gradients_in: Callable, **options) -> None:
    exact = gradients_in(nullcontext())
    assert same_directions(gradients_in(BF16), exact)
    model.compile_repeated_blocks(**options)
    assert same_directions(gradients_in(BF16), exact)


def test_compiled_blocks_of_the_autoencoder_have_the_gradients_of_eager_ones(photos):
    torch.manual_seed(0)
    vae = DynamicAutoencoderKL(
        block_out_channels=(8, 8, 16, 16), decoder_block_out_channels=(8, 8, 16), norm_num_groups=4,
        downsample_factors=(4, 8), layers_per_block=1,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    photos = photos[:4].contiguous(memory_format=torch.channels_last)
    grain_map = torch.arange(4 * 8 * 8).view(4, 8, 8) % 2

    def gradients_in(context) -> dict[str, torch.Tensor]:
        with context:
            posterior = vae.encode(photos, grain_map=grain_map).latent_dist
            reconstruction = vae.decode(posterior.mode()).sample
            losses = dvae_loss(photos, reconstruction, posterior.kl(), kl_weight=1e-3)
        return gradients(vae, losses["loss"])

    assert_compiled_like_eager(vae, gradients_in, dynamic=False)


def test_compiled_blocks_of_the_content_model_have_the_gradients_of_eager_ones(make_content_model):
    model = make_content_model().train()
    generator = torch.Generator().manual_seed(0)
    layout = model.prepare_grain_map((torch.rand(4, 4, 4, generator=generator) < 0.5).long())
    latents, noise = (layout.tie(torch.randn(4, 4, 8, 8, generator=generator)) for _ in range(2))
    timesteps, labels = torch.tensor([100, 300, 500, 700]), torch.tensor([0, 2, 1, 0])

    def gradients_in(context) -> dict[str, torch.Tensor]:
        with context:
            prediction = model(latents, timesteps, model.prepare_grain_map(layout.grain_map), labels).sample
        return gradients(model, multi_grained_loss(prediction, noise, layout)["loss"])

    model.set_attention_backend("native")  # torch's own attention in place of the one that is written out
    native = gradients_in(BF16)
    for block in model.transformer_blocks:
        block.attn.processor._attention_backend = None
    written_out = gradients_in(BF16)
    assert same_directions(written_out, native)
    assert any(not torch.equal(written_out[name], native[name]) for name in native)
    assert_compiled_like_eager(model, gradients_in)


def test_compiled_blocks_of_dcdit_have_the_gradients_of_eager_ones_on_any_number_of_tokens(make_dcdit):
    model = make_dcdit().train()
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps, labels = torch.tensor([100, 300, 500, 700]), torch.tensor([0, 2, 1, 0])
    budgets, counts = (1.0, 0.4), set()

    def gradients_in(context) -> dict[str, torch.Tensor]:
        loss = 0.0
        for budget in budgets:
            with context:
                output = model(latents, timesteps, labels, budget=budget)
            counts.add(int(output.kept.sum()))
            loss = loss + mse_loss(output.sample, noise) + 0.03 * ratio_loss(output.boundary_probability, 4.0)
        return gradients(model, loss)

    assert_compiled_like_eager(model, gradients_in)
    assert max(counts) > 2 * min(counts) > 20
