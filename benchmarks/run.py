# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Run all benchmarks, one process each, and print goal, measurement and verdict.

    python benchmarks/run.py [--device cuda] [--threads 1] [--repeats 20]

The options go to every benchmark. Each writes its result to `benchmarks/results/`, where this script reads it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import RESULTS, Claim


BENCHMARKS = ("entropy", "window_attention", "refine_net")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="some of them")
    args, options = parser.parse_known_args()

    rows = []
    for name in args.only:
        output = RESULTS / f"{name}.json"
        output.unlink(missing_ok=True)  # a result of another run must not pass for one of this run
        script = Path(__file__).with_name(f"{name}.py")
        completed = subprocess.run([sys.executable, str(script), *options, "--output", str(output)], check=False)
        if completed.returncode:
            sys.exit(f"{script.name} failed with exit status {completed.returncode}.")
        print(flush=True)
        for fields in json.loads(output.read_text(encoding="utf-8"))["claims"]:
            reached = fields.pop("reached")
            rows.append((name, Claim(**fields), reached))

    width = max(len(claim.text) for _, claim, _ in rows)
    print(f"{'benchmark':<17} {'claim':<{width}} {'goal':>9}   {'measured':>8}")
    for name, claim, reached in rows:
        goal = f"{'>=' if claim.at_least else '<='} {claim.limit:.3g}"
        verdict = "reached" if reached else "NOT REACHED"
        print(f"{name:<17} {claim.text:<{width}} {goal:>9}   {claim.measured:>8.3g}   {verdict}")


if __name__ == "__main__":
    main()
