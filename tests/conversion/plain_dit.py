# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Random DiTs to be converted, the original's and diffusers', and a plain reference of what the original computes."""

import math

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel


HEADS, SIDE, CLASSES = 2, 4, 10  # attention heads, tokens along a side, classes


def sine_cosine_grid(side: int, dim: int) -> torch.Tensor:
    """(1, side * side, dim): a quarter each of sine and cosine of the column, then of the row."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()[None]


def dit_weights(dim: int = 32, depth: int = 3, patch: int = 2, out_channels: int = 8, seed: int = 0) -> dict:
    """Random weights under the names of the original DiT."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x_embedder.proj": (dim, 4, patch, patch),
        "t_embedder.mlp.0": (dim, 256),
        "t_embedder.mlp.2": (dim, dim),
        "final_layer.linear": (patch**2 * out_channels, dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * dim, dim),
            f"blocks.{i}.attn.proj": (dim, dim),
            f"blocks.{i}.mlp.fc1": (4 * dim, dim),
            f"blocks.{i}.mlp.fc2": (dim, 4 * dim),
            f"blocks.{i}.adaLN_modulation.1": (6 * dim, dim),
        }
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0], generator=generator) * 0.1 for name, shape in shapes.items()}
    weights["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, dim, generator=generator)
    weights["pos_embed"] = sine_cosine_grid(SIDE, dim)
    return weights


def linear(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def modulation(weights: dict, name: str, condition: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    return linear(weights, name, F.silu(condition))[:, None].chunk(count, dim=-1)


def reference_condition(weights: dict, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Timesteps and labels (B,) to what conditions the blocks, (B, D)."""
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(weights["t_embedder.mlp.0.weight"].dtype)
    time = linear(weights, "t_embedder.mlp.2", F.silu(linear(weights, "t_embedder.mlp.0", waves)))
    return time + weights["y_embedder.embedding_table.weight"][y]


def reference_blocks(weights: dict, x: torch.Tensor, condition: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    """All blocks over tokens (B, N, D)."""
    batch, tokens, dim = x.shape
    for i in range(sum(key.endswith("qkv.weight") for key in weights)):
        block = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(
            weights, f"{block}.adaLN_modulation.1", condition, 6
        )
        qkv = linear(weights, f"{block}.attn.qkv", norm(x) * (1 + scale_a) + shift_a)
        q, k, v = qkv.view(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) / (dim // heads) ** 0.5).softmax(-1) @ v
        attended = attended.transpose(1, 2).reshape(batch, tokens, dim)
        x = x + gate_a * linear(weights, f"{block}.attn.proj", attended)
        fed = linear(weights, f"{block}.mlp.fc1", norm(x) * (1 + scale_m) + shift_m)
        x = x + gate_m * linear(weights, f"{block}.mlp.fc2", F.gelu(fed, approximate="tanh"))
    return x


def reference_dit(weights: dict, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor):
    """The forward pass of the original DiT, written from its paper and from the names and shapes of its weights."""
    patch = weights["x_embedder.proj.weight"].shape[-1]
    condition = reference_condition(weights, t, y)
    x = F.conv2d(z, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=patch)
    x = reference_blocks(weights, x.flatten(2).transpose(1, 2) + weights["pos_embed"], condition)
    shift, scale = modulation(weights, "final_layer.adaLN_modulation.1", condition, 2)
    x = linear(weights, "final_layer.linear", norm(x) * (1 + scale) + shift)
    side = math.isqrt(x.shape[1])
    x = x.view(len(x), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(x), -1, side * patch, side * patch)


def make_diffusers_dit(**options) -> DiTTransformer2DModel:
    """A random DiT of diffusers; all blocks have the embedders of the first, as in public weights."""
    options = {"out_channels": 8, "num_layers": 3, "sample_size": 2 * SIDE, "attention_head_dim": 16} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dit = DiTTransformer2DModel(num_attention_heads=HEADS, num_embeds_ada_norm=CLASSES, **options).eval()
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter.normal_(std=0.1)
    for block in dit.transformer_blocks:
        block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    return dit
