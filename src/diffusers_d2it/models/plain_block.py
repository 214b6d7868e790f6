# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A DiT block written out as its twelve operators, for inference.

On a small batch the modules around an operator cost as much time as the operator. Written out, a block of 16 tokens
takes three quarters of the time. `BlockWeights.of` says where nothing is lost by leaving the modules out.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .linear_stack import extras_of, is_plain


try:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
except ImportError:  # modules are not left out where diffusers does not say which attention it would take
    _AttentionBackendRegistry = None


class BlockWeights(NamedTuple):
    """What a `DiTBlock` computes with, all but adaLN."""

    heads: int
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    up_weight: torch.Tensor
    up_bias: torch.Tensor
    down_weight: torch.Tensor
    down_bias: torch.Tensor

    @classmethod
    def of(cls, block: nn.Module, like: torch.Tensor) -> "BlockWeights | None":
        """The weights of a block, or None where its modules do more than their operators, or other ones.

        That is: hooks (caches, offloading, casts), adapters, quantised or sharded weights, projections that are not
        stacked, an attention processor or backend other than the default ones.

        Args:
            block: a `DiTBlock` whose stack of projections has been refreshed.
            like: an input of its layers, for its device and dtype.
        """
        attn, ff = block.attn, block.ff
        out, up, down = attn.to_out[0], ff.linear_1, ff.linear_2
        processor = attn.processor
        if (
            attn.qkv.weight is None
            or not all(is_plain(layer, like) for layer in (out, up, down))
            or extras_of(attn)
            or extras_of(ff)
            or type(processor) is not attn._default_processor_cls
            or (processor._attention_backend, processor._parallel_config) != (None, None)
            or not is_torch_as_it_is()
        ):
            return None
        weights = [tensor for layer in (attn.qkv, out, up, down) for tensor in (layer.weight, layer.bias)]
        return cls(attn.heads, *weights)


def is_torch_as_it_is() -> bool:
    """Whether diffusers takes torch's own attention where none has been chosen, and nothing watches all modules."""
    return (
        _AttentionBackendRegistry is not None
        and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
        and not _has_any_global_hook()
    )


def plain_block(tokens: torch.Tensor, modulation: torch.Tensor, w: BlockWeights) -> torch.Tensor:
    """`DiTBlock.forward` of tokens (B, N, D) under a modulation (B, 6, 1, D)."""
    shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.unbind(1)

    qkv = F.linear(norm_modulate(tokens, shift_attn, scale_attn), w.qkv_weight, w.qkv_bias)  # (B, N, 3 * D)
    query, key, value = qkv.unflatten(-1, (3, w.heads, -1)).transpose(1, 3).unbind(2)  # (B, A, N, D / A)
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
    tokens = torch.addcmul(tokens, gate_attn, F.linear(attended, w.out_weight, w.out_bias))

    hidden = F.linear(norm_modulate(tokens, shift_ff, scale_ff), w.up_weight, w.up_bias)  # (B, N, 4 * D)
    fed = F.linear(F.gelu(hidden, approximate="tanh"), w.down_weight, w.down_bias)
    return torch.addcmul(tokens, gate_ff, fed)


def norm_modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm(hidden_states) * scale + shift: two passes over the tokens, one where it is compiled."""
    normed = torch.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normed, scale)
