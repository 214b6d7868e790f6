# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What happens where a fast path cannot serve: the plain one does, after one warning that says why."""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn


logger = logging.getLogger(__name__)


@lru_cache(maxsize=128)
def warn_once(message: str) -> None:
    """Log a warning, the first time it is given."""
    logger.warning(message)


class CompiledMixin:
    """Models, or their blocks, that are compiled as long as they can be.

    A compiler may be missing, or fail on a shape, a dtype or a device, and is only asked when an input comes: hours
    after `compile` perhaps. What was compiled then runs as it is.
    """

    def compile(self, *args, **kwargs) -> None:
        """As of torch: compile the model as one graph, `torch.compile(model, *args, **kwargs)`, in place.

        If the compiler fails later, one warning gives its reason and the model runs uncompiled from then on. A
        backward graph is compiled in the backward pass: where that fails, it raises.
        """
        super().compile(*args, **kwargs)
        _CompilerState(type(self).__name__).watch([self])

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """As of diffusers: compile every block by itself, `torch.compile(block, *args, **kwargs)`, in place.

        If the compiler fails later, one warning gives its reason and all blocks run uncompiled from then on. A
        backward graph is compiled in the backward pass: where that fails, it raises.
        """
        super().compile_repeated_blocks(*args, **kwargs)
        blocks = [module for module in self.modules() if type(module).__name__ in self._repeated_blocks]
        _CompilerState(type(self).__name__).watch(blocks)


class _CompilerState:
    """What the compiled modules of a model know together of their compiler."""

    def __init__(self, model_name: str):
        self.model_name = model_name
        self.modules: list[nn.Module] = []

    def watch(self, modules: list[nn.Module]) -> None:
        """Let compiled modules run uncompiled once the compiler has failed for one of them."""
        self.modules = modules
        for module in modules:
            module._compiled_call_impl = _CompiledOrPlain(module, self)

    def fail(self, error: Exception) -> None:
        for module in self.modules:
            module._compiled_call_impl = None
        cause = getattr(error, "inner_exception", None) or error.__cause__ or error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        logger.warning(
            "%s runs uncompiled from here on. The compiler failed, %s: %s",
            self.model_name,
            type(cause).__name__,
            reason,
        )


class _CompiledOrPlain:
    """A call of a module: compiled, or plain once the compiler has failed."""

    def __init__(self, module: nn.Module, state: _CompilerState):
        self.compiled: Callable = module._compiled_call_impl
        self.plain: Callable = module._call_impl
        self.state = state

    def __call__(self, *args, **kwargs) -> Any:
        # Slow to import, and here they have been
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return self.compiled(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            output = self.plain(*args, **kwargs)  # raises what is wrong with the input, if that is what it was
            self.state.fail(error)
            return output
