# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Signals that ask a run to stop, wherever it runs and whatever has become of its terminal."""

import os
import pty
import signal
import threading
from contextlib import suppress
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from script_runs import in_processes
from small_runs import Numbers

from diffusers_d2it.data import make_loader
from diffusers_d2it.training import Run
from diffusers_d2it.training.stopping import StopSignals


NUMBERS = {"SIGINT": 130, "SIGHUP": 129, "SIGTERM": 143, "SIGUSR1": 143, "SIGUSR2": 143, "SIGXCPU": 143}


def steps_until_stopped(strike, num_steps: int = 4) -> tuple[int, int]:
    """Updates that a run makes if `strike(step)` is called in each, and its exit code."""
    accelerator = Accelerator(cpu=True)
    flags = {"seed": 0, "train_batch_size": 1, "checkpointing_steps": 9, "validation_steps": 9}
    run = Run(accelerator, 0, max_train_steps=num_steps, **flags)
    for _ in run.batches(make_loader(accelerator, Numbers(), batch_size=1)):
        strike(run.step)
        run.note({"loss": torch.zeros(())})
        run.end_of_step()
        if run.exit_code:
            break
    run._stop.close()
    return run.step, run.exit_code


@pytest.mark.parametrize("name, exit_code", NUMBERS.items())
def test_a_signal_ends_a_run_after_the_update(name, exit_code):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    found = steps_until_stopped(lambda step: step == 1 and os.kill(os.getpid(), number))
    assert found == (2, exit_code) and signal.getsignal(number) == before


def test_processes_stop_together_whichever_is_told_to():
    def told(step: int) -> None:
        if step == 1 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    assert in_processes(partial(steps_until_stopped, told)) == [[2, 143]] * 2


def test_what_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup does this
    try:
        assert steps_until_stopped(lambda step: os.kill(os.getpid(), signal.SIGHUP)) == (4, 0)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_side_thread_goes_on():
    found = []
    thread = threading.Thread(target=lambda: found.append(steps_until_stopped(lambda step: None)))
    thread.start()
    thread.join()
    assert found == [(4, 0)]


@pytest.mark.parametrize("stderr", ["closed", "no file", "none"])
def test_a_signal_is_noted_wherever_messages_go(stderr, monkeypatch, capfd):
    class NoFile:
        def write(self, text: str) -> None:
            pass

    kept = os.dup(2)
    if stderr == "closed":
        os.close(2)
    monkeypatch.setattr("sys.stderr", None if stderr == "none" else NoFile())
    stop = StopSignals(Accelerator(cpu=True))
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code() == 143
    finally:
        stop.close()
        os.dup2(kept, 2)
        os.close(kept)


def until_it_is_closed(step: int) -> None:
    if step == 1:
        os.write(1, b"begun")
        with suppress(OSError):
            os.read(0, 1)


def test_the_closing_of_a_terminal_ends_a_run_well():
    child, terminal = pty.fork()
    if child == 0:
        status = 1
        try:
            _, status = steps_until_stopped(until_it_is_closed)
        finally:
            os._exit(status)
    while b"begun" not in os.read(terminal, 1000):
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
