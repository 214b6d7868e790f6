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


class CompiledBlocksMixin:
    """Blocks that are compiled as long as they can be.

    A compiler may be missing, or fail on a shape, a dtype or a device, and is only asked when an input comes: hours
    after `compile_repeated_blocks` perhaps. The blocks then run as they are.
    """

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """As of diffusers: compile every block by itself, `torch.compile(block, *args, **kwargs)`.

        If the compiler fails later, one warning gives its reason and all blocks run uncompiled from then on.
        """
        super().compile_repeated_blocks(*args, **kwargs)
        blocks = [module for module in self.modules() if type(module).__name__ in self._repeated_blocks]
        state = _CompilerState(type(self).__name__)
        for block in blocks:
            block._compiled_call_impl = _CompiledOrPlain(block, state)


class _CompilerState:
    """What the blocks of a model know together of their compiler."""

    def __init__(self, model_name: str):
        self.model_name = model_name
        self.has_failed = False

    def fail(self, error: Exception) -> None:
        self.has_failed = True
        cause = getattr(error, "inner_exception", None) or error.__cause__ or error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        logger.warning(
            "%s runs without compiled blocks from here on. The compiler failed, %s: %s",
            self.model_name,
            type(cause).__name__,
            reason,
        )


class _CompiledOrPlain:
    """A call of a block: compiled, or plain once the compiler has failed."""

    def __init__(self, block: nn.Module, state: _CompilerState):
        self.compiled: Callable = block._compiled_call_impl
        self.plain: Callable = block._call_impl
        self.state = state

    def __call__(self, *args, **kwargs) -> Any:
        # Slow to import, and here they have been
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if not self.state.has_failed:
            try:
                return self.compiled(*args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # before anything of the block has run
                self.state.fail(error)
        return self.plain(*args, **kwargs)
