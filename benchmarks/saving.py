# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How long does a training stand still for a checkpoint, which is written beside it?

    python benchmarks/saving.py --threads 2

A checkpoint holds weights, average and moments. `save` copies them into memory, which the training waits for; the rest
is done by a thread: files, their hashes, the disk. Against the time that all of it takes with nothing beside it stand
the copy alone, and the copy with what a training loses that goes on: the thread works during every other update, until
all is written, and what these updates take longer than those between is lost. That is a small difference of long
times: it wants many turns, and a quiet machine.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from threading import Event

import torch
from common import Bench, Flag, main
from original_dit import DiTShape
from torch.optim.lr_scheduler import LambdaLR
from training_sides import Batch, Training, make_batches

from diffusers_d2it import D2iTContentModel, load_preset
from diffusers_d2it.training import Checkpoints


FINE_RATIO = 0.5
DIMENSIONS = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "num_classes")


class HeldCheckpoints(Checkpoints):
    """Checkpoints whose thread works while it may."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.may_work, self.written = Event(), False

    def _write(self, final: Path, state: str) -> Iterator[None]:
        for _ in super()._write(final, state):
            self.may_work.wait()
            yield
        self.written = True


class Sides:
    """A training of which one checkpoint is kept."""

    def __init__(self, bench: Bench, model: D2iTContentModel, folder: Path, batch: Batch):
        self.model, self.batch = model, batch
        self.training = training = Training(model, bench.device)
        optimizers, schedule = {"optimizer": training.optimizer}, LambdaLR(training.optimizer.optimizer, lambda _: 1)
        state = (training.accelerator, folder, model, training.ema, optimizers, schedule, training.gate)
        self.checkpoints = HeldCheckpoints(*state, total_limit=1)
        self.synchronize = bench.synchronize
        self.steps = count(1)

    def save(self) -> float:
        """Begin a checkpoint; the seconds of the copy."""
        start = time.perf_counter()
        self.checkpoints.save(next(self.steps))
        return time.perf_counter() - start

    def update(self) -> float:
        """Make an update; its seconds."""
        start = time.perf_counter()
        self.training.step(self.model, self.batch)
        self.synchronize()
        return time.perf_counter() - start

    def alone(self) -> tuple[float, float, float]:
        """Write a checkpoint with nothing beside it: seconds, those of the copy, and those of a processor after it."""
        self.checkpoints.may_work.set()
        start = time.perf_counter()
        copy = self.save()
        computed = time.process_time()
        self.checkpoints.finish()
        return time.perf_counter() - start, copy, time.process_time() - computed

    def beside_updates(self) -> tuple[float, list[float], list[float]]:
        """Write one during every other update: seconds of the copy, of the updates meanwhile, of those between."""
        self.checkpoints.may_work.clear()
        self.checkpoints.written = False
        copy, during, between = self.save(), [], []
        while not self.checkpoints.written:
            self.checkpoints.may_work.set()
            during.append(self.update())
            self.checkpoints.may_work.clear()
            between.append(self.update())
        self.checkpoints.may_work.set()
        self.checkpoints.finish()
        return copy, during, between


def measure(bench: Bench, preset: str) -> str:
    torch.manual_seed(0)
    model = D2iTContentModel(**load_preset(preset)).to(bench.device).train()
    shape = DiTShape(*(model.config[name] for name in DIMENSIONS))
    (batch, *_) = make_batches(shape, 1, FINE_RATIO, bench.device)
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(bench, model, Path(folder), batch)
        sides.update()  # moments
        sides.alone()
        turns = [(*sides.alone(), *sides.beside_updates()) for _ in range(bench.repeats)]
    alone, copies, computing, *_ = zip(*turns)
    beside = [copy + sum(during) for *_, copy, during, _ in turns]
    lost = [copy + sum(during) - sum(between) for *_, copy, during, between in turns]
    whole = bench.record("a checkpoint, nothing beside it", [1e3 * seconds for seconds in alone])
    copy = bench.record("of these the copy into memory", [1e3 * seconds for seconds in copies])
    bench.record("a checkpoint beside updates", [1e3 * seconds for seconds in beside])
    bench.note("GiB of weights, average and moments", 4 * sum(w.nbytes for w in model.parameters()) / 2**30)
    bench.note("seconds of a processor that the thread computes", statistics.median(computing))
    bench.note("updates during a checkpoint", statistics.median(len(during) for *_, during, _ in turns))
    mean = statistics.mean(lost)  # of turns that scatter widely
    bench.note("seconds that the updates lose", mean)
    if bench.repeats > 1:
        bench.note("standard error of these", statistics.stdev(lost) / bench.repeats**0.5)
    bench.claim("copy / writing a checkpoint", copy / whole, 0.15)
    bench.note("what the updates lose / writing it beside them", mean / statistics.median(beside))
    bench.claim("what the updates lose / writing a checkpoint", 1e3 * mean / whole, 0.15)
    return f"Saving {preset} while it trains"


if __name__ == "__main__":
    main(
        measure,
        most_turns={"cpu": 12, "cuda": 20},
        preset=Flag("content-b", "preset of the content model"),
    )
