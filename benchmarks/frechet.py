# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Frechet distance of 2048 features: its time and error beside the root of a matrix, and the memory of counting them.

    python benchmarks/frechet.py

The other side is the formula as it is printed, with `scipy.linalg.sqrtm` of the product of the covariances. Both are
timed on covariances of full rank and of fewer images than features. Each measurement is a fresh process, because the
threads of scipy's BLAS are set when it is loaded, and because memory is the peak of resident memory beyond what the
imports hold. Features are random, drawn a batch at a time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import Claim, Timing, parse_args, report


MOST_TURNS = 3
FEW_IMAGES, MANY_IMAGES = 2_000, 20_000
MIB = 2**20

# Prints seconds of both sides in turns, and what they find.
TIME = """
import json, sys, time, warnings
import numpy as np
from scipy import linalg
from diffusers_d2it.evaluation.frechet import frechet_distance
def moments(num_images, seed, num_features):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(num_images, num_features)) * np.logspace(0, -3, num_features)
    return features.mean(axis=0), np.cov(features, rowvar=False)
def root_of_matrix(mean_a, a, mean_b, b):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a product without full rank
        root = linalg.sqrtm(a @ b)
    return float(np.square(mean_a - mean_b).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root).real)
num_features, turns, threads = (int(value) for value in sys.argv[1:])
clock = time.process_time if threads == 1 else time.perf_counter  # as in common.py
sides = {"frechet_distance": frechet_distance, "root of a matrix": root_of_matrix}
found = {}
for rank, num_images in {"full rank": 2 * num_features, "half the rank": num_features // 2}.items():
    a, b = (moments(num_images, seed, num_features) for seed in (0, 1))
    for side in sides.values():
        side(*(moment[(slice(64),) * moment.ndim] for moment in (*a, *b)))
    for turn in range(turns):
        for name, side in sides.items():
            start = clock()
            distance = side(*a, *b)
            elapsed = clock() - start
            record = found.setdefault(f"{name}, {rank}", {"seconds": [], "distance": distance})
            record["seconds"].append(elapsed)
    for name, side in sides.items():
        found[f"{name}, {rank}"]["error"] = abs(side(*a, *a)) / np.trace(a[1])
print(json.dumps(found))
"""

# Prints KiB of the peak of resident memory beyond that after the imports.
REMEMBER = """
import sys
from pathlib import Path
import torch
from diffusers_d2it.evaluation.scores import precision_recall
from diffusers_d2it.evaluation.statistics import FeatureStatistics
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":")))
def batches(num_images, num_features, seed):
    generator = torch.Generator().manual_seed(seed)
    for indices in torch.arange(num_images).split(64):
        yield torch.randn(len(indices), num_features, generator=generator), indices
def count(num_images, num_features):
    features = FeatureStatistics(num_features)
    for batch, indices in batches(num_images, num_features, 0):
        features.update(batch, indices)
    features.moments
def compare(num_images, num_features):
    sets = [torch.empty(num_images, num_features) for _ in range(2)]
    for seed, rows in enumerate(sets):
        for batch, indices in batches(num_images, num_features, seed):
            rows[indices] = batch
    precision_recall(*sets, block_size=1024)
torch.set_num_threads(int(sys.argv[4]))
work = {"count": count, "compare": compare}[sys.argv[1]]
work(200, 16)  # loads what a first call loads
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
work(int(sys.argv[2]), int(sys.argv[3]))
print(status("VmHWM") - before)
"""


def call(code: str, threads: int, *arguments: object) -> str:
    """The last line that a fresh process prints."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    if code == REMEMBER:
        environment["MALLOC_MMAP_THRESHOLD_"] = (
            "131072"  # what is given back counts no more: nothing is kept for later
        )
    command = [sys.executable, "-c", code, *map(str, arguments), str(threads)]
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return result.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_features", type=int, default=2048, help="D")
    args = parse_args(parser, "frechet")
    if args.device != "cpu" or not Path("/proc/self/clear_refs").is_file():
        parser.error("this is about the CPU, and reads /proc of Linux.")

    timings, notes = {}, {}
    found = json.loads(call(TIME, args.threads, args.num_features, min(args.repeats, MOST_TURNS)))
    for name, record in found.items():
        times = [1e3 * seconds for seconds in record["seconds"]]
        timings[name] = Timing(min(times), statistics.median(times), max(times))
        notes[f"{name}: distance"] = record["distance"]
        notes[f"{name}: of a set to itself / trace"] = record["error"]
    ours = {name: record for name, record in found.items() if name.startswith("frechet_distance")}
    theirs = found["root of a matrix, full rank"]["distance"]

    grown = {}
    for work, features in (("count", args.num_features), ("compare", 256)):
        few, many = (int(call(REMEMBER, args.threads, work, n, features)) / 1024 for n in (FEW_IMAGES, MANY_IMAGES))
        what = {"count": "statistics", "compare": "precision and recall beside their rows"}[work]
        notes[f"{what}: MiB, {FEW_IMAGES} images"], notes[f"{what}: MiB, {MANY_IMAGES} images"] = few, many
        rows = 2 * 4 * (MANY_IMAGES - FEW_IMAGES) * features / MIB if work == "compare" else 0
        grown[what] = many - few - rows

    report(
        args,
        f"Frechet distance of {args.num_features} features",
        timings,
        [
            Claim("seconds of a Frechet distance", max(timings[name].median for name in ours) / 1e3, 10),
            Claim("a set to itself / trace", max(record["error"] for record in ours.values()), 1e-8),
            Claim(
                "relative difference to the root of a matrix, full rank",
                abs(ours["frechet_distance, full rank"]["distance"] / theirs - 1),
                1e-3,
            ),
            *(Claim(f"{what}: MiB more for ten times the images", growth, 4) for what, growth in grown.items()),
        ],
        notes,
    )


if __name__ == "__main__":
    main()
