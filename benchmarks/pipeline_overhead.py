# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a call of the pipeline costs beyond its denoiser and decoder, and the share of grain sampling.

    python benchmarks/pipeline_overhead.py --device cuda     # content-xl, grain-s, dvae-f8f16; bf16, compiled
    python benchmarks/pipeline_overhead.py                   # the bundled checkpoint, 64 px; fp32, eager

Whole calls are timed, from class labels to PIL images, and inside each of them its parts: grain sampling, the forwards
of the denoiser, and decoding. What is left is overhead: layouts of the map, guidance, scheduler, ties, checks, images.
Shares are those of one call, so what slows the machine down in one call slows all of its parts. Sizes other than the
bundled checkpoint have random weights.
"""

import argparse
import statistics
from collections.abc import Callable
from unittest.mock import patch

import torch
from common import Claim, Timing, clock_of, parse_args, report
from diffusers import DDIMScheduler
from torch import nn

from diffusers_d2it import (
    D2iTContentModel,
    D2iTGrainModel,
    D2iTPipeline,
    DynamicAutoencoderKL,
    bundled_checkpoint,
    load_preset,
)
from diffusers_d2it.grains import fine_share


MOST_TURNS = {"cpu": 12, "cuda": 100}  # of a call that takes seconds on a CPU
BUNDLED = "bundled"
CALL, GRAINS, DENOISER, DECODER = "whole call", "grain sampling", "denoiser", "decoder"


def build_pipeline(preset: str, device: str) -> D2iTPipeline:
    """The bundled checkpoint, or a content preset with `grain-s` and `dvae-f8f16`; on a GPU in bf16 and compiled."""
    if preset == BUNDLED:
        pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    else:
        grain_model = D2iTGrainModel(**load_preset("grain-s"))
        for parameter in grain_model.parameters():
            nn.init.normal_(parameter, std=0.02)  # as it starts, it draws maps without fine regions
        pipe = D2iTPipeline(
            vae=DynamicAutoencoderKL(**load_preset("dvae-f8f16")).eval(),
            grain_model=grain_model.eval(),
            transformer=D2iTContentModel(**load_preset(preset)).eval(),
            scheduler=DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
            grain_scheduler=DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing"),
        )
    pipe.set_progress_bar_config(disable=True)
    if device == "cuda":
        pipe.to("cuda", torch.bfloat16)
        pipe.transformer.compile_repeated_blocks()
        pipe.grain_model.compile_repeated_blocks()
    return pipe


class Stopwatch:
    """Milliseconds of the parts of a call, without waiting for a GPU between them: it is asked when the call is over.

    On a GPU the parts are intervals of its own timeline, so host work that it does not wait for is hidden there too.
    """

    def __init__(self, args: argparse.Namespace):
        self.cuda = args.device == "cuda"
        self.clock = clock_of(args)
        self.intervals: dict[str, list[tuple]] = {}

    def timed(self, part: str, function: Callable) -> Callable:
        """A function that does the same and counts as a part."""

        def call(*arguments, **options):
            start = self._now()
            result = function(*arguments, **options)
            self.intervals.setdefault(part, []).append((start, self._now()))
            return result

        return call

    def read(self) -> dict[str, float]:
        """The time of each part since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
        milliseconds = {
            part: sum(start.elapsed_time(end) if self.cuda else 1e3 * (end - start) for start, end in intervals)
            for part, intervals in self.intervals.items()
        }
        self.intervals.clear()
        return milliseconds

    def _now(self) -> torch.cuda.Event | float:
        if not self.cuda:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def time_calls(pipe: D2iTPipeline, call: Callable, args: argparse.Namespace) -> list[dict[str, float]]:
    """Milliseconds of every call and of its parts, after some to warm up."""
    watch = Stopwatch(args)
    whole = watch.timed(CALL, call)
    warmup = 1 if args.device == "cpu" else 3
    turns = []
    with (
        patch.object(pipe, "prepare_grain_map", watch.timed(GRAINS, pipe.prepare_grain_map)),
        patch.object(pipe.transformer, "forward", watch.timed(DENOISER, pipe.transformer.forward)),
        patch.object(pipe.vae, "decode", watch.timed(DECODER, pipe.vae.decode)),
    ):
        for _ in range(warmup + args.repeats):
            whole()
            turns.append(watch.read())
    return turns[warmup:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", help=f"of the content model, or '{BUNDLED}'; default: content-xl, on a CPU bundled"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images of a call")
    parser.add_argument(
        "--num_inference_steps", type=int, default=20, help="of denoising; grain sampling takes its default"
    )
    args = parse_args(parser, "pipeline_overhead")
    args.preset = args.preset or (BUNDLED if args.device == "cpu" else "content-xl")
    args.repeats = min(args.repeats, MOST_TURNS[args.device])

    torch.manual_seed(0)
    pipe = build_pipeline(args.preset, args.device)
    known = list(pipe.id2label or range(args.batch_size))
    labels = [known[i % len(known)] for i in range(args.batch_size)]
    fine_shares = []

    def call() -> None:
        output = pipe(
            labels,
            num_inference_steps=args.num_inference_steps,
            # The bundled models draw their maps; random weights would draw some of any share.
            fine_ratio=None if args.preset == BUNDLED else 0.5,
            generator=torch.Generator().manual_seed(0),
        )
        fine_shares.append(fine_share(output.grain_maps, pipe.transformer.config.num_grains).mean().item())

    turns = time_calls(pipe, call, args)
    parts = [CALL, GRAINS, DENOISER, DECODER]
    timings = {}
    for part in parts:
        times = [turn[part] for turn in turns]
        timings[part] = Timing(min(times), statistics.median(times), max(times))
    outside = [turn[CALL] - turn[GRAINS] - turn[DENOISER] - turn[DECODER] for turn in turns]
    overhead = statistics.median(rest / (turn[DENOISER] + turn[DECODER]) for rest, turn in zip(outside, turns))
    grains = statistics.median(turn[GRAINS] / turn[CALL] for turn in turns)

    goal = 11 if (args.batch_size, args.num_inference_steps) == (8, 20) else None
    claims = [
        Claim("rest of the call over denoiser and decoder", overhead, 0.03, goal=goal),
        Claim("grain sampling, share of the call", grains, 0.05, goal=goal),
    ]
    notes = {
        "rest of the call, ms a step": statistics.median(outside) / args.num_inference_steps,
        "share of fine regions": fine_shares[-1],
    }
    title = (
        f"Pipeline of {args.preset}, batch {args.batch_size}, {args.num_inference_steps} steps, guided,"
        f" {pipe.transformer.dtype}"
    )
    report(args, title, timings, claims, notes)


if __name__ == "__main__":
    main()
