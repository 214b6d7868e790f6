# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What one GPU can tell: does all of it work there, and how fast is it? README.md beside this script says more.

    python benchmarks/device/run.py                        # ten minutes on a GPU, the most telling steps first
    python benchmarks/device/run.py --only sampling        # some of the steps
    python benchmarks/device/run.py --device cpu           # the smallest form: shows that the steps run

The steps run one after the other, each in a process of its own and for so long at most: one that fails, hangs or runs
out of memory takes nothing from the others but its time.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import torch
from common import DEVICES, result_path
from run import CPU_ONLY, command, print_goals


# In their order: seconds at most. What they answer is told in README.md.
CHECKS = {"same": 90, "doors": 150, "compiled": 240}
BENCHMARKS = {  # and turns
    "one_image": (150, 10),
    "forward_mfu": (150, 5),
    "training_throughput": (300, 2),
    "packed_chunks": (60, 10),
    "chunk_forward": (120, 5),
    "sampling": (300, 1),
    "between_steps": (120, 1),
    "pipeline_overhead": (90, 5),
    "chunk_training": (90, 5),
    "whole_forward": (60, 5),
    "saving": (120, 3),
    "loading": (150, 2),
}
LEAST = 20  # seconds, in which hardly a step does anything
# As training_throughput.py asks for: tokens of a batch differ from step to step, and with them what is allocated
ALLOCATING = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def steps(device: str) -> dict[str, tuple[float, list[str]]]:
    """Of each: seconds at most, and its command."""
    found = {}
    for name, limit in CHECKS.items():
        script, output = str(Path(__file__).with_name("checks.py")), str(result_path(name, device))
        found[name] = limit, [sys.executable, script, name, "--device", device, "--output", output]
    for name, (limit, turns) in BENCHMARKS.items():
        where, repeats = "cpu" if name in CPU_ONLY else device, str(turns if device == "cuda" else 1)
        options = ["--repeats", repeats, "--output", str(result_path(name, where))]
        found[name] = limit, ["env", ALLOCATING, *command(name, where, options)]
    return found


def run(limit: float, command: list[str], log: Path) -> str:
    """Run a step; "ok", or what became of it."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
    return "ok" if code == 0 else f"failed, exit code {code}: {last[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CHECKS, *BENCHMARKS], help="some of the steps")
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--budget", type=float, default=600, help="seconds; no step begins after them")
    parser.add_argument("--output", type=Path, default=Path("runs/device"), help="folder of what is found")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device.")
    common.RESULTS = args.output.resolve()
    common.RESULTS.mkdir(parents=True, exist_ok=True)

    start, outcomes, record = time.monotonic(), {}, result_path("steps", args.device)
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for name, (limit, step) in steps(args.device).items():
        if args.only and name not in args.only:
            continue
        begun, left = time.monotonic(), args.budget - (time.monotonic() - start)
        if left < min(limit, LEAST):
            outcomes[name] = "left out: no time left"
        else:
            outcomes[name] = run(min(limit, left), step, result_path(name, args.device).with_suffix(".log"))
        found[name] = {"outcome": outcomes[name], "seconds": round(time.monotonic() - begun, 1)}
        print(f"{name:<20} {found[name]['seconds']:6.1f} s  {outcomes[name]}", flush=True)
        record.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    print_goals()
    print(f"Files: {common.RESULTS}")
    if again := [name for name, outcome in outcomes.items() if outcome != "ok"]:
        sys.exit(f"not done: --only {' '.join(again)}")


if __name__ == "__main__":
    main()
