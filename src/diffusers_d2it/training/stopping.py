# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A run that is asked to stop finishes its update, saves and ends."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


# Ctrl-C; the closing of a terminal; what cluster schedulers and containers send before they kill; and what some
# schedulers send a while before that. Windows does not have all of them.
_NAMES = {"SIGINT": 130, "SIGHUP": 129, "SIGTERM": 143, "SIGUSR1": 143, "SIGUSR2": 143, "SIGXCPU": 143}
_EXIT_CODES = {getattr(signal, name): code for name, code in _NAMES.items() if hasattr(signal, name)}
_STDERR = 2  # the file: `sys.stderr` may be anything, and be what the signal interrupted

_PR_SET_PDEATHSIG = 1  # of Linux: send this process a signal when its parent dies


class _Interrupted(BaseException):
    """Ends what changes nothing of the run, so that it can be saved at once."""


class StopSignals:
    """Notes the signals that ask to stop while a training loop runs.

    One that is ignored, as SIGHUP under nohup, stays so; in a side thread Python lets none be noted.

        stop = StopSignals(accelerator)
        ...                             # an update
        exit_code = stop.exit_code()    # not 0: save, and exit with it
        ...
        stop.close()

    Args:
        accelerator: its processes stop together, whichever of them was told to.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._signal = 0
        self._may_interrupt = False
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            noted = [number for number in _EXIT_CODES if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._note) for number in noted}
        _follow_launcher()

    def close(self) -> None:
        """Let the signals do again what they did before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not set from Python

    def exit_code(self) -> int:
        """128 plus its number, as a shell reports a signal, if any process was asked to stop; else 0. All call it.

        Signals that announce a SIGTERM count as one.
        """
        code = _EXIT_CODES.get(self._signal, 0)
        if self.accelerator.num_processes == 1:
            return code
        return int(self.accelerator.gather(torch.tensor([code], device=self.accelerator.device)).max())

    def interruptible(self, function: Callable, *args: Any) -> Any:
        """`function(*args)`, or None if a signal ended it: for what takes long and changes nothing of the run."""
        with suppress(_Interrupted):
            try:
                self._may_interrupt = True
                return None if self._signal else function(*args)
            finally:
                self._may_interrupt = False

    def _note(self, number: int, frame: object) -> None:
        if not self._signal:
            self._signal = number
            text = f"\n{signal.Signals(number).name}: the update is finished and saved, then the run ends.\n"
            with suppress(OSError):  # it may be closed, as that of a terminal that is gone
                os.write(_STDERR, text.encode())
        if self._may_interrupt:
            self._may_interrupt = False
            raise _Interrupted


def _follow_launcher() -> None:
    """Let the end of the launcher stop this run: `accelerate launch` of one process does not pass signals on."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if parent.is_file() and b"accelerate" in parent.read_bytes():  # of a shell that ends a run may stay
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
