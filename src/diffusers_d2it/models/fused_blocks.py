# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Blocks without the modules around their operators, while images are sampled.

A small batch is bound by the number of operators and by the Python around them, not by arithmetic. So for the time of
`fused_blocks()` query, key and value are one matrix product, adaLN of all blocks is another, and a block is twelve
operators. The stacked weights are copies, made when the first forward comes and given back at the end. The layers keep
theirs, so nothing that holds or saves them notices.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .fallbacks import warn_once


try:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
except ImportError:  # nothing is fused where diffusers does not say which attention it would take
    _AttentionBackendRegistry = None

_EPS = 1e-6  # of both norms of a block
_MOST_BUILDS = 3  # in one context: where weights come and go at every step, copies would cost more than they save


class BlockWeights(NamedTuple):
    """What a block computes with, all but adaLN."""

    heads: int
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    up_weight: torch.Tensor
    up_bias: torch.Tensor
    down_weight: torch.Tensor
    down_bias: torch.Tensor


def fused_block(tokens: torch.Tensor, modulation: torch.Tensor, w: BlockWeights, attend: Callable) -> torch.Tensor:
    """A DiT block, operator for operator.

    Args:
        tokens: (B, N, D).
        modulation: (B, 6, 1, D): shift, scale (around one) and gate of the attention, then of the feed-forward.
        w: weights.
        attend: attention of query, key and value together, (B, N, 3, A, D / A), with the result (B, N, D).
    """
    shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.unbind(1)

    qkv = F.linear(norm_modulate(tokens, shift_attn, scale_attn), w.qkv_weight, w.qkv_bias)  # (B, N, 3 * D)
    attended = attend(qkv.view(*qkv.shape[:-1], 3, w.heads, -1))
    tokens = torch.addcmul(tokens, gate_attn, F.linear(attended, w.out_weight, w.out_bias))

    hidden = F.linear(norm_modulate(tokens, shift_ff, scale_ff), w.up_weight, w.up_bias)  # (B, N, 4 * D)
    fed = F.linear(F.gelu(hidden, approximate="tanh"), w.down_weight, w.down_bias)
    return torch.addcmul(tokens, gate_ff, fed)


def attention(qkv: torch.Tensor) -> torch.Tensor:
    """Attention of torch over all tokens: (B, N, 3, A, D / A) -> (B, N, D)."""
    query, key, value = qkv.transpose(1, 3).unbind(2)  # (B, A, N, D / A)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


