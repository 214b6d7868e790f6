# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Faults of the disk and of the process at chosen moments: at every call that changes the disk, or at random ones.

A call is one of open-to-write (the file is then cut in half), fsync, rename, remove and mkdir. Weights are written by
compiled code that no Python sees: the whole file counts as one call, and with `limited_file_size` the kernel fails.
"""

import builtins
import errno
import io
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import safetensors.torch
from script_runs import join_threads


class Disk:
    """Counts the calls that change the disk, and fails at one of them.

    Args:
        fail_at: number of the call, counted from 0; None for none.
        fail: what happens there: raises an error, or ends the process.
    """

    def __init__(self, fail_at: int | None = None, fail: Callable[[], None] | None = None):
        self.fail_at = fail_at
        self.fail = fail
        self.num_calls = 0
        self.names: list[str] = []

    def _due(self, name: str) -> bool:
        self.num_calls += 1
        self.names.append(name)
        return self.num_calls - 1 == self.fail_at

    def _counted(self, name: str) -> Callable:
        real = getattr(os, name)

        def call(*args, **kwargs):
            if self._due(name):
                self.fail()
            return real(*args, **kwargs)

        return call

    def _open(self, file, mode="r", *args, **kwargs):
        opened = _REAL_OPEN(file, mode, *args, **kwargs)
        if not isinstance(file, int) and set(mode) & set("wax") and self._due("write"):
            return _HalfFile(opened, self.fail)
        return opened

    def _serialize_file(self, tensors, filename, *args, **kwargs):
        due = self._due("write")
        _REAL_SERIALIZE(tensors, filename, *args, **kwargs)
        if due:
            os.truncate(filename, os.path.getsize(filename) // 2)
            self.fail()

    @contextmanager
    def active(self) -> Iterator["Disk"]:
        """Stand between the code under test and the disk."""
        names = ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir")
        patches = [mock.patch.object(os, name, self._counted(name)) for name in names]
        patches += [mock.patch.object(module, "open", self._open) for module in (builtins, io)]
        patches += [mock.patch.object(safetensors.torch, "serialize_file", self._serialize_file)]
        for patch in patches:
            patch.start()
        try:
            yield self
        finally:
            for patch in patches:
                patch.stop()


_REAL_OPEN = io.open
_REAL_SERIALIZE = safetensors.torch.serialize_file


class _HalfFile:
    """A file that takes half of what is written first, and then fails."""

    def __init__(self, file, fail: Callable[[], None]):
        self._file = file
        self._fail = fail

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._fail()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def io_error() -> None:
    """What a disk says that fails."""
    raise OSError(errno.EIO, "injected: the disk failed")


def die() -> None:
    """End the process without any clearing up, as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function: Callable[[], object], kill_after: float | None = None) -> int:
    """Run a function in a forked process, with a process group of its own, and kill it after some seconds, if given.

    Returns:
        Its exit status: 0, that of `sys.exit`, 1 after another exception, minus the number of a signal that ended it.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgrp()
            _quiet()
            function()
            status = 0
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            join_threads()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)  # the moment is the fault
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """No file of this process grows over a size: the kernel fails every further write, whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _quiet() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
