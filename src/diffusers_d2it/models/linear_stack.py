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

    A compiled graph cannot ask where weights lie. So it uses a stack only if `is_checked_outside`: if whoever calls
    the graph refreshes the stack before, at every call.
    """

    def __init__(self):
        self.is_checked_outside = False
        self.clear()

    def clear(self) -> None:
        """Forget the common memory; the layers keep their parts of it."""
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        # What `_holds` compares: the layers, where their weights lie, and what else they may have been given
        self._layers: list[nn.Module] = []
        self._parameters: list[dict[str, nn.Parameter]] = []
        self._weights_at: list[int] = []
        self._hooks: list[dict] = []
        self._attributes: list[dict] = []

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> the outputs of all layers side by side in the last dimension."""
        return F.linear(hidden_states, self.weight, self.bias)

    @property
    def is_ready(self) -> bool:
        """Whether the stack may be used here: it is refreshed, nothing is learned, no graph is on its own."""
        return (
            self.weight is not None
            and not torch.is_grad_enabled()
            and (self.is_checked_outside or not torch.compiler.is_compiling())
        )

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
        """Whether nothing has changed. Asked at every forward about every layer, so nothing is looked up twice."""
        return (
            self.weight.dtype == like.dtype
            and self.weight.device == like.device
            and list(layers) == self._layers  # by identity
            and _addresses(self._parameters) == self._weights_at
            and not any(self._hooks)
            and not any("forward" in attributes for attributes in self._attributes)
        )

    @torch.inference_mode(False)  # a training step may follow, which the memory has to serve too
    @torch.no_grad()
    def _gather(self, layers: Sequence[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = torch.cat([layer.bias.detach() for layer in layers])
        rows = [layer.out_features for layer in layers]
        for layer, weight, bias in zip(layers, self.weight.split(rows), self.bias.split(rows)):
            layer.weight.data, layer.bias.data = weight, bias
        self._layers = list(layers)
        self._parameters = [layer._parameters for layer in layers]
        self._weights_at = _addresses(self._parameters)
        self._hooks = [hooks for layer in layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
        self._attributes = [vars(layer) for layer in layers]


def _is_plain(layer: nn.Module, like: torch.Tensor) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is type(layer.bias) is nn.Parameter
        and layer.weight.dtype == layer.bias.dtype == like.dtype
        and layer.weight.device == layer.bias.device == like.device
        and not layer.weight.is_inference()
        and layer.bias.nbytes % _ALIGNMENT == layer.weight.nbytes % _ALIGNMENT == 0
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and "forward" not in vars(layer)  # hooks of accelerate and diffusers, which offload or cast weights
    )


def _addresses(parameters: list[dict[str, nn.Parameter]]) -> list[int]:
    return [parameter.data_ptr() for of_layer in parameters for parameter in of_layer.values()]