def norm_modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm(hidden_states) * scale + shift, in two operators."""
    normed = torch.layer_norm(hidden_states, hidden_states.shape[-1:], eps=_EPS)
    return torch.addcmul(shift, normed, scale)


class FusedBlocks:
    """The fused weights of the blocks of a net, made when they are first needed between `begin` and `end`.

    Before every forward it is looked whether layers, weights, hooks and processors are what they were. If not, the
    weights are fused again; where modules do more than their operators (adapters, hooks of caches or offloading,
    quantised or sharded weights, another norm, attention or dtype), nothing is fused and the modules run. A forward
    with gradients, after which weights may be updated, lets go of them too.
    """

    def __init__(self):
        self._depth = 0
        self._lock = threading.Lock()  # pipelines of several threads may share a model
        self._num_builds = 0
        self._fused: _Fused | None = None

    def __reduce__(self) -> tuple:
        return FusedBlocks, ()  # a copy of a model is in no context

    def begin(self) -> None:
        """From here on blocks may be fused."""
        with self._lock:
            self._depth += 1

    def end(self) -> None:
        """Blocks are no longer fused, once for every `begin`; the copies of weights are given back."""
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._num_builds, self._fused = 0, None

    @property
    def is_fused(self) -> bool:
        """Whether fused weights are held."""
        return self._fused is not None

    def arguments(self, blocks: nn.ModuleList, conditioning: torch.Tensor) -> list[tuple]:
        """What every block is called with beside its input: its modulation (B, 6, 1, D) and weights, or nothing.

        Args:
            blocks: the blocks of the net.
            conditioning: (B, D), after its SiLU.
        """
        fused = None
        if not torch.compiler.is_compiling():  # inside a graph of the whole net nobody could look
            if torch.is_grad_enabled():
                self._fused = None
            elif self._depth:
                fused = self._up_to_date(blocks, conditioning)
        if fused is None:
            return [()] * len(blocks)
        modulations = F.linear(conditioning, *fused.adaln).unflatten(-1, (len(blocks), 6, 1, -1))
        modulations[:, :, 1::3] += 1  # adaLN gives its scales relative to one
        return list(zip(modulations.unbind(1), fused.weights, strict=True))

    def _up_to_date(self, blocks: nn.ModuleList, like: torch.Tensor) -> "_Fused | None":
        fused = self._fused
        if fused is not None and fused.snapshot.still_holds(blocks, like):
            return fused
        with self._lock:
            self._fused = None
            if self._depth == 0 or self._num_builds == _MOST_BUILDS or not _are_plain(blocks, like):
                return None
            self._num_builds += 1
            try:
                self._fused = _Fused.of(blocks, like)
            except torch.OutOfMemoryError:
                self._num_builds = _MOST_BUILDS
                warn_once("There is no memory for fused copies of weights: blocks run as modules.")
            return self._fused


class _Fused(NamedTuple):
    """Fused weights of all blocks, and what they depend on."""

    snapshot: "_Snapshot"
    adaln: tuple[torch.Tensor, torch.Tensor]
    weights: list[BlockWeights]

    @classmethod
    @torch.no_grad()
    def of(cls, blocks: nn.ModuleList, like: torch.Tensor) -> "_Fused":
        snapshot = _Snapshot(blocks, like)
        weights = []
        for block in blocks:
            attn, ff = block.attn, block.ff
            qkv = _stacked([attn.to_q, attn.to_k, attn.to_v])
            others = [(layer.weight, layer.bias) for layer in (attn.to_out[0], ff.linear_1, ff.linear_2)]
            weights.append(BlockWeights(attn.heads, *qkv, *(tensor for pair in others for tensor in pair)))
        return cls(snapshot, _stacked([block.adaln for block in blocks]), weights)


class _Snapshot:
    """What fused weights depend on, kept in lists that are quick to compare: they are at every forward.

    Args:
        blocks: blocks that are plain, so that no module of theirs has a hook.
        like: an input of their layers, for its device and dtype.
    """

    def __init__(self, blocks: nn.ModuleList, like: torch.Tensor):
        attentions, feeds = [block.attn for block in blocks], [block.ff for block in blocks]
        self.blocks, self.attentions = blocks, attentions
        self.norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
        self.places = [(blocks._modules, name) for name in blocks._modules]
        parts = ("norm1", "attn", "norm2", "ff", "adaln")
        self.places += [(block._modules, name) for block in blocks for name in parts]
        self.places += [(attn._modules, name) for attn in attentions for name in ("to_q", "to_k", "to_v", "to_out")]
        self.places += [(attn.to_out._modules, "0") for attn in attentions]
        self.places += [(feed._modules, name) for feed in feeds for name in ("linear_1", "linear_2")]
        self.modules = self._modules_now()
        self.types = [type(module) for module in self.modules]
        self.hooks = [h for module in self.modules for h in (module._forward_hooks, module._forward_pre_hooks)]
        self.attributes = [module.__dict__ for module in self.modules]
        stacked = [block.adaln for block in blocks]
        stacked += [layer for attn in attentions for layer in (attn.to_q, attn.to_k, attn.to_v)]
        self.copied = [layer._parameters for layer in stacked]
        used = [attn.to_out[0] for attn in attentions]
        used += [layer for feed in feeds for layer in (feed.linear_1, feed.linear_2)]
        self.used = [layer._parameters for layer in used]
        self.weights = self._weights_now()
        # Held so that no other weight can come to lie where these do
        self.held = [weight.data for layer in (*stacked, *used) for weight in layer.parameters()]
        self.settings = self._settings_now(like)

    def still_holds(self, blocks: nn.ModuleList, like: torch.Tensor) -> bool:
        """Whether all is as it was."""
        try:
            return (
                blocks is self.blocks
                and len(blocks) == len(self.attentions)
                and self._settings_now(like) == self.settings
                and self._modules_now() == self.modules  # by identity
                and [type(module) for module in self.modules] == self.types
                and not any(self.hooks)
                and not ["forward" for attributes in self.attributes if "forward" in attributes]
                and self._weights_now() == self.weights
            )
        except (KeyError, AttributeError, RuntimeError):  # other modules, or weights that lie nowhere
            return False

    def _settings_now(self, like: torch.Tensor) -> list:
        processors = [attn.processor for attn in self.attentions]
        return [
            (like.dtype, like.device, _is_autocast(like), _is_default_attention_native(), _has_any_global_hook()),
            processors,
            [(processor._attention_backend, processor._parallel_config) for processor in processors],
            [(attn.heads, attn.fused_projections) for attn in self.attentions],
            [norm.eps for norm in self.norms],
        ]

    def _modules_now(self) -> list[nn.Module]:
        return [modules[name] for modules, name in self.places]

    def _weights_now(self) -> list[int]:
        """Where weights lie, and how often those that were copied have been changed there."""
        copied = [weight for parameters in self.copied for weight in parameters.values()]
        used = [weight.data_ptr() for parameters in self.used for weight in parameters.values()]
        return [weight.data_ptr() for weight in copied] + [weight._version for weight in copied] + used


class FusedBlocksMixin:
    """A model with nets that have `transformer_blocks` and, as `fusion`, their `FusedBlocks`."""

    @contextmanager
    def fused_blocks(self) -> Iterator[None]:
        """Within this context forwards without gradients run on fused blocks, where these are plain.

        `D2iTPipeline` enters it for a sampling call. It takes memory for a copy of the weights of adaLN and of query,
        key and value, about half of the model. Inside, weights and modules may be replaced, hooked and trained; but do
        not write into `weight.data` in place, as moving averages do and the fusing of LoRA: copies do not follow.
        """
        fusions = [module.fusion for module in self.modules() if "fusion" in vars(module)]
        for fusion in fusions:
            fusion.begin()
        try:
            yield
        finally:
            for fusion in fusions:
                fusion.end()


def _are_plain(blocks: nn.ModuleList, like: torch.Tensor) -> bool:
    """Whether blocks are no more than their operators, with weights that lie ready where the input `like` does."""
    return (
        _is_default_attention_native()
        and not _is_autocast(like)
        and not _has_any_global_hook()
        and len(blocks) > 0
        and all(_is_plain_block(block, like) for block in blocks)
    )


def _is_plain_block(block: nn.Module, like: torch.Tensor) -> bool:
    if not (_is_as_written(block) and _is_as_written(block.attn) and _is_as_written(block.ff)):
        return False
    attn, ff, norms = block.attn, block.ff, (block.norm1, block.norm2)
    qkv = (attn.to_q, attn.to_k, attn.to_v)
    layers = (*qkv, attn.to_out[0], ff.linear_1, ff.linear_2, block.adaln)
    return (
        _has_default_attention(attn)
        and all(_is_plain_linear(layer, like) for layer in layers)
        and len({layer.weight.shape for layer in qkv}) == 1
        and all(type(norm) is nn.LayerNorm and norm.weight is norm.bias is None for norm in norms)
        and all(norm.eps == _EPS and norm.normalized_shape == like.shape[-1:] for norm in norms)
        and not any(_extras_of(norm) for norm in norms)
    )


def _is_as_written(module: nn.Module) -> bool:
    """Whether a module is of a class that `fused_block` writes out, and no subclass, and nothing is hooked to it."""
    replaced = any(name in vars(module) for name in ("modulated", "project"))
    return vars(type(module)).get("is_fusible", False) and not replaced and not _extras_of(module)


def _has_default_attention(attn: nn.Module) -> bool:
    processor = attn.processor
    return (
        type(processor) is attn._default_processor_cls
        and (processor._attention_backend, processor._parallel_config) == (None, None)
        and not attn.fused_projections
    )


def _is_default_attention_native() -> bool:
    """Whether diffusers takes torch's own attention where no backend has been chosen for a module."""
    return (
        _AttentionBackendRegistry is not None
        and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    )


def _is_autocast(like: torch.Tensor) -> bool:
    device = like.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _is_plain_linear(layer: nn.Module, like: torch.Tensor) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is type(layer.bias) is nn.Parameter
        and layer.weight.dtype == layer.bias.dtype == like.dtype
        and layer.weight.device == layer.bias.device == like.device
        and not layer.weight.is_inference()  # such weights do not count their changes
        and not _extras_of(layer)
    )


def _extras_of(module: nn.Module) -> object:
    """What a call of a module does beside its own forward, something that is true: hooks, or another forward."""
    # Hooks of accelerate and diffusers, which offload or cast weights or keep results, replace it
    return module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__


def _stacked(layers: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
