# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The original DiT, stated plainly from its paper (Peebles and Xie, arXiv:2212.09748), to be measured against.

Operator for operator as it is published: one layer for query, key and value, adaLN in every block, torch's own fused
attention, and three dropouts a block, whose rate is 0. Modules that are the identity are left out.

Shapes:
    B batch, C latent channels, O output channels, N tokens, D width, A heads, p side of a patch in cells
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


CHANNELS = 4  # C and O
PATCH_SIZE = 2  # p, the side of a region of two grains
FREQUENCY_SIZE = 256  # width of the sinusoidal embedding of the timestep
LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class DiTShape:
    """What all sides of a comparison share."""

    num_layers: int
    heads: int  # A
    head_dim: int  # D / A
    sample_size: int  # side of the latents in cells
    num_classes: int = 1000  # label `num_classes` means no class

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def side(self) -> int:
        """Side of the grid of tokens, which is that of a grain map."""
        return self.sample_size // PATCH_SIZE


class OriginalBlock(nn.Module):
    """Block with adaLN-Zero (fig. 3)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=LAYER_NORM_EPS)
        widened = nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Dropout(0.0)
        self.mlp = nn.Sequential(*widened, nn.Linear(4 * dim, dim), nn.Dropout(0.0))
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """tokens (B, N, D), conditioning (B, D) -> (B, N, D)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaln(conditioning).chunk(6, dim=1)
        attended = self.attend(shifted_and_scaled(self.norm1(tokens), shift_attn, scale_attn))
        tokens = tokens + gate_attn.unsqueeze(1) * attended
        fed = self.mlp(shifted_and_scaled(self.norm2(tokens), shift_mlp, scale_mlp))
        return tokens + gate_mlp.unsqueeze(1) * fed

    def attend(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, A, N, D / A)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj_drop(self.proj(attended.transpose(1, 2).reshape(batch, length, dim)))


class OriginalFinalLayer(nn.Module):
    """Modulated LayerNorm and a linear map to the values of a patch."""

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.proj = nn.Linear(dim, out_features)

    def forward(self, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """tokens (B, N, D), conditioning (B, D) -> (B, N, p * p * O)."""
        shift, scale = self.adaln(conditioning).chunk(2, dim=1)
        return self.proj(shifted_and_scaled(self.norm(tokens), shift, scale))


class OriginalDiT(nn.Module):
    """Noise from noised latents, timesteps and class labels."""

    def __init__(self, shape: DiTShape):
        super().__init__()
        dim = shape.width
        self.patch_embed = nn.Conv2d(CHANNELS, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)
        self.register_buffer("positions", sincos_grid(shape.side, dim)[None])  # (1, N, D)
        self.time_mlp = nn.Sequential(nn.Linear(FREQUENCY_SIZE, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label_embed = nn.Embedding(shape.num_classes + 1, dim)
        self.blocks = nn.ModuleList([OriginalBlock(dim, shape.heads) for _ in range(shape.num_layers)])
        self.final_layer = OriginalFinalLayer(dim, PATCH_SIZE**2 * CHANNELS)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """latents (B, C, H, W), timestep (B,), class_labels (B,) -> noise (B, O, H, W)."""
        tokens = self.patch_embed(latents).flatten(2).transpose(1, 2) + self.positions  # (B, N, D)
        frequencies = timestep_frequencies(timestep).to(tokens.dtype)
        conditioning = self.time_mlp(frequencies) + self.label_embed(class_labels)  # (B, D)
        for block in self.blocks:
            tokens = block(tokens, conditioning)
        patches = self.final_layer(tokens, conditioning)  # (B, N, p * p * O)
        side = int(patches.shape[1] ** 0.5)
        patches = patches.reshape(len(patches), side, side, PATCH_SIZE, PATCH_SIZE, CHANNELS)
        noise = patches.permute(0, 5, 1, 3, 2, 4)  # (B, O, rows, p, columns, p)
        return noise.reshape(len(patches), CHANNELS, side * PATCH_SIZE, side * PATCH_SIZE)


def shifted_and_scaled(tokens: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """tokens (B, N, D) under shift and scale (B, D)."""
    return tokens * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_frequencies(timestep: torch.Tensor) -> torch.Tensor:
    """timestep (B,) -> (B, FREQUENCY_SIZE): cosines, then sines, of geometrically falling frequencies."""
    half = FREQUENCY_SIZE // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep[:, None].float() * torch.exp(-math.log(10000) * exponents)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def sincos_grid(side: int, dim: int) -> torch.Tensor:
    """Fixed positions of a square grid, (side * side, D): sines and cosines of the column, then of the row."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, D / 2)
    column, row = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=-1).float()
