# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Attention inside windows of packed tokens (Eq. 10 of arXiv:2504.09454), and the block of RefineNet around it.

Shapes:
    B batch, N packed tokens, D width, A heads; W windows and L tokens a window of one group (`packing`)
"""

import torch
from einops import rearrange
from torch import nn

from .layers import DiTBlock, SelfAttention
from .packing import RefineLayout


class WindowAttentionProcessor:
    """Attention inside windows of packed tokens, with a learned relative position bias, Eq. 10.

    A window holds at most a few dozen tokens, so the scores are written out: for so few keys a plain matrix product
    and softmax is as fast as a fused kernel, and faster in the backward pass, where a bias needs the scores anyway.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "WindowAttention", hidden_states: torch.Tensor, layout: RefineLayout) -> torch.Tensor:
        """hidden_states (N / 4, 4, D) -> (N / 4, 4, D)."""
        query, key, value = (x.flatten(0, 1) for x in attn.project(hidden_states))  # (N, A, D / A)
        query = query * query.shape[-1] ** -0.5
        lengths = [len(group.arrangement) * group.length for group in layout.groups]
        attended = []
        for group, *qkv in zip(layout.groups, query.split(lengths), key.split(lengths), value.split(lengths)):
            q, k, v = (rearrange(x, "(w l) a d -> w a l d", l=group.length) for x in qkv)
            bias = attn.relative_position_bias[group.relative_index]  # (P, L, L, A)
            bias = rearrange(bias, "p i j a -> p a i j").index_select(0, group.arrangement)  # (W, A, L, L)
            scores = torch.matmul(q, k.transpose(-1, -2)) + bias.to(q.dtype)
            x = torch.matmul(scores.softmax(dim=-1), v)
            attended.append(rearrange(x, "w a l d -> (w l) (a d)"))
        return attn.to_out[0](torch.cat(attended).view_as(hidden_states))


class WindowAttention(SelfAttention):
    """Self-attention of packed tokens inside windows, with one learned bias per head and relative position.

    Args:
        dim: width D.
        heads: number of heads A.
        side: tokens along a side of a window.
    """

    _default_processor_cls = WindowAttentionProcessor
    _available_processors = [WindowAttentionProcessor]

    def __init__(self, dim: int, heads: int, side: int):
        super().__init__(dim, heads)
        self.relative_position_bias = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))

    def forward(self, hidden_states: torch.Tensor, layout: RefineLayout) -> torch.Tensor:
        return self.processor(self, hidden_states, layout)


class RefineBlock(DiTBlock):
    """DiT block on packed tokens: the modulation of each token's image, attention inside windows (Eq. 10)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, side: int):
        super().__init__(dim, heads, mlp_ratio, attn=WindowAttention(dim, heads, side))

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, layout: RefineLayout) -> torch.Tensor:
        """hidden_states (N / 4, 4, D), conditioning (B, D) after its SiLU -> (N / 4, 4, D)."""
        # Looked up once for the four children of a parent, the modulation takes a quarter of the memory.
        modulation = self.adaln(conditioning).index_select(0, layout.images)[:, None]  # (N / 4, 1, 6 * D)
        return self.modulated(hidden_states, modulation, layout)
