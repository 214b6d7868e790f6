# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""DC-DiT written down once more, cell by cell and pair by pair, for comparison: slow, and of no module of ours."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F


def kept_of(probability: torch.Tensor, budget: float) -> list[int]:
    """Raster indices of the kept cells of an image, probability (H, W)."""
    values = probability.flatten().tolist()
    natural = [i for i, p in enumerate(values) if p > 0.5]
    number = min(math.floor(len(natural) * (1 - Fraction(str(budget)))), len(natural) - 1)
    fallen = sorted(natural, key=lambda i: (values[i], i))[:number]
    return sorted(set(natural) - set(fallen))


def nearest_of(kept: list[int], height: int, width: int) -> list[int]:
    """Of every cell the kept one that is nearest, the first of equally near ones."""
    return [
        min(kept, key=lambda k: ((k // width - i // width) ** 2 + (k % width - i % width) ** 2, k))
        for i in range(height * width)
    ]


def smoothed(tokens: torch.Tensor, probability: torch.Tensor, kept: list[int], width: int, sigma: float):
    """Tokens (M, D) of the kept cells of an image after Eq. 2; probability (L,)."""
    rows = []
    for i, token in zip(kept, tokens):
        total, weights = torch.zeros_like(token), torch.zeros((), dtype=token.dtype)
        for j, other in zip(kept, tokens):
            square = (i // width - j // width) ** 2 + (i % width - j % width) ** 2
            weight = math.exp(-square / (2 * sigma**2)) * probability[j].clamp(1e-4, 1 - 1e-4)
            total, weights = total + weight * other, weights + weight
        sure = probability[i].clamp(1e-4, 1 - 1e-4)
        rows.append(sure * token + (1 - sure) * total / (weights + 1e-8))
    return torch.stack(rows)


def forward(model, latents: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, budgets: list[float]):
    """Noise, probability and kept cells of `model`, whose weights and configuration alone are used."""
    w, config = dict(model.named_parameters()), model.config
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    groups = config["norm_num_groups"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv(x, name):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def silu(x):
        return x / (1 + (-x).exp())

    def group_norm(x, number, name, eps=1e-5):
        parts = x.reshape(len(x), number, -1)
        mean, variance = parts.mean(-1, keepdim=True), parts.var(-1, keepdim=True, unbiased=False)
        x = ((parts - mean) / (variance + eps).sqrt()).reshape(x.shape)
        return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def rms_norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def layer_norm(x, eps=1e-6):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()

    def stack(x, name):
        for k in range(config["num_conv_layers"]):
            block = f"{name}.blocks.{k}"
            y = conv(silu(group_norm(x, groups, f"{block}.norm1")), f"{block}.conv1")
            y = y + linear(silu(of_stacks), f"{block}.time_emb_proj")[:, :, None, None]
            y = conv(silu(group_norm(y, groups, f"{block}.norm2")), f"{block}.conv2")
            x = y + (conv(x, f"{block}.conv_shortcut") if f"{block}.conv_shortcut.weight" in w else x)
        return rms_norm(x.permute(0, 2, 3, 1), f"{name}.norm")

    def wave(cell):  # (D / 2) of a row or column
        steps = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
        patch_size = config["position_patch_size"]
        angles = ((cell + 0.5) / patch_size - 0.5) * 10000.0**-steps  # from middle to middle
        return torch.cat([angles.sin(), angles.cos()])

    frequencies = 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    angles = timestep[:, None].double() * frequencies
    c = linear(torch.cat([angles.cos(), angles.sin()], 1).to(latents.dtype), "time_embed.mlp.linear_1")
    c = linear(silu(c), "time_embed.mlp.linear_2") + w["label_embed.weight"][labels]
    of_stacks = c
    if config["conditioning_norm"]:
        of_stacks = layer_norm(c, eps=1e-5) * w["norm_conditioning.weight"] + w["norm_conditioning.bias"]

    features = stack(conv(latents, "conv_in"), "encoder")
    batch, height, width, _ = features.shape
    residual = linear(features, "residual_proj")
    cells = conv(features.permute(0, 3, 1, 2), "boundary_router.proj")
    surprise = conv(cells - conv(cells, "boundary_router.predictor"), "boundary_router.conv")
    score = conv(silu(group_norm(surprise, 8, "boundary_router.norm")), "boundary_router.score")[:, 0]
    probability = 1 / (1 + (-score).exp())
    probability = probability.clone()
    probability[:, 0, 0] = probability[:, -1, -1] = 1.0

    merged, masks = [], []
    for b in range(batch):
        kept = kept_of(probability[b].detach(), budgets[b])
        masks.append(torch.tensor([i in kept for i in range(height * width)]).view(height, width))
        tokens = torch.stack(
            [features[b, i // width, i % width] + torch.cat([wave(i % width), wave(i // width)]) for i in kept]
        )
        for k in range(config["num_layers"]):
            block = f"transformer_blocks.{k}"
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(silu(c[b]), f"{block}.adaln").chunk(6)
            x = layer_norm(tokens) * (1 + scale_1) + shift_1
            q, k_, v = (linear(x, f"{block}.attn.to_{name}") for name in "qkv")
            size = config["attention_head_dim"]
            heads = []
            for h in range(config["num_attention_heads"]):
                part = slice(h * size, (h + 1) * size)
                scores = (q[:, part] @ k_[:, part].T / math.sqrt(size)).exp()
                heads.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
            tokens = tokens + gate_1 * linear(torch.cat(heads, 1), f"{block}.attn.to_out.0")
            x = linear(layer_norm(tokens) * (1 + scale_2) + shift_2, f"{block}.ff.linear_1")
            x = 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
            tokens = tokens + gate_2 * linear(x, f"{block}.ff.linear_2")
        tokens = smoothed(
            rms_norm(tokens, "norm_backbone"), probability[b].flatten(), kept, width, config["smoothing_sigma"]
        )
        nearest = nearest_of(kept, height, width)
        merged.append(torch.stack([tokens[kept.index(i)] for i in nearest]).view(height, width, dim))
    sure = torch.where(probability > 0.5, probability, 1 - probability)[..., None]
    merged = torch.stack(merged) * (sure + (1 - sure).detach()) + residual
    x = stack(merged.permute(0, 3, 1, 2), "decoder")
    shift, scale = linear(silu(c), "norm_out.adaln")[:, None, None].chunk(2, -1)
    noise = linear(layer_norm(x) * (1 + scale) + shift, "norm_out.proj_out").permute(0, 3, 1, 2)
    return noise, probability, torch.stack(masks)
