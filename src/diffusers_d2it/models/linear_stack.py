# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Linear layers that read one input, computed as one matrix product while nothing is learned.

A small batch is bound by the number of operators, not by their arithmetic, and DiT has many small linear layers: three
projections before attention, and adaLN's in every block, all of which read the same conditioning.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


# Bytes. Parts that begin where memory of their own would begin are computed to the same last bit in training: a run
# that drew samples in between ends in the same weights as one that did not.
_ALIGNMENT = 64


class LinearStack:
    """Linear layers of one input as one, for inference.

        stack = LinearStack()
        if stack.refresh([to_q, to_k, to_v], like=hidden_states):
            query, key, value = stack(hidden_states).chunk(3, dim=-1)

    Their weights move into one piece of memory, of which every layer keeps its own part. They stay parameters of their
    layers under their own names: nothing is held twice, a change in place is seen at once, and checkpoints, optimizers
    and averages notice nothing. What replaces a weight or a layer (a move to another device, LoRA, quantisation)
    is noticed by `refresh`, which moves the weights together again or says that it cannot be done.
    """

    def __init__(self):
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self._parts: list[tuple] = []  # each layer with its weights and where they lie

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> the outputs of all layers side by side in the last dimension."""
        return F.linear(hidden_states, self.weight, self.bias)

    def clear(self) -> None:
        """Forget the common memory; the layers keep theirs."""
        self.weight = self.bias = None
        self._parts = []

    def refresh(self, layers: Sequence[nn.Module], like: torch.Tensor) -> bool:
        """Make sure that the stack computes what the layers do.

        Args:
            layers: all with the same input; the same layers at every call.
            like: an input, for its device and dtype.

        Returns:
            Whether it does. False, and the stack is cleared, where a layer is not a plain `nn.Linear` whose weights
            lie ready on the device: adapters, quantised, sharded, cast or offloaded weights.
        """
        if self.weight is not None and self._holds(layers, like):
            return True
        self.clear()
        if not all(_is_plain(layer, like) for layer in layers):
            return False
        self._gather(layers)
        return True

    def _holds(self, layers: Sequence[nn.Module], like: torch.Tensor) -> bool:
        """Whether nothing has changed, asked at every forward and of every layer: so nothing is looked up twice."""
        if self.weight.dtype != like.dtype or self.weight.device != like.device:
            return False
        for layer, (held, parameters, weight, weight_at, bias, bias_at) in zip(layers, self._parts):
            if (
                layer is not held
                or parameters["weight"] is not weight
                or parameters["bias"] is not bias
                or weight.data_ptr() != weight_at
                or bias.data_ptr() != bias_at
                or _is_hooked(layer)
            ):
                return False
        return True

    @torch.inference_mode(False)  # a training step may follow, which the memory has to serve too
    @torch.no_grad()
    def _gather(self, layers: Sequence[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = torch.cat([layer.bias.detach() for layer in layers])
        rows = [layer.out_features for layer in layers]
        for layer, weight, bias in zip(layers, self.weight.split(rows), self.bias.split(rows)):
            layer.weight.data, layer.bias.data = weight, bias
            part = (layer, layer._parameters, layer.weight, weight.data_ptr(), layer.bias, bias.data_ptr())
            self._parts.append(part)


def _is_plain(layer: nn.Module, like: torch.Tensor) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is type(layer.bias) is nn.Parameter
        and layer.weight.dtype == layer.bias.dtype == like.dtype
        and layer.weight.device == layer.bias.device == like.device
        and not layer.weight.is_inference()
        and layer.bias.nbytes % _ALIGNMENT == layer.weight.nbytes % _ALIGNMENT == 0
        and not _is_hooked(layer)
    )


def _is_hooked(layer: nn.Module) -> bool:
    # Hooks of accelerate and diffusers, which offload or cast weights, replace `forward`
    return bool(layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__)
