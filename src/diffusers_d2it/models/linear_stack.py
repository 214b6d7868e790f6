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
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.is_checked_outside = False

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

    def clear(self) -> None:
        """Forget the common memory; the layers keep their parts of it."""
        self.weight = self.bias = None

    def refresh(self, layers: Sequence[nn.Module], like: torch.Tensor) -> bool:
        """Make sure that the stack computes what the layers do.

        Args:
            layers: all with the same input; the same layers at every call.
            like: an input, for its device and dtype.

        Returns:
            Whether it does. False, and the stack is cleared, where a layer is not a plain `nn.Linear` whose weights
            lie ready on the device: adapters, quantised, sharded, cast or offloaded weights.
        """
        if not all(is_plain(layer, like) for layer in layers):
            self.clear()
            return False
        if self.weight is None or not self._holds(layers):
            self._gather(layers)
        return True

    def _holds(self, layers: Sequence[nn.Linear]) -> bool:
        weight, bias = self.weight.data_ptr(), self.bias.data_ptr()
        for layer in layers:
            if layer.weight.data_ptr() != weight or layer.bias.data_ptr() != bias:
                return False
            weight += layer.weight.nbytes
            bias += layer.bias.nbytes
        return self.weight.dtype == layers[0].weight.dtype

    @torch.inference_mode(False)  # a training step may follow, which the memory has to serve too
    @torch.no_grad()
    def _gather(self, layers: Sequence[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = torch.cat([layer.bias.detach() for layer in layers])
        rows = [layer.out_features for layer in layers]
        for layer, weight, bias in zip(layers, self.weight.split(rows), self.bias.split(rows)):
            layer.weight.data, layer.bias.data = weight, bias


def state_of(layers: list[nn.Module]) -> list:
    """What `LinearStack.refresh` decides by, in a form that is quick to make and to compare.

    Made at every forward of every layer of a model: if it is the last one's, nothing has to be refreshed.
    """
    try:
        weights_at = [weight.data_ptr() for layer in layers for weight in layer._parameters.values()]
    except (AttributeError, RuntimeError):  # no weight, or one that lies nowhere: such layers are not plain
        weights_at = [object()]
    return [layers, weights_at, [extras_of(layer) for layer in layers]]  # layers are compared by identity


def extras_of(module: nn.Module) -> object:
    """What a call of a module does beside its own forward, something that is true: hooks, or another forward."""
    # Hooks of accelerate and diffusers, which offload or cast weights or keep results, replace it
    return module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__


def is_plain(layer: nn.Module, like: torch.Tensor) -> bool:
    """Whether a layer is no more than a matrix product with weights that lie where the input `like` does."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is type(layer.bias) is nn.Parameter
        and layer.weight.dtype == layer.bias.dtype == like.dtype
        and layer.weight.device == layer.bias.device == like.device
        and not layer.weight.is_inference()
        and layer.bias.nbytes % _ALIGNMENT == layer.weight.nbytes % _ALIGNMENT == 0
        and not extras_of(layer)
    )
