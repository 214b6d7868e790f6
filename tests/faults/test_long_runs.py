# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Memory and open files do not grow with the length of a run or with the number of its checkpoints."""

import json
from pathlib import Path

import psutil
from script_runs import join_threads
from training_runs import train


def test_memory_and_handles_stay_flat(inputs, tmp_path, fault, repeats):
    num_steps, num_saves = repeats(240, 20_000), repeats(24, 100)
    count = fault(f"{num_steps:,} steps with {num_saves} checkpoints: memory or handles grow")
    flags = inputs.flags("train_grain.py") | {"gradient_accumulation_steps": 1, "max_train_steps": num_steps}
    flags |= {"checkpointing_steps": num_steps // num_saves, "checkpoints_total_limit": 2}
    measured = tmp_path / "measured.jsonl"

    def measure(_, index: int) -> None:
        if index and index % (num_steps // 6) == 0:
            join_threads()  # a checkpoint is being written, with a handle
            process = psutil.Process()
            memory = process.memory_info()  # its own: pages of files, such as torch, come and go with other processes
            with measured.open("a") as file:
                file.write(json.dumps([memory.rss - memory.shared, process.num_fds()]) + "\n")

    assert train("train_grain.py", tmp_path / "run", flags, measure) == 0
    lines = [json.loads(line) for line in Path(measured).read_text().splitlines()]
    first, last = lines[1], lines[-1]  # after a third of the run everything has been allocated once
    grown = (last[0] - first[0]) / 2**20
    count.tried(f"{grown:.1f} MiB more, {last[1] - first[1]} more handles", lost=grown > 8 or last[1] > first[1])
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 2
