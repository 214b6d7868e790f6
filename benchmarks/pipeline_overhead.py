# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a call of the pipeline costs beyond its denoiser and decoder, and the share of grain sampling.

    python benchmarks/pipeline_overhead.py --device cuda     # content-xl, grain-s, dvae-f8f16; bf16, compiled
    python benchmarks/pipeline_overhead.py                   # the bundled checkpoint, 64 px; fp32, eager

Whole calls are timed, from class labels to PIL images, and inside each of them its parts: grain sampling, the forwards
of the denoiser, and decoding. What is left is overhead: layouts of the map, guidance, scheduler, ties, checks, images.
Shares are those of one call, so what slows the machine down in one call slows all of its parts. Sizes other than the
bundled checkpoint have random weights.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from common import Bench, Flag, main
from peers import quiet, random_pipeline

from diffusers_d2it import D2iTContentModel, D2iTPipeline, DynamicAutoencoderKL, bundled_checkpoint, load_preset
from diffusers_d2it.grains import fine_share


MOST_TURNS = {"cpu": 12}  # of a call that takes seconds
BUNDLED = "bundled"
PRESET = Flag({"cpu": BUNDLED, "cuda": "content-xl"}, f"of the content model, or '{BUNDLED}'")
GRAINS, DENOISER, DECODER = PARTS = ("grain sampling", "denoiser", "decoder")


def build_pipeline(preset: str, device: str) -> D2iTPipeline:
    """The bundled checkpoint, or a content preset with `grain-s` and `dvae-f8f16`; on a GPU in bf16 and compiled."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if preset == BUNDLED:
        pipe = quiet(D2iTPipeline.from_pretrained(bundled_checkpoint(), torch_dtype=dtype)).to(device)
    else:
        transformer = D2iTContentModel(**load_preset(preset)).eval()
        pipe = random_pipeline(transformer, "dvae-f8f16", "grain-s", device, dtype)
    if device == "cuda":
        pipe.transformer.compile_repeated_blocks()
        pipe.grain_model.compile_repeated_blocks()
    return pipe


class Stopwatch:
    """Milliseconds of the parts of a call, without waiting for a GPU between them: it is asked when the call is over.

    On a GPU the parts are intervals of its own timeline, so host work that it does not wait for is hidden there too.
    """

    def __init__(self, bench: Bench):
        self.bench = bench
        self.intervals: dict[str, list[tuple]] = {}

    def timed(self, part: str, function: Callable) -> Callable:
        """A function that does the same and counts as a part."""

        def call(*arguments, **options):
            start = self._now()
            result = function(*arguments, **options)
            self.intervals.setdefault(part, []).append((start, self._now()))
            return result

        return call

    @contextmanager
    def parts(self):
        """Time the parts of all pipelines."""
        owners = D2iTPipeline, D2iTContentModel, DynamicAutoencoderKL
        methods = "prepare_grain_map", "forward", "decode"
        with ExitStack() as stack:
            for part, owner, method in zip(PARTS, owners, methods):
                stack.enter_context(patch.object(owner, method, self.timed(part, getattr(owner, method))))
            yield

    def read(self) -> dict[str, float]:
        """The time of each part since the last reading."""
        self.bench.synchronize()
        milliseconds = {
            part: sum(start.elapsed_time(end) if self.bench.cuda else 1e3 * (end - start) for start, end in intervals)
            for part, intervals in self.intervals.items()
        }
        self.intervals.clear()
        return milliseconds

    def _now(self) -> torch.cuda.Event | float:
        if not self.bench.cuda:
            return self.bench.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def report_parts(bench: Bench, whole: str, turns: list[dict[str, float]], goal: int | None) -> list[float]:
    """Record the parts of all turns and claim what is left of them; returns it, in milliseconds of each turn."""
    for part in turns[0]:
        bench.record(part, [turn[part] for turn in turns])
    outside = [turn[whole] - sum(turn[part] for part in PARTS) for turn in turns]
    overhead = statistics.median(rest / (turn[DENOISER] + turn[DECODER]) for rest, turn in zip(outside, turns))
    bench.claim(f"rest of the {whole} over denoiser and decoder", overhead, 0.03, goal=goal)
    return outside


def measure(bench: Bench, preset: str, batch_size: int, num_inference_steps: int) -> str:
    torch.manual_seed(0)
    pipe, watch = build_pipeline(preset, bench.device), Stopwatch(bench)
    known = list(pipe.id2label or range(batch_size))
    labels = [known[i % len(known)] for i in range(batch_size)]
    # The bundled models draw their maps; random weights would draw some of any share.
    options = {"num_inference_steps": num_inference_steps, "fine_ratio": None if preset == BUNDLED else 0.5}
    call, turns, warmup = watch.timed("call", pipe), [], 3 if bench.cuda else 1
    with watch.parts():
        for _ in range(warmup + bench.repeats):
            output = call(labels, generator=torch.Generator().manual_seed(0), **options)
            turns.append(watch.read())
    turns = turns[warmup:]

    goal = 11 if (batch_size, num_inference_steps) == (8, 20) else None
    outside = report_parts(bench, "call", turns, goal)
    share = statistics.median(turn[GRAINS] / turn["call"] for turn in turns)
    bench.claim("grain sampling, share of the call", share, 0.05, goal=goal)
    bench.note("rest of the call, ms a step", statistics.median(outside) / num_inference_steps)
    share = fine_share(output.grain_maps, pipe.transformer.config.num_grains).mean().item()
    bench.note("share of fine regions", share)
    return f"Pipeline of {preset}, batch {batch_size}, {num_inference_steps} steps, guided, {pipe.transformer.dtype}"


if __name__ == "__main__":
    main(
        measure,
        most_turns=MOST_TURNS,
        preset=PRESET,
        batch_size=Flag(8, "images of a call"),
        num_inference_steps=Flag(20, "of denoising; grain sampling takes its default"),
    )
