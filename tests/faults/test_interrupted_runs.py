# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A run that is killed, stopped and resumed again and again sees, logs and becomes what an undisturbed one does."""

import json
import os
import random
import signal
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from injection import limited_file_size
from safetensors import safe_open
from training_runs import STEPS, batches_seen, loss_curve, train

from diffusers_d2it.files import lock
from diffusers_d2it.files.folders import verify
from diffusers_d2it.training import found_checkpoints


SCRIPTS = ["train_grain.py", "train_d2it.py", "train_dcdit.py", "train_dvae.py"]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """undisturbed(script): the folder of a run without interruption."""
    folder, done = tmp_path_factory.mktemp("undisturbed"), {}

    def run(script: str) -> Path:
        if script not in done:
            done[script] = folder / Path(script).stem
            assert train(script, done[script], inputs.flags(script)) == 0
        return done[script]

    return run


def strike_at(at: int | None, number: int | None, batch: dict, index: int) -> None:
    """Send a signal to this process when it gets batch number `at`."""
    if index == at:
        os.kill(os.getpid(), number)


def contents(checkpoint: Path) -> dict[str, object]:
    """Everything that a checkpoint says, by file and name."""
    found: dict[str, object] = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                found |= {f"{name}:{key}": file.get_tensor(key).tobytes() for key in file.keys()}
        elif path.suffix == ".json" and path.name != "manifest.json":
            found[name] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_resumed_again_and_again_equals_an_undisturbed_one(
    script, inputs, undisturbed, tmp_path, fault, repeats
):
    count = fault(f"{script} killed or stopped, and resumed")
    expected = undisturbed(script)
    generator = random.Random(0)
    for trial in range(repeats(1, 7)):
        output_dir = tmp_path / f"run-{trial}"
        # Batches until the next strike; the first comes in the last step of the first epoch, after a checkpoint
        per_step = inputs.flags(script).get("gradient_accumulation_steps", 1)
        strikes = [generator.randrange(*(per_step * step for step in steps)) for steps in ((3, 4), (0, 3), (0, 2))]
        signals = generator.sample([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], 3)
        if trial == 0:
            signals = [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1]
        statuses = []
        for resumed, (at, number) in enumerate([*zip(strikes, signals), (None, None)]):
            flags = inputs.flags(script) | {"dataloader_num_workers": resumed % 3}
            if resumed:
                flags["resume_from_checkpoint"] = "latest"
            statuses.append(train(script, output_dir, flags, partial(strike_at, at, number)))
        codes = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
        assert statuses == [*(codes[number] for number in signals), 0], (strikes, signals)
        last = f"checkpoint-{STEPS}"
        same = contents(output_dir / last) == contents(expected / last)
        same &= batches_seen(output_dir) == batches_seen(expected) and loss_curve(output_dir) == loss_curve(expected)
        for _ in strikes:
            count.tried((strikes, signals), silent=not same)
    assert len(loss_curve(expected)) == STEPS and all(len(values) == 1 for values in loss_curve(expected).values())


def test_a_second_job_in_the_folder_is_refused(tmp_path, fault):
    count = fault("second job in the folder of a run: refused, and let in when the first is killed")
    read, write = os.pipe()
    first = os.fork()
    if first == 0:
        try:
            with lock(tmp_path):
                worker = os.fork()  # of those that decode images: it takes a while to notice that its parent is dead
                if worker:
                    os.write(write, worker.to_bytes(4, "big"))
                signal.pause()
        finally:
            os._exit(1)
    try:
        worker = int.from_bytes(os.read(read, 4), "big")
        try:
            lock(tmp_path)
        except ValueError as error:
            count.tried(error, silent=str(tmp_path) not in str(error))
        else:
            count.tried("both work there", silent=True)
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    (tmp_path / ".staging-checkpoint-3-01234567").mkdir()  # left by the one that was killed
    try:
        lock(tmp_path, wait=0).close()
    finally:
        os.kill(worker, signal.SIGKILL)
    count.tried("afterwards", lost=[path.name for path in tmp_path.iterdir()] != [])


def test_a_signal_to_a_run_and_its_workers_ends_it_after_it_was_saved(inputs, tmp_path, fault):
    """Of the signals only SIGTERM ends workers that get it; each to the run alone: tests/training/test_stopping.py."""
    count = fault("SIGTERM to the workers too: saved, exit code 143")
    output_dir = tmp_path / "run"

    def strike(_, index: int) -> None:
        if index == 4:
            # As a cluster does it: to the workers too, and not from their parent, from which they would bear it
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"])

    flags = inputs.flags("train_d2it.py") | {"dataloader_num_workers": 2}
    status = train("train_d2it.py", output_dir, flags, strike)
    verify(output_dir / "checkpoint-5")
    count.tried(status, lost=status != 143)


def test_a_disk_that_fails_ends_the_run_and_it_goes_on_from_the_checkpoint_before(
    inputs, undisturbed, tmp_path, fault
):
    count = fault("disk full from the second checkpoint on: the run ends, and goes on from the first")
    output_dir, flags = tmp_path / "run", inputs.flags("train_d2it.py")
    stack = ExitStack()

    def strike(_, index: int) -> None:
        if index == 5:
            while not (output_dir / "checkpoint-3").exists():
                pass  # it is being written
            stack.enter_context(limited_file_size(12_000))

    status = train("train_d2it.py", output_dir, flags, strike)
    found = [path.name for path in found_checkpoints(output_dir)]
    count.tried(f"status {status}, {found}", silent=status != 1, lost=found != ["checkpoint-3"])
    assert train("train_d2it.py", output_dir, flags | {"resume_from_checkpoint": "latest"}) == 0
    last = f"checkpoint-{STEPS}"
    same = contents(output_dir / last) == contents(undisturbed("train_d2it.py") / last)
    count.tried("resumed", silent=not same)


def test_a_signal_while_samples_are_drawn_does_not_wait_for_them(inputs, undisturbed, tmp_path, fault):
    count = fault("SIGTERM while samples are drawn: saved at once, and resumed as if nothing had happened")
    output_dir, flags = tmp_path / "run", inputs.flags("train_d2it.py")

    def never_ends(*_) -> None:
        signal.alarm(600)  # which ends a process that waits for them
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            signal.pause()

    status = train(
        "train_d2it.py",
        output_dir,
        flags | {"validation_steps": 4},
        change=lambda module: setattr(module, "validate", never_ends),
    )
    count.tried(status, lost=status != 143)
    verify(output_dir / "checkpoint-5")
    assert train("train_d2it.py", output_dir, flags | {"resume_from_checkpoint": "latest"}) == 0
    last = f"checkpoint-{STEPS}"
    same = contents(output_dir / last) == contents(undisturbed("train_d2it.py") / last)
    count.tried("resumed", silent=not same)
