# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What `examples/sample_d2it.py` costs beyond its denoiser and decoder.

    python benchmarks/sampling_overhead.py --device cuda     # content-xl, grain-s, dvae-f8f16; bf16, eager
    python benchmarks/sampling_overhead.py                   # the bundled checkpoint, 64 px; fp32, eager

The script itself draws a set, with PNGs and an .npz, again and again. A turn is timed from where the folder is open to
where the set is complete, and inside of it grain sampling, the forwards of the denoiser, and decoding. What is left is
overhead: that of the pipeline (`pipeline_overhead.py`), seeds, PNGs, and what is done once for a set, here for a small
one. Loading is left out. On one CPU thread the clock is processor time of all threads, so writing PNGs counts fully.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from common import Claim, Timing, clock_of, parse_args, report
from pipeline_overhead import BUNDLED, DECODER, DENOISER, GRAINS, MOST_TURNS, Stopwatch, build_pipeline

from diffusers_d2it import D2iTContentModel, D2iTPipeline, DynamicAutoencoderKL, bundled_checkpoint
from diffusers_d2it.sampling.folder import SampleFolder


SCRIPT = Path(__file__).parent.parent / "examples" / "sample_d2it.py"
sys.path.append(str(SCRIPT.parent))  # where it finds flags.py
SET = "whole set"
WAITING = "last PNGs, checks, .npz, protocol"


def load_script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def time_sets(flags: list[str], args: argparse.Namespace) -> list[dict[str, float]]:
    """Milliseconds of every set and of its parts, after one to warm up."""
    script, watch, clock = load_script(), Stopwatch(args), clock_of(args)
    enter, finish = SampleFolder.__enter__, SampleFolder.finish
    times = {}

    def timed_enter(samples: SampleFolder) -> SampleFolder:
        entered = enter(samples)
        times["start"] = clock()
        return entered

    def timed_finish(samples: SampleFolder) -> dict:
        drawn = clock()
        protocol = finish(samples)
        times["whole"], times["finish"] = clock() - times["start"], clock() - drawn
        return protocol

    turns = []
    with ExitStack() as stack:
        for owner, method, part in (
            (D2iTPipeline, "prepare_grain_map", GRAINS),
            (D2iTContentModel, "forward", DENOISER),
            (DynamicAutoencoderKL, "decode", DECODER),
        ):
            stack.enter_context(patch.object(owner, method, watch.timed(part, getattr(owner, method))))
        stack.enter_context(patch.object(SampleFolder, "__enter__", timed_enter))
        stack.enter_context(patch.object(SampleFolder, "finish", timed_finish))
        for _ in range(1 + args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                script.main(script.parse_args([*flags, "--output_dir", str(Path(folder) / "samples")]))
            turns.append(watch.read() | {SET: 1e3 * times["whole"], WAITING: 1e3 * times["finish"]})
    return turns[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", help=f"of the content model, or '{BUNDLED}'; default: content-xl, on a CPU bundled"
    )
    parser.add_argument("--num_images", type=int, default=32, help="images of a set")
    parser.add_argument("--batch_size", type=int, default=8, help="images of a call")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="of denoising")
    args = parse_args(parser, "sampling_overhead")
    args.preset = args.preset or (BUNDLED if args.device == "cpu" else "content-xl")
    args.repeats = min(args.repeats, MOST_TURNS["cpu"])
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"

    flags = ["--num_images", args.num_images, "--batch_size", args.batch_size, "--format", "both"]
    flags = [*map(str, flags), "--num_inference_steps", str(args.num_inference_steps)]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as checkpoint:
        if args.preset == BUNDLED:
            flags += ["--checkpoint", bundled_checkpoint()]
        else:
            build_pipeline(args.preset, "cpu").save_pretrained(checkpoint)
            # Random weights would draw maps of any share
            flags += ["--checkpoint", checkpoint, "--fine_ratio", "0.5"]
            flags += ["--dtype", "bfloat16" if args.device == "cuda" else "float32"]
        turns = time_sets(flags, args)

    timings = {}
    for part in (SET, GRAINS, DENOISER, DECODER, WAITING):
        times = [turn[part] for turn in turns]
        timings[part] = Timing(min(times), statistics.median(times), max(times))
    outside = [turn[SET] - turn[GRAINS] - turn[DENOISER] - turn[DECODER] for turn in turns]
    overhead = statistics.median(rest / (turn[DENOISER] + turn[DECODER]) for rest, turn in zip(outside, turns))
    claims = [Claim("rest of a set over denoiser and decoder", overhead, 0.03)]
    notes = {
        "rest of the set, ms an image": statistics.median(outside) / args.num_images,
        "of it once for a set, or after the last image": statistics.median(
            turn[WAITING] / rest for rest, turn in zip(outside, turns)
        ),
    }
    title = (
        f"{SCRIPT.name} with {args.preset}: {args.num_images} images in batches of {args.batch_size},"
        f" {args.num_inference_steps} steps, guided"
    )
    report(args, title, timings, claims, notes)


if __name__ == "__main__":
    main()
