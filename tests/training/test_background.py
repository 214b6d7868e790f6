# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Work in the background is done once, in order, by the thread or by whoever waits, and its error is not lost."""

import threading
from collections.abc import Iterator
from threading import Event

import pytest
from script_runs import join_threads

from diffusers_d2it.training.background import BackgroundWork


def steps(done: list[tuple[int, str]], number: int = 5, error_at: int | None = None) -> Iterator[None]:
    for step in range(number):
        if step == error_at:
            raise OSError(f"step {step}")
        done.append((step, threading.current_thread().name))
        yield


def test_a_thread_does_all_of_it_if_nobody_waits():
    done = []
    work = BackgroundWork(steps(done))
    join_threads()
    assert done == [(step, "background") for step in range(5)] and not work.failed
    work.finish()
    assert len(done) == 5


def test_who_waits_at_once_does_it_alone():
    done = []
    BackgroundWork(steps(done)).finish()
    assert done == [(step, "MainThread") for step in range(5)]


def test_who_waits_later_does_the_rest():
    begun, goes_on, done = Event(), Event(), []

    def job() -> Iterator[None]:
        for step, _ in enumerate(steps(done)):
            if step == 1:
                begun.set()
                assert goes_on.wait(60)
            yield

    work = BackgroundWork(job())
    assert begun.wait(60)
    waiting = threading.Thread(target=work.finish, name="waits")
    waiting.start()
    assert work._awaited.wait(60)
    goes_on.set()
    waiting.join()
    join_threads()
    assert [step for step, _ in done] == list(range(5))
    assert [name for _, name in done] == ["background"] * 2 + ["waits"] * 3


@pytest.mark.parametrize("waits", [False, True])
def test_an_error_ends_it_and_is_raised_to_who_waits(waits):
    done = []
    work = BackgroundWork(steps(done, error_at=2))
    if not waits:
        join_threads()
        assert work.failed
    for _ in range(2):
        with pytest.raises(OSError, match="step 2"):
            work.finish()
    assert work.failed and len(done) == 2
