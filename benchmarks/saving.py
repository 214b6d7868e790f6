# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How long does a training stand still for a checkpoint, which is written beside it?

    python benchmarks/saving.py --threads 2

A checkpoint holds weights, average and moments. `save` copies them into memory, which the training waits for; the rest
is done by a thread: files, their hashes, the disk. Against the time that all of it takes with nothing beside it stand
the copy alone, and what a training loses that goes on: updates that begin with a checkpoint and outlast it, in turns
with as many that do not. That is a small difference of two long times: it wants many turns, and a quiet machine.
"""

import statistics
import tempfile
import time
from itertools import count
from pathlib import Path

import torch
from common import Bench, Flag, main
from original_dit import DiTShape
from torch.optim.lr_scheduler import LambdaLR
from training_sides import Batch, Training, make_batches

from diffusers_d2it import D2iTContentModel, load_preset
from diffusers_d2it.training import Checkpoints


FINE_RATIO = 0.5
DIMENSIONS = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "num_classes")


class Sides:
    """A training of which one checkpoint is kept."""

    def __init__(self, model: D2iTContentModel, folder: Path, batch: Batch, device: str):
        self.model, self.batch = model, batch
        self.training = training = Training(model, device)
        optimizers, schedule = {"optimizer": training.optimizer}, LambdaLR(training.optimizer.optimizer, lambda _: 1)
        state = (training.accelerator, folder, model, training.ema, optimizers, schedule, training.gate)
        self.checkpoints = Checkpoints(*state, total_limit=1)
        self.steps = count(1)

    def save(self) -> None:
        self.checkpoints.save(next(self.steps))

    def save_and_wait(self) -> None:
        self.save()
        self.checkpoints.finish()

    def train(self, updates: int) -> None:
        for _ in range(updates):
            self.training.step(self.model, self.batch)


def measure(bench: Bench, preset: str, updates: int) -> str:
    torch.manual_seed(0)
    model = D2iTContentModel(**load_preset(preset)).to(bench.device).train()
    shape = DiTShape(*(model.config[name] for name in DIMENSIONS))
    (batch, *_) = make_batches(shape, 1, FINE_RATIO, bench.device)
    milliseconds = {"a checkpoint, nothing beside it": [], "of these the copy into memory": []}
    milliseconds |= {f"{updates} updates": [], f"{updates} updates and a checkpoint": []}
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(model, Path(folder), batch, bench.device)
        sides.train(1)  # moments
        sides.save_and_wait()
        late, computing = 0.0, []
        for _ in range(bench.repeats):
            turn = []
            start = time.perf_counter()
            sides.save()
            turn.append(time.perf_counter() - start)
            computed = time.process_time()
            sides.checkpoints.finish()
            computing.append(time.process_time() - computed)
            turn.insert(0, time.perf_counter() - start)
            for saves in (False, True):
                start = time.perf_counter()
                if saves:
                    sides.save()
                sides.train(updates)
                bench.synchronize()
                turn.append(time.perf_counter() - start)
            start = time.perf_counter()
            sides.checkpoints.finish()
            late = max(late, time.perf_counter() - start)
            for found, seconds in zip(milliseconds.values(), turn):
                found.append(1e3 * seconds)
    milliseconds["what the updates of a turn lose"] = [
        with_one - without for without, with_one in zip(*list(milliseconds.values())[2:])
    ]
    whole, copy, *_, lost = (bench.record(name, found) for name, found in milliseconds.items())
    bench.note("GiB of weights, average and moments", 4 * sum(w.nbytes for w in model.parameters()) / 2**30)
    bench.claim("copy / writing a checkpoint", copy / whole, 0.15)
    bench.note("seconds of a processor that the thread computes", statistics.median(computing))
    bench.note("seconds that the checkpoint outlasts the updates", late)
    bench.claim("what the updates lose / writing a checkpoint", lost / whole, 0.15)
    return f"Saving {preset} while it trains"


if __name__ == "__main__":
    main(
        measure,
        most_turns={"cpu": 12, "cuda": 20},
        preset=Flag("content-b", "preset of the content model"),
        updates=Flag({"cpu": 20, "cuda": 200}, "updates that outlast a checkpoint"),
    )
