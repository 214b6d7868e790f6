# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Attention inside windows of packed tokens (Eq. 10 of arXiv:2504.09454), and the block of RefineNet around it.

Shapes:
    B batch, N packed tokens, D width, A heads; W windows and L tokens a window of one group (`grain_layout`)
"""

import torch
from einops import rearrange
from torch import nn

from ..grain_layout import RefineLayout
from .fused_blocks import BlockWeights, fused_block
from .layers import DiTBlock, SelfAttention


class WindowAttentionProcessor:
    """Attention inside windows of packed tokens, with a learned relative position bias, Eq. 10.

    A window holds at most a few dozen tokens, so the scores are written out: for so few keys a plain matrix product
    and softmax is as fast as a fused kernel, and faster in the backward pass, where a bias needs the scores anyway.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "WindowAttention", hidden_states: torch.Tensor, layout: RefineLayout) -> torch.Tensor:
        attended = window_attention(*attn.project(hidden_states), attn.relative_position_bias, layout)
        return attn.to_out[0](attended)


def window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, layout: RefineLayout
) -> torch.Tensor:
    """Query, key and value of packed tokens, each (N / 4, 4, A, D / A), bias (P, A) -> (N / 4, 4, D)."""
    *shape, heads, head_dim = query.shape
    query, key, value = (x.flatten(0, -3) for x in (query, key, value))  # (N, A, D / A)
    query = query * query.shape[-1] ** -0.5
    lengths = [len(group.arrangement) * group.length for group in layout.groups]
    attended = []
    for group, *qkv in zip(layout.groups, query.split(lengths), key.split(lengths), value.split(lengths)):
        q, k, v = (rearrange(x, "(w l) a d -> w a l d", l=group.length) for x in qkv)
        bias = bias_table[group.relative_index]  # (P, L, L, A)
        bias = rearrange(bias, "p i j a -> p a i j").index_select(0, group.arrangement)  # (W, A, L, L)
        scores = torch.matmul(q, k.transpose(-1, -2)) + bias.to(q.dtype)
        x = torch.matmul(scores.softmax(dim=-1), v)
        attended.append(rearrange(x, "w a l d -> (w l) (a d)"))
    return torch.cat(attended).view(*shape, heads * head_dim)


class WindowAttention(SelfAttention):
    """Self-attention of packed tokens inside windows, with one learned bias per head and relative position.

    Args:
        dim: width D.
        heads: number of heads A.
        side: tokens along a side of a window.
    """

    is_fusible = True
    _default_processor_cls = WindowAttentionProcessor
    _available_processors = [WindowAttentionProcessor]

    def __init__(self, dim: int, heads: int, side: int):
        super().__init__(dim, heads)
        self.relative_position_bias = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))

    def forward(self, hidden_states: torch.Tensor, layout: RefineLayout) -> torch.Tensor:
        return self.processor(self, hidden_states, layout)


class RefineBlock(DiTBlock):
    """DiT block on packed tokens: the modulation of each token's image, attention inside windows (Eq. 10)."""

    is_fusible = True

    def __init__(self, dim: int, heads: int, mlp_ratio: float, side: int):
        super().__init__(dim, heads, mlp_ratio, attn=WindowAttention(dim, heads, side))

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        layout: RefineLayout,
        modulation: torch.Tensor | None = None,
        weights: BlockWeights | None = None,
    ) -> torch.Tensor:
        """hidden_states (N / 4, 4, D), conditioning (B, D) after its SiLU -> (N / 4, 4, D).

        `modulation` and `weights` are what `FusedBlocks` has for this block: then it runs fused.
        """
        # Looked up once for the four children of a parent, the modulation takes a quarter of the memory.
        if weights is not None:
            return fused_block(
                hidden_states,
                modulation.index_select(0, layout.images),
                weights,
                lambda qkv: window_attention(*qkv.unbind(-3), self.attn.relative_position_bias, layout),
            )
        modulation = self.adaln(conditioning).index_select(0, layout.images)[:, None]  # (N / 4, 1, 6 * D)
        return self.modulated(hidden_states, modulation, layout)
