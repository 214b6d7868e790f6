# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: photographs and their grain maps, interleaved timing, peak memory, the report."""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from PIL import Image, ImageOps
from torch.profiler import ProfilerActivity, profile

from diffusers_d2it.entropy import region_entropy


RESULTS = Path(__file__).parent / "results"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # they come with scikit-image, nothing is downloaded


def parse_args(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Add what every benchmark takes, parse, and set the number of threads."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each side, after 3 to warm up")
    parser.add_argument("--output", type=Path, help="where the result is written; default: in benchmarks/results")
    args = parser.parse_args()
    args.output = args.output or result_path(name, args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device.")
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1.")
    torch.set_num_threads(args.threads)
    return args


def result_path(name: str, device: str) -> Path:
    """Where a benchmark writes its result for a device."""
    return RESULTS / (f"{name}.json" if device == "cpu" else f"{name}-{device}.json")


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def load_photographs(folder: str | None, limit: int = 4, size: int = 256) -> torch.Tensor:
    """Photographs as (N, 3, size, size) in [-1, 1], cut to their central square and scaled.

    Args:
        folder: a folder of images, sorted by name; None takes four that come with scikit-image.
        limit: N at most.
        size: side in pixels.

    Raises:
        ValueError: no image in the folder.
    """
    if folder is None:
        from skimage import data

        images = [Image.fromarray(getattr(data, name)()) for name in PHOTOGRAPHS[:limit]]
    else:
        suffixes = {".jpg", ".jpeg", ".png", ".webp"}
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in suffixes)
        if not paths:
            raise ValueError(f"no image ({', '.join(sorted(suffixes))}) in {folder!r}.")
        images = [Image.open(path) for path in paths[:limit]]
    images = [ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS) for image in images]
    bytes_ = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    pixels = torch.stack(bytes_).view(-1, size, size, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous()


def real_grain_maps(pixels: torch.Tensor, fine_ratio: float) -> torch.Tensor:
    """Maps (N, h, w) of images, two grains, with this share of fine regions over all of them, not in each."""
    entropy = region_entropy(pixels)
    return (entropy > torch.quantile(entropy, 1 - fine_ratio)).long()


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Time of one side over its turns, in milliseconds a call."""

    minimum: float
    median: float
    maximum: float

    def __str__(self) -> str:
        return f"{self.median:9.3f} ms  ({self.minimum:.3f} to {self.maximum:.3f})"


def time_sides(
    sides: dict[str, Callable[[], object]], args: argparse.Namespace, warmup: int = 3, shortest_turn: float = 0.02
) -> dict[str, Timing]:
    """Time functions in turns, A B A B ..., so that whatever slows the machine down slows all of them.

    Args:
        sides: functions by name.
        args: from `parse_args`: device, threads, number of timed turns.
        warmup: turns of each side that do not count.
        shortest_turn: seconds. In its turn a side is called until this has passed, or once, and the turn counts as the
            mean of its calls: otherwise a short side is measured on the cold caches that a long one leaves behind.
    """
    clock = clock_of(args)
    milliseconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + args.repeats):
        for name, function in sides.items():
            calls, elapsed = 0, 0.0
            _synchronize(args.device)
            start = clock()
            while elapsed < shortest_turn:
                function()
                _synchronize(args.device)
                calls, elapsed = calls + 1, clock() - start
            if turn >= warmup:
                milliseconds[name].append(1e3 * elapsed / calls)
    return {name: Timing(min(times), statistics.median(times), max(times)) for name, times in milliseconds.items()}


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """Processor time of this process where it works on one CPU thread, otherwise the time on the wall.

    On one thread the two agree on an idle machine, and only the first leaves out the turns that other programs take.
    """
    return time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter


def peak_memory(function: Callable[[], object], device: str) -> float:
    """MiB that a function holds at its peak beyond what is live before it, its result included.

    On the CPU the profiler reports every allocation and release of torch's allocator, and the peak is that of their
    running sum. It repeats exactly, unlike a resident-set size, which also holds what the C library keeps for later.
    Scratch memory inside a BLAS is not seen. On CUDA the caching allocator keeps the same count itself.
    """
    function()  # what is built once and cached is not counted
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    live = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak / 2**20


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One number that is promised.

    Args:
        text: what is measured, with its unit.
        measured: the number.
        limit: what is promised: at most this, or at least this.
        at_least: the direction.
        goal: number of the goal in `goals.py` that it belongs to, on the device that was measured; None for a promise
            of its own. A number that is promised for a GPU only is a note on a CPU, not a claim.
    """

    text: str
    measured: float
    limit: float
    at_least: bool = False
    goal: int | None = None

    @property
    def reached(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        return f"{self.text}: {self.measured:.3g}, goal {'>=' if self.at_least else '<='} {self.limit:.3g}"


def report(
    args: argparse.Namespace,
    title: str,
    timings: dict[str, Timing],
    claims: list[Claim],
    notes: dict[str, float],
) -> None:
    """Print timings, claims, notes and the machine, and write them to `args.output` as JSON."""
    machine = describe_machine(args.device)
    machine["date"] = datetime.date.today().isoformat()
    machine["clock"] = "processor time" if clock_of(args) is time.process_time else "time on the wall"
    print(title)
    print("  " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    for name, timing in timings.items():
        print(f"  {name:<44} {timing}")
    for name, value in notes.items():
        print(f"  {name:<44} {value:9.3g}")
    for claim in claims:
        print(f"  {claim}: {'reached' if claim.reached else 'NOT REACHED'}")

    result = {
        "title": title,
        "machine": machine,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "milliseconds": {name: vars(timing) for name, timing in timings.items()},
        "notes": notes,
        "claims": [{**vars(claim), "reached": claim.reached} for claim in claims],
    }
    del result["settings"]["output"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def describe_machine(device: str) -> dict[str, str | int | float]:
    """CPU model, cores, threads of torch, load (programs that want to run, this one included), versions, GPU."""
    description = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        description["gpu"] = torch.cuda.get_device_name()
    return description


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
