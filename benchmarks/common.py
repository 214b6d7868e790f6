# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: one `main` with its flags, interleaved timing, peak memory, claims and the result file.

A benchmark is a function that measures, and its own flags:

    def measure(bench: Bench, width: int) -> str:
        median = bench.time({"ours": ..., "theirs": ...})
        bench.claim("ours / theirs", median["ours"] / median["theirs"], 0.5, goal=4)
        return f"Title of the report, width {width}"

    if __name__ == "__main__":
        main(measure, width=Flag({"cpu": 64, "cuda": 1152}, "width of the model"))
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from goals import GOALS
from torch.profiler import ProfilerActivity, profile


RESULTS = Path(__file__).parent / "results"
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Flag:
    """A flag of one script, an argument of its `measure`."""

    default: Any  # a number, a name or a list; {"cpu": ..., "cuda": ...} where it depends on the device
    help: str  # what it is, and which values it takes
    valid: Callable[[Any], bool] = lambda value: True

    def add(self, parser: argparse.ArgumentParser, name: str) -> None:
        of_cpu = self.for_device("cpu")
        kind = {"nargs": "+", "type": type(of_cpu[0])} if isinstance(of_cpu, list) else {"type": type(of_cpu)}
        if isinstance(of_cpu, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        shown = " or ".join(f"{value} ({device})" for device, value in self._of_devices().items())
        parser.add_argument(f"--{name}", help=f"{self.help}; default: {shown}", **kind)

    def for_device(self, device: str) -> Any:
        return self._of_devices()[device] if isinstance(self.default, dict) else self.default

    def _of_devices(self) -> dict[str, Any]:
        return self.default if isinstance(self.default, dict) else {"any device": self.default}


def main(
    measure: Callable[..., str],
    devices: Sequence[str] = DEVICES,
    most_turns: dict[str, int] | None = None,
    **flags: Flag,
) -> None:
    """Parse the flags, measure (which returns a title), print what was found and write it to `results/NAME.json`.

    `most_turns` bounds those of a device, where turns take long.
    """
    script = sys.modules[measure.__module__]
    parser = argparse.ArgumentParser(description=script.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag_name, flag in flags.items():
        flag.add(parser, flag_name)
    parser.add_argument("--device", choices=devices, default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=20, help="timed turns of each side, after some to warm up")
    parser.add_argument("--output", type=Path, help="where the result is written; default: in benchmarks/results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device.")
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1.")
    settings = {}
    for flag_name, flag in flags.items():
        value = getattr(args, flag_name)
        settings[flag_name] = value = flag.for_device(args.device) if value is None else value
        if not all(flag.valid(one) for one in (value if isinstance(value, list) else [value])):
            parser.error(f"--{flag_name} {value}: {flag.help}.")

    torch.set_num_threads(args.threads)
    bench = Bench(args.device, args.threads, min(args.repeats, (most_turns or {}).get(args.device, args.repeats)))
    title = measure(bench, **settings)
    bench.report(title, settings, args.output or result_path(Path(script.__file__).stem, args.device))


def result_path(name: str, device: str) -> Path:
    """Where a benchmark writes its result for a device."""
    return RESULTS / (f"{name}.json" if device == "cpu" else f"{name}-{device}.json")


@dataclass(frozen=True)
class Timing:
    """Time of one side over its turns, in milliseconds a call."""

    minimum: float
    median: float
    maximum: float

    def __str__(self) -> str:
        return f"{self.median:9.3f} ms  ({self.minimum:.3f} to {self.maximum:.3f})"


@dataclass(frozen=True)
class Claim:
    """One number that is promised."""

    text: str  # what is measured, with its unit
    measured: float
    limit: float  # at most this, or at least
    at_least: bool = False
    goal: int | None = None  # of `goals.py`; None for a promise of its own

    @property
    def reached(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        return f"{self.text}: {self.measured:.3g}, goal {'>=' if self.at_least else '<='} {self.limit:.3g}"


class Bench:
    """How a benchmark is to measure, and what it has found."""

    def __init__(self, device: str, threads: int, repeats: int):
        self.device, self.threads, self.repeats = device, threads, repeats
        self.timings: dict[str, Timing] = {}
        self.notes: dict[str, float] = {}
        self.claims: list[Claim] = []
        self.more: dict[str, Any] = {}  # further parts of the result file

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def clock(self) -> Callable[[], float]:
        """Processor time of this process where it works on one CPU thread, otherwise the time on the wall.

        On one thread the two agree on an idle machine, and only the first leaves out the turns of other programs.
        """
        return time.process_time if self.device == "cpu" and self.threads == 1 else time.perf_counter

    def time(
        self,
        sides: dict[str, Callable[[], object]],
        warmup: int = 3,
        repeats: int | None = None,
        shortest_turn: float = 0.02,
    ) -> dict[str, float]:
        """Time functions in turns, A B A B ..., so that whatever slows the machine down slows all of them.

        The first `warmup` turns of each side do not count. In its turn a side is called until `shortest_turn` seconds
        have passed, or once, and the turn counts as the mean of its calls: otherwise a short side is measured on the
        cold caches that a long one leaves. Returned is the median of each side, in milliseconds a call.
        """
        milliseconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(warmup + min(self.repeats, repeats or self.repeats)):
            for name, function in sides.items():
                calls, elapsed = 0, 0.0
                self.synchronize()
                start = self.clock()
                while elapsed < shortest_turn:
                    function()
                    self.synchronize()
                    calls, elapsed = calls + 1, self.clock() - start
                if turn >= warmup:
                    milliseconds[name].append(1e3 * elapsed / calls)
        return {name: self.record(name, times) for name, times in milliseconds.items()}

    def record(self, name: str, milliseconds: Sequence[float]) -> float:
        """Keep the times of a side, measured elsewhere, and return their median."""
        median = statistics.median(milliseconds)
        self.timings[name] = Timing(min(milliseconds), median, max(milliseconds))
        return median

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_memory(self, function: Callable[[], object]) -> float:
        """MiB that a function holds at its peak beyond what is live before it, its result included.

        On the CPU the profiler reports every allocation and release of torch's allocator, and the peak is that of
        their running sum. It repeats exactly, unlike a resident-set size, which also holds what the C library keeps
        for later. Scratch memory inside a BLAS is not seen. On CUDA the caching allocator keeps the same count itself.
        """
        function()  # what is built once and cached is not counted
        if self.cuda:
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
        changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
        live = peak = 0
        for _, change in sorted(changes, key=lambda change: change[0]):
            live += change
            peak = max(peak, live)
        return peak / 2**20

    def note(self, text: str, value: float) -> None:
        """Keep a number that nothing is promised about."""
        self.notes[text] = float(value)

    def claim(self, text: str, measured: float, limit: float, at_least: bool = False, goal: int | None = None) -> None:
        """Keep a number with what is promised of it: at most `limit`, or at least.

        What a goal promises of another device is a note here: a small form of it has been measured.
        """
        if goal is not None and self.device not in GOALS[goal].devices:
            self.note(f"{text}; small form", measured)
        else:
            self.claims.append(Claim(text, float(measured), limit, at_least, goal))

    def report(self, title: str, settings: dict[str, Any], output: Path) -> None:
        """Print all of it with the machine, and write it as JSON."""
        machine = describe_machine(self.device)
        machine["date"] = datetime.date.today().isoformat()
        machine["clock"] = "processor time" if self.clock is time.process_time else "time on the wall"
        print(title)
        print("  " + ", ".join(f"{key} {value}" for key, value in machine.items()))
        for name, timing in self.timings.items():
            print(f"  {name:<44} {timing}")
        for name, value in self.notes.items():
            print(f"  {name:<44} {value:9.3g}")
        for claim in self.claims:
            print(f"  {claim}: {'reached' if claim.reached else 'NOT REACHED'}")
        result = {
            "title": title,
            "machine": machine,
            "settings": settings | {"device": self.device, "threads": self.threads, "repeats": self.repeats},
            "milliseconds": {name: vars(timing) for name, timing in self.timings.items()},
            "notes": self.notes,
            "claims": [{**vars(claim), "reached": claim.reached} for claim in self.claims],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result | self.more, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_script(name: str) -> ModuleType:
    """A script of examples/ as a module."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    with patch.object(sys, "path", [str(path.parent), *sys.path]):  # scripts import what stands beside them
        spec.loader.exec_module(script)
    return script


def in_fresh_process(function: Callable, *arguments, threads: int = 1, **environment: str) -> Any:
    """What a function of a script returns in a process of its own, that has imported the script and nothing more."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with patch.dict(os.environ, counts | environment), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def process_memory(key: str) -> float:
    """MiB of this process by Linux: VmRSS resident now, VmHWM at its peak; RssAnon what cannot be dropped."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:"))) / 1024


def forget_peak_memory() -> None:
    """Let the peak of resident memory start anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def describe_machine(device: str) -> dict[str, str | int | float]:
    """CPU model, cores, threads of torch, load (programs that want to run, this one included), versions, GPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    description = {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    return description | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})
