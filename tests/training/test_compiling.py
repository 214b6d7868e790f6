# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Compiled blocks, and attention written out, in half precision on a CPU: the gradients of plain ones."""

from contextlib import nullcontext

import pytest
import torch

from diffusers_d2it import DynamicAutoencoderKL
from diffusers_d2it.grains import tie
from diffusers_d2it.losses import dvae_loss, multi_grained_loss
from diffusers_d2it.training import compile_blocks


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.flatten().clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_cosine(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Over all weights with a gradient worth the name: how far a gradient points elsewhere."""
    assert found.keys() == exact.keys()
    largest = max(gradient.norm() for gradient in exact.values())
    names = [name for name in exact if exact[name].norm() > 1e-4 * largest]
    assert len(names) > len(exact) // 2
    return min(torch.cosine_similarity(found[name], exact[name], dim=0).item() for name in names)


def autoencoder_gradients(vae: DynamicAutoencoderKL, photos: torch.Tensor, context) -> dict[str, torch.Tensor]:
    grain_map = torch.arange(2 * 8 * 8).view(2, 8, 8) % 2
    with context:
        posterior = vae.encode(photos[:2], grain_map=grain_map).latent_dist
        reconstruction = vae.decode(posterior.mode()).sample
        losses = dvae_loss(photos[:2], reconstruction, posterior.kl(), kl_weight=1e-3)
    return gradients(vae, losses["loss"])


def test_compiled_blocks_of_the_autoencoder_have_the_gradients_of_eager_ones(photos):
    torch.manual_seed(0)
    vae = DynamicAutoencoderKL(
        block_out_channels=(8, 8, 16, 16), decoder_block_out_channels=(8, 8, 16), norm_num_groups=4,
        downsample_factors=(4, 8), layers_per_block=1,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    exact = autoencoder_gradients(vae, photos, nullcontext())
    eager = worst_cosine(autoencoder_gradients(vae, photos, bf16()), exact)
    compile_blocks(vae, dynamic=False)
    compiled = worst_cosine(autoencoder_gradients(vae, photos, bf16()), exact)
    print("AE", eager, compiled)
    assert compiled > 0.8
    assert compiled > eager - 0.02


def content_gradients(model: torch.nn.Module, context) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layout = model.prepare_grain_map((torch.rand(2, 4, 4, generator=generator) < 0.5).long())
    latents, noise = (tie(torch.randn(2, 4, 8, 8, generator=generator), layout.grain_map) for _ in range(2))
    with context:
        prediction = model(latents, torch.tensor([100, 700]), layout, torch.tensor([0, 2])).sample
    return gradients(model, multi_grained_loss(prediction, noise, layout)["loss"])


def test_compiled_blocks_of_the_content_model_have_the_gradients_of_eager_ones(make_content_model):
    model = make_content_model().train()
    exact = content_gradients(model, nullcontext())
    model.set_attention_backend("native")  # torch's own attention in place of the one that is written out
    eager = worst_cosine(content_gradients(model, bf16()), exact)
    for block in model.transformer_blocks:
        block.attn.processor._attention_backend = None
    written_out = worst_cosine(content_gradients(model, bf16()), exact)
    compile_blocks(model)
    compiled = worst_cosine(content_gradients(model, bf16()), exact)
    print("CT", eager, written_out, compiled)
    assert min(written_out, compiled) > 0.9
    assert min(written_out, compiled) > eager - 0.02
