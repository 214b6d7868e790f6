# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Work in small steps that is done with the time which a training leaves, and by whoever waits for it."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from threading import Event, Lock, Thread


_GRACE = 0.05  # seconds: who waits sooner finds nothing begun


class BackgroundWork:
    """Steps of one job, done one after another by a thread with the lowest priority, from now on.

    Whoever calls `finish` does the rest itself: the thread may get next to nothing of a busy machine, and a step of it
    is all that is waited for. A process does not end before its job.

    Args:
        steps: does a step whenever the next element is asked for, and may raise an error, which ends the job.
    """

    def __init__(self, steps: Iterator[None]):
        self._steps = steps
        self._turn = Lock()
        self._awaited = Event()
        self._error: BaseException | None = None
        self._done = False
        Thread(target=self._do_aside, name="background").start()

    @property
    def failed(self) -> bool:
        """Whether an error has ended the job; `finish` raises it."""
        return self._error is not None

    def finish(self) -> None:
        """Do what is left of the job, and raise the error that ended it, if one has."""
        self._awaited.set()
        while self._step():
            pass
        if self._error is not None:
            raise self._error

    def _do_aside(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own, which it never gets back
            with suppress(OSError):  # a sandbox may forbid it
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        self._awaited.wait(_GRACE)
        while not self._awaited.is_set() and self._step():
            pass

    def _step(self) -> bool:
        """Do a step, and return whether there may be another."""
        with self._turn:
            if not self._done:
                try:
                    next(self._steps)
                except StopIteration:
                    self._done = True
                except BaseException as error:
                    self._error, self._done = error, True
            return not self._done
