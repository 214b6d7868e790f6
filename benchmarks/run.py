# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Run all benchmarks, one process each, and print every goal with what was measured for it, per device.

    python benchmarks/run.py                       # the small forms, on the CPU
    python benchmarks/run.py --device cuda         # the real sizes
    python benchmarks/run.py --table               # run nothing, print what the last runs have found

Other options (--threads 1, --repeats 20) go to every benchmark. Each writes its result to `benchmarks/results/`, where
this script reads it; a goal is "not measured" on a device as long as no result for it is there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import DEVICES, Claim, result_path
from goals import GOALS


# In the order of the goals; what belongs to none follows.
BENCHMARKS = (
    "dit_forward",
    "one_image",
    "forward_mfu",
    "refine_net",
    "whole_forward",
    "window_attention",
    "training_throughput",
    "sampling",
    "between_steps",
    "entropy",
    "pipeline_overhead",
    "sampling_overhead",
    "loading",
    "packed_chunks",
    "chunk_forward",
    "chunk_training",
    "training_step",
    "saving",
    "feeding",
    "large_cache",
    "step_savers",
    "scaling",
    "decoding",
    "frechet",
)
CPU_ONLY = ("training_step", "feeding", "large_cache", "loading", "frechet")
OPTIONS = {name: ["--threads", "2"] for name in ("training_step", "saving")}  # loading beside computing
NAMES = {"cpu": "CPU", "cuda": "GPU"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="some of them")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--table", action="store_true", help="only print the table of the results that are there")
    args, options = parser.parse_known_args()

    failed = [] if args.table else [name for name in args.only if not run(name, args.device, options)]
    print_goals()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(name: str, device: str, options: list[str]) -> bool:
    """Run a benchmark; False if it failed."""
    if device != "cpu" and name in CPU_ONLY:
        return True
    result_path(name, device).unlink(missing_ok=True)  # a result of another run must not pass for one of this run
    completed = subprocess.run(command(name, device, options))
    print(flush=True)
    return completed.returncode == 0


def command(name: str, device: str, options: list[str]) -> list[str]:
    """What runs a benchmark."""
    script = Path(__file__).with_name(f"{name}.py")
    return [sys.executable, str(script), "--device", device, *OPTIONS.get(name, []), *options]


def print_goals() -> None:
    """The table: a goal, then a line for each claim on each of its devices."""
    claims = {device: claims_of(device) for device in DEVICES}
    for number, goal in GOALS.items():
        print(f"{number:>2}. {goal.text}")
        for device in goal.devices:
            print_claims(device, [claim for claim in claims[device] if claim.goal == number] or ["not measured"])
    print("Beside the goals")
    for device in DEVICES:
        print_claims(device, [claim for claim in claims[device] if claim.goal is None])


def goals_table() -> str:
    """The goals as Markdown, and what the results that are there say of them."""
    lines = [f"| goal | {' | '.join(NAMES[device] for device in DEVICES)} |", "|---|" + "---|" * len(DEVICES)]
    claims = {device: claims_of(device) for device in DEVICES}
    for number, goal in GOALS.items():
        cells = [f"{number}. {goal.text}"]
        for device in DEVICES:
            of_goal = [
                f"{'' if claim.reached else '**not reached:** '}{claim}"
                for claim in claims[device]
                if claim.goal == number
            ]
            cells.append("<br>".join(of_goal) or ("not measured" if device in goal.devices else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def print_claims(device: str, claims: list[Claim | str]) -> None:
    for claim in claims:
        verdict = f"{'reached' if claim.reached else 'NOT REACHED':<12}  " if isinstance(claim, Claim) else ""
        print(f"      {NAMES[device]}  {verdict}{claim}")


def claims_of(device: str) -> list[Claim]:
    """All claims that the results of a device hold."""
    claims = []
    for path in (result_path(name, device) for name in BENCHMARKS):
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))["claims"]
            claims += [Claim(**{key: value for key, value in one.items() if key != "reached"}) for one in found]
    return claims


if __name__ == "__main__":
    main()
