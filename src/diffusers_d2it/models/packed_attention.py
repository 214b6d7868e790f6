# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Attention within each of several images whose tokens lie one after the other, padded only where it must be.

Shapes:
    B images, M tokens of one, T of all, N of the longest, A heads, E = D / A
"""

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from ..limits import is_traced
from .chunking import Chunks
from .layers import SelfAttention


class PackedAttention(SelfAttention):
    """Self-attention over tokens (T, D), each of which attends to those of its image."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """Each (T, A, E) -> the same.

        Image by image on a CPU, and where a backend of diffusers was chosen, as many of them take no mask; by torch's
        kernel for several lengths in half precision on CUDA; elsewhere, and in a graph, which serves all lengths,
        padded to the longest image.
        """
        if is_traced(query):
            return self._padded(query, key, value, chunks)
        active, _ = _AttentionBackendRegistry.get_active_backend()  # of a context or of the environment
        is_chosen = self.processor._attention_backend is not None or active != AttentionBackendName.NATIVE
        if is_chosen or query.device.type == "cpu":
            return self._by_image(query, key, value, chunks)
        if _takes_varlen(query):
            return attend_by_varlen(query, key, value, chunks)
        return self._padded(query, key, value, chunks)

    def _by_image(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        parts = zip(*(x.split(chunks.lengths) for x in (query, key, value)))  # each (M, A, E)
        return torch.cat([SelfAttention.attend(self, *(x[None] for x in part))[0] for part in parts])  # (T, A, E)

    def _padded(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        attended = dispatch_attention_fn(
            *(_pad_to_longest(x, chunks) for x in (query, key, value)),  # (B, N, A, E)
            attn_mask=chunks.is_token[:, None, None],  # (B, 1, 1, N)
            backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config,
        )
        return attended.flatten(0, 1).index_select(0, chunks.slots)  # (T, A, E)


def attend_by_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """torch's own kernel for sequences of several lengths: CUDA, half precision; each (T, A, E)."""
    from torch.nn.attention.varlen import varlen_attn

    longest = chunks.is_token.shape[1]
    return varlen_attn(query, key, value, chunks.starts, chunks.starts, longest, longest)


def _takes_varlen(query: torch.Tensor) -> bool:
    """Whether `attend_by_varlen` can: its kernel asks for a GPU of 2020 or later."""
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type == "cuda" and is_half and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _pad_to_longest(tokens: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """(T, A, E) -> (B, N, A, E), zero where no token is."""
    batch, longest = chunks.is_token.shape
    padded = tokens.new_zeros(batch * longest, *tokens.shape[1:]).index_copy(0, chunks.slots, tokens)
    return padded.unflatten(0, (batch, longest))
