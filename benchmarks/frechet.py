# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Frechet distance of 2048 features: its time and error beside the root of a matrix, and the memory of counting them.

    python benchmarks/frechet.py

The other side is the formula as it is printed, with `scipy.linalg.sqrtm` of the product of the covariances. Both are
timed on covariances of full rank and of fewer images than features. Each measurement is a fresh process, because the
threads of scipy's BLAS are set when it is loaded, and because memory is the peak of resident memory beyond what the
imports hold. Features are random, drawn a batch at a time.
"""

import time
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from common import Bench, Flag, forget_peak_memory, in_fresh_process, main, process_memory
from scipy import linalg

from diffusers_d2it.evaluation.scores import FeatureStatistics, frechet_distance, precision_recall


MOST_TURNS = {"cpu": 3}
FEW_IMAGES, MANY_IMAGES = 2_000, 20_000
OURS, ROOT = "frechet_distance", "root of a matrix"


def root_of_matrix(mean_a: np.ndarray, a: np.ndarray, mean_b: np.ndarray, b: np.ndarray) -> float:
    """The distance by the formula as it is printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a product without full rank
        root = linalg.sqrtm(a @ b)
    return float(np.square(mean_a - mean_b).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root).real)


def moments(num_images: int, seed: int, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of random features."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(num_images, num_features)) * np.logspace(0, -3, num_features)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def time_distances(num_features: int, turns: int, threads: int) -> dict[str, dict]:
    """Milliseconds of both sides in turns, at both ranks, and what they find."""
    clock = time.process_time if threads == 1 else time.perf_counter  # as of a `Bench`
    sides, found = {OURS: frechet_distance, ROOT: root_of_matrix}, {}
    for rank, num_images in {"full rank": 2 * num_features, "half the rank": num_features // 2}.items():
        a, b = (moments(num_images, seed, num_features) for seed in (0, 1))
        for name, side in sides.items():
            side(*(moment[(slice(64),) * moment.ndim] for moment in (*a, *b)))  # loads what a first call loads
            found[f"{name}, {rank}"] = {"milliseconds": [], "error": abs(side(*a, *a)) / np.trace(a[1])}
        for _ in range(turns):
            for name, side in sides.items():
                start = clock()
                found[f"{name}, {rank}"]["distance"] = side(*a, *b)
                found[f"{name}, {rank}"]["milliseconds"].append(1e3 * (clock() - start))
    return found


def batches(num_images: int, num_features: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random features and their numbers."""
    generator = torch.Generator().manual_seed(seed)
    for indices in torch.arange(num_images).split(64):
        yield torch.randn(len(indices), num_features, generator=generator), indices


def count(num_images: int, num_features: int) -> None:
    """Mean and covariance."""
    features = FeatureStatistics(num_features)
    for batch, indices in batches(num_images, num_features, 0):
        features.update(batch, indices)
    _ = features.moments


def compare(num_images: int, num_features: int) -> None:
    """Precision and recall."""
    sets = [torch.empty(num_images, num_features) for _ in range(2)]
    for seed, rows in enumerate(sets):
        for batch, indices in batches(num_images, num_features, seed):
            rows[indices] = batch
    precision_recall(*sets, block_size=1024)


def memory_of(work: str, num_images: int, num_features: int, threads: int) -> float:
    """MiB of the peak of resident memory beyond that after the imports."""
    torch.set_num_threads(threads)
    function = {"statistics": count, "precision and recall": compare}[work]
    function(200, 16)  # loads what a first call loads
    forget_peak_memory()
    before = process_memory("VmRSS")
    function(num_images, num_features)
    return process_memory("VmHWM") - before


def measure(bench: Bench, num_features: int) -> str:
    threads = bench.threads
    found = in_fresh_process(time_distances, num_features, bench.repeats, threads, threads=threads)
    medians = {name: bench.record(name, record["milliseconds"]) for name, record in found.items()}
    for name, record in found.items():
        bench.note(f"{name}: distance", record["distance"])
        bench.note(f"{name}: of a set to itself / trace", record["error"])
    ours = [name for name in found if name.startswith(OURS)]
    difference = abs(found[f"{OURS}, full rank"]["distance"] / found[f"{ROOT}, full rank"]["distance"] - 1)
    bench.claim("seconds of a Frechet distance", max(medians[name] for name in ours) / 1e3, 10)
    bench.claim("a set to itself / trace", max(found[name]["error"] for name in ours), 1e-8)
    bench.claim(f"relative difference to the {ROOT}, full rank", difference, 1e-3)

    at_once = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # what is given back counts no more: nothing is kept for later
    for work, width, sets in (("statistics", num_features, 0), ("precision and recall", 256, 2)):
        peaks = []
        for images in (FEW_IMAGES, MANY_IMAGES):
            peaks.append(in_fresh_process(memory_of, work, images, width, threads, threads=threads, **at_once))
            bench.note(f"{work}: MiB, {images} images", peaks[-1])
        rows = sets * 4 * (MANY_IMAGES - FEW_IMAGES) * width / 2**20
        bench.claim(f"{work}: MiB more for ten times the images, beside their rows", peaks[1] - peaks[0] - rows, 4)
    return f"Frechet distance of {num_features} features"


if __name__ == "__main__":
    main(measure, devices=("cpu",), most_turns=MOST_TURNS, num_features=Flag(2048, "D"))
