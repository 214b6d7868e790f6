# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What `examples/sample.py` costs beyond its denoiser and decoder.

    python benchmarks/sampling_overhead.py --device cuda     # content-xl, grain-s, dvae-f8f16; bf16, eager
    python benchmarks/sampling_overhead.py                   # the bundled checkpoint, 64 px; fp32, eager

The script itself draws a set, with PNGs and an .npz, again and again. A turn is timed from where the folder is open to
where the set is complete, and inside of it grain sampling, the forwards of the denoiser, and decoding. What is left is
overhead: that of the pipeline (`pipeline_overhead.py`), seeds, PNGs, and what is done once for a set, here for a small
one. Loading is left out. On one CPU thread the clock is processor time of all threads, so writing PNGs counts fully.
"""

import os
import statistics
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from common import Bench, Flag, load_script, main
from pipeline_overhead import BUNDLED, MOST_TURNS, PRESET, Stopwatch, build_pipeline, report_parts

from diffusers_d2it import bundled_checkpoint
from diffusers_d2it.sampling import SampleFolder


WAITING = "last PNGs, checks, .npz, protocol"


def time_sets(bench: Bench, flags: list[str]) -> list[dict[str, float]]:
    """Milliseconds of every set and of its parts, after one to warm up."""
    script, watch, clock = load_script("sample"), Stopwatch(bench), bench.clock
    enter, finish = SampleFolder.__enter__, SampleFolder.finish
    times, turns = {}, []

    def timed_enter(samples: SampleFolder) -> SampleFolder:
        entered = enter(samples)
        times["start"] = clock()
        return entered

    def timed_finish(samples: SampleFolder) -> dict:
        drawn = clock()
        protocol = finish(samples)
        times["set"], times[WAITING] = clock() - times.pop("start"), clock() - drawn
        return protocol

    with (
        watch.parts(),
        patch.object(SampleFolder, "__enter__", timed_enter),
        patch.object(SampleFolder, "finish", timed_finish),
    ):
        for _ in range(1 + bench.repeats):
            with tempfile.TemporaryDirectory() as folder:
                script.main(script.parse_args([*flags, "--output_dir", str(Path(folder) / "samples")]))
            turns.append(watch.read() | {part: 1e3 * seconds for part, seconds in times.items()})
    return turns[1:]


def measure(bench: Bench, preset: str, num_images: int, batch_size: int, num_inference_steps: int) -> str:
    if not bench.cuda:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    flags = f"--num_images {num_images} --batch_size {batch_size} --num_inference_steps {num_inference_steps}"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as checkpoint:
        if preset == BUNDLED:
            flags += f" --checkpoint {bundled_checkpoint()}"
        else:
            build_pipeline(preset, "cpu").save_pretrained(checkpoint)
            # Random weights would draw maps of any share
            flags += f" --checkpoint {checkpoint} --fine_ratio 0.5 --dtype {'bfloat16' if bench.cuda else 'float32'}"
        turns = time_sets(bench, [*flags.split(), "--format", "both"])

    outside = report_parts(bench, "set", turns, goal=None)
    bench.note("rest of the set, ms an image", statistics.median(outside) / num_images)
    once = statistics.median(turn[WAITING] / rest for rest, turn in zip(outside, turns))
    bench.note("of it once for a set, or after the last image", once)
    images = f"{num_images} images in batches of {batch_size}"
    return f"sample.py with {preset}: {images}, {num_inference_steps} steps, guided"


if __name__ == "__main__":
    main(
        measure,
        most_turns=MOST_TURNS | {"cuda": MOST_TURNS["cpu"]},
        preset=PRESET,
        num_images=Flag(32, "images of a set"),
        batch_size=Flag(8, "images of a call"),
        num_inference_steps=Flag(20, "of denoising"),
    )
