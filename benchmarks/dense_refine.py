# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""RefineNet on the whole grid, from the weights of a packed one: what the packed one is measured against.

Every cell is a token, fine or not. Attention stays inside windows and coarse keys are masked by -inf, so a fine query
sees exactly the keys it sees in `RefineNet`; what coarse queries compute is discarded. Two grains, level 1, one cell a
token: `num_grains=2` of `D2iTContentModel`.

Shapes:
    B batch, C O channels of latents and noise, D width, A heads
    H W sides of the latents in cells, v cells along a side of a window; H and W are multiples of v
    n windows of an image, L = v * v tokens a window, d = D / A
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from peers import sharing_weights
from torch import nn

from diffusers_d2it import D2iTContentModel
from diffusers_d2it.grains import GrainLayout, grain_map_to_cells
from diffusers_d2it.models.layers import modulate, residual_stream
from diffusers_d2it.models.refine_net import RefineBlock, WindowAttention
from diffusers_d2it.models.transformer_d2it_content import RefineNet


@dataclass(frozen=True)
class DenseLayout:
    """What depends on the map alone, worked out once per map, as `GrainLayout` is for the packed path."""

    side: int  # v
    fine: torch.Tensor  # (B, 1, H, W) bool, cells of fine regions
    key_mask: torch.Tensor  # (B * n, 1, 1, L), -inf for coarse keys, but not in windows that have no other: NaN
    relative_index: torch.Tensor  # (L, L) int64, row of the bias table for each query and key

    @classmethod
    def from_grain_map(cls, grain_map: torch.Tensor, side: int) -> "DenseLayout":
        """Work out the layout of a map (B, h, w) int64, 0 = coarse, 1 = fine; H and W are multiples of `side`."""
        fine = grain_map_to_cells(grain_map, 2) == 1  # (B, H, W)
        coarse_key = ~windows_of(fine[..., None], side).squeeze(-1)  # (B * n, L)
        masked = coarse_key & ~coarse_key.all(dim=-1, keepdim=True)
        key_mask = torch.zeros(masked.shape, device=fine.device).masked_fill_(masked, -torch.inf)

        cell = torch.arange(side * side, device=fine.device)
        return cls(side, fine[:, None], key_mask[:, None, None], bias_index(cell // side, cell % side, side))


def bias_index(row: torch.Tensor, column: torch.Tensor, side: int) -> torch.Tensor:
    """Row of the bias table for each query and key, (N, N), from where cells lie in their windows, (N,) each."""
    relative_row, relative_column = row[:, None] - row + side - 1, column[:, None] - column + side - 1
    return relative_row * (2 * side - 1) + relative_column


def windows_of(grid: torch.Tensor, side: int) -> torch.Tensor:
    """(B, H, W, D) -> (B * n, L, D)."""
    return rearrange(grid, "b (y p) (x q) d -> (b y x) (p q) d", p=side, q=side)


def dense_refine(
    refine_net: RefineNet,
    parents: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
    label_embedding: torch.Tensor | float,
    layout: DenseLayout,
) -> torch.Tensor:
    """Residual of `RefineNet.forward`, (B, O, H, W), from all cells; inputs as there, but for the layout."""
    batch, _, height, width = noise.shape
    side = layout.side
    conditioning = F.silu(refine_net.time_embed(timestep, latents.dtype) + label_embedding)  # (B, D)

    # Tokens stand in the order of windows from here on, so that a window is a reshape away.
    patches = windows_of(rearrange(torch.cat([latents, noise], dim=1), "b c y x -> b y x c"), side)
    children = refine_net.up_proj(parents)  # (B * h * w, 4 * D)
    sizes = {"b": batch, "yr": side // 2, "x": width // side, "xr": side // 2, "p": 2, "q": 2}
    children = rearrange(children, "(b y yr x xr) (p q d) -> (b y x) (yr p xr q) d", **sizes)
    tokens = (refine_net.patch_embed(patches) + children).view(batch, height * width, -1)  # (B, H * W, D)
    tokens = residual_stream(tokens, refine_net.residual_dtype)

    for block in refine_net.transformer_blocks:
        tokens = dense_block(block, tokens, conditioning, layout)

    residual = refine_net.norm_out(tokens, conditioning)  # (B, H * W, O)
    residual = rearrange(residual, "b (y x p q) o -> b o (y p) (x q)", y=height // side, x=width // side, p=side)
    return torch.where(layout.fine, residual, 0)


def dense_block(
    block: RefineBlock, tokens: torch.Tensor, conditioning: torch.Tensor, layout: DenseLayout
) -> torch.Tensor:
    """tokens (B, H * W, D) in the order of windows, conditioning (B, D) -> (B, H * W, D)."""
    modulation = block.adaln(conditioning)[:, None].chunk(6, dim=-1)  # 6 x (B, 1, D)
    shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation
    attended = dense_attention(block.attn, modulate(block.norm1(tokens), shift_attn, scale_attn), layout)
    tokens = torch.addcmul(tokens, gate_attn, attended)
    fed = block.ff(modulate(block.norm2(tokens), shift_ff, scale_ff))
    return torch.addcmul(tokens, gate_ff, fed)


def dense_attention(attn: WindowAttention, tokens: torch.Tensor, layout: DenseLayout) -> torch.Tensor:
    """Attention inside windows, coarse keys masked: (B, H * W, D) -> (B, H * W, D)."""
    length = layout.side**2
    query, key, value = (rearrange(x, "b (n l) a d -> (b n) a l d", l=length) for x in attn.project(tokens))
    bias = rearrange(attn.relative_position_bias[layout.relative_index], "i j a -> a i j")  # (A, L, L)
    mask = bias + layout.key_mask.to(bias.dtype)
    # The fused kernel is the faster one here forward; backward the scores written out win, by 0.3 % of a step.
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (B * n, A, L, d)
    return attn.to_out[0](rearrange(attended, "(b n) a l d -> b (n l) (a d)", b=len(tokens)))


class DenseRefineNet(nn.Module):
    """Takes the place of a packed RefineNet of the last level, with its weights; called with a `DenseLayout`."""

    def __init__(self, refine_net: RefineNet):
        super().__init__()
        self.refine_net = refine_net

    def forward(self, parents: torch.Tensor, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return dense_refine(self.refine_net, parents, *inputs), parents


class DenseContentModel(nn.Module):
    """A content model of two grains whose RefineNet works on the whole grid, on the weights of a packed one."""

    def __init__(self, model: D2iTContentModel):
        super().__init__()
        self.model = sharing_weights(model)
        self.model.refine_nets = nn.ModuleList([DenseRefineNet(self.model.refine_nets[0])])

    def prepare_grain_map(self, grain_map: torch.Tensor) -> GrainLayout:
        """The layout of a map (B, h, w), without packed tokens."""
        side = self.model.config.window_size
        layout = GrainLayout.from_grain_map(grain_map, num_grains=2)
        return replace(layout, levels=(DenseLayout.from_grain_map(grain_map, side),), window_size=side)

    def forward(self, latents, timestep, grain_map, class_labels, return_dict: bool = True):
        """As of the content model."""
        layout = grain_map if isinstance(grain_map, GrainLayout) else self.prepare_grain_map(grain_map)
        return self.model(latents, timestep, layout, class_labels, return_dict)


def masked_global_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention over all N tokens with the bias and the -inf of `global_window_mask`: (B, N, A, D / A) -> same."""
    query, key, value = (rearrange(x, "b n a d -> b a n d") for x in (query, key, value))
    return rearrange(F.scaled_dot_product_attention(query, key, value, attn_mask=mask), "b a n d -> b n a d")


def global_window_mask(attn: WindowAttention, height: int, width: int, side: int) -> torch.Tensor:
    """Windows as a mask over all tokens of a grid in raster order: bias inside, -inf outside, (1, A, N, N)."""
    cell = torch.arange(height * width, device=attn.relative_position_bias.device)
    row, column = cell // width, cell % width
    window = row // side * (-(-width // side)) + column // side
    bias = attn.relative_position_bias[bias_index(row % side, column % side, side)]  # (N, N, A)
    bias = bias.masked_fill((window[:, None] != window)[..., None], -torch.inf)
    return repeat(bias, "i j a -> 1 a i j").contiguous()
