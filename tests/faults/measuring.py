# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What an attempt costs: how long it takes, and how much memory it takes at its peak."""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil


MOST_SECONDS = 1.0  # of the processor, not of the clock
MOST_BYTES = 200e6


@dataclass
class Attempt:
    """What came of a call.

    Args:
        result: what it returned, None after an error.
        error: what it raised.
        seconds: how long the processor worked at it: other programs make no difference.
        num_bytes: how far the memory of this process rose above what it was.
        warnings: what the library has logged as a warning meanwhile.
    """

    result: object
    error: Exception | None
    seconds: float
    num_bytes: int
    warnings: tuple[str, ...] = ()

    def problem(self, *expected: str) -> str | None:
        """What is wrong with the refusal that the call should have been; `expected` are words that it must have."""
        if self.error is None:
            return "was accepted"
        if not isinstance(self.error, ValueError):
            return f"raised {type(self.error).__name__}: {self.error}"
        if not str(self.error).replace("\n", "").isprintable():
            return f"drives a terminal: {self.error!r}"
        missing = [words for words in expected if words not in str(self.error)]
        return f"does not say {missing}: {self.error}" if missing else self.costs()

    def unnamed(self, *expected: str) -> str | None:
        """What is wrong if neither an error nor a warning has these words."""
        if isinstance(self.error, ValueError) and self.problem(*expected) is None:
            return None
        if not isinstance(self.error, ValueError | None):
            return f"raised {type(self.error).__name__}: {self.error}"
        named = any(all(words in warning for words in expected) for warning in self.warnings)
        return self.costs() if named else f"no warning says {expected}: {self.warnings}"

    def costs(self) -> str | None:
        """What the call took too much of, if anything."""
        if self.seconds > MOST_SECONDS:
            return f"took {self.seconds:.1f} s"
        return f"took {self.num_bytes / 1e6:.0f} MB" if self.num_bytes > MOST_BYTES else None


def attempt(call: Callable[[], object]) -> Attempt:
    """Make a call and note what it did."""
    result = error = None
    logged = _Logged()
    logging.getLogger("diffusers_d2it").addHandler(logged)
    before = psutil.Process().memory_info().rss
    _forget_peak()
    start = time.process_time()
    try:
        result = call()
    except Exception as caught:
        error = caught
    finally:
        logging.getLogger("diffusers_d2it").removeHandler(logged)
    seconds = time.process_time() - start
    return Attempt(result, error, seconds, _peak() - before, tuple(logged.texts))


class _Logged(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _forget_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    if sys.platform != "linux":  # elsewhere what is left afterwards has to do
        return psutil.Process().memory_info().rss
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
