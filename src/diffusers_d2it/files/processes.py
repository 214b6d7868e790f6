# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the processes of a run do for one another."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


T = TypeVar("T")


def on_main_process(accelerator: Accelerator | None, function: Callable[[], T]) -> T:
    """Call a function on the main process; what it returns or raises, all processes return or raise.

    Args:
        accelerator: its processes call this alike; None for a single process.
        function: what it returns and raises is pickled for the others.

    Raises:
        Exception: that of the function, in every process.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return function()
    outcome: list = [None]
    if accelerator.is_main_process:
        try:
            outcome = [(function(), None)]
        except Exception as error:
            outcome = [(None, error)]
    broadcast_object_list(outcome)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def gather(accelerator: Accelerator | None, value: T) -> list[T]:
    """What each process has, in their order, on all of them; it is pickled. None stands for a single process."""
    return [value] if accelerator is None or accelerator.num_processes == 1 else gather_object([value])


def place_of(accelerator: Accelerator | None) -> tuple[int, int]:
    """Which process this is, and of how many; None stands for a single one."""
    return (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
