# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Attention within each of several images whose tokens lie one after the other, padded only where it must be.

Shapes:
    B images, T tokens of all of them, M of the longest, A heads, E = D / A
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils import is_torch_version
from torch.nn.utils.rnn import pad_sequence

from ..limits import is_traced
from .layers import SelfAttention


_HALF = (torch.float16, torch.bfloat16)
_HAS_VARLEN = is_torch_version(">=", "2.10")


class PackedAttention(SelfAttention):
    """Self-attention over tokens (T, D), each of which attends to those of its image."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...]
    ) -> torch.Tensor:
        """Each (T, A, E) -> the same.

        Image by image on a CPU, by torch's kernel for several lengths in half precision on CUDA, and padded to the
        longest image elsewhere, and where a backend of diffusers was chosen.

        Args:
            query, key, value: (T, A, E).
            lengths: number of tokens of each image; they sum to T.
        """
        if self.processor._attention_backend is not None or is_traced(query):
            return self._padded(query, key, value, lengths)
        if query.device.type == "cpu":
            return attend_by_image(query, key, value, lengths)
        if query.device.type == "cuda" and query.dtype in _HALF and _HAS_VARLEN:
            return attend_by_varlen(query, key, value, lengths)
        return self._padded(query, key, value, lengths)

    def _padded(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...]
    ) -> torch.Tensor:
        query, key, value = (pad_sequence(x.split(lengths), batch_first=True) for x in (query, key, value))
        is_token = (
            torch.arange(max(lengths), device=query.device) < torch.tensor(lengths, device=query.device)[:, None]
        )
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=is_token[:, None, None],  # (B, 1, 1, M)
            backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config,
        )
        return attended[is_token]  # (T, A, E)


def attend_by_image(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...]
) -> torch.Tensor:
    """One call an image; each (T, A, E)."""
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)))  # (A, its tokens, E)
    return torch.cat([F.scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts], dim=1).transpose(
        0, 1
    )


def attend_by_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...]
) -> torch.Tensor:
    """torch's own kernel for sequences of several lengths: CUDA, half precision; each (T, A, E)."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
    return varlen_attn(query, key, value, ends, ends, max(lengths), max(lengths))
