# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A latent cache of as many images as ImageNet has: is memory flat, and how long do writing and reading take?

    python benchmarks/large_cache.py

Codes are random and of 32 px, 1/64 of those of 256 px, so that 1.28 million images take a gigabyte; what grows with
the number of images is the same. Written and read in processes of their own: a tenth of the images, then all of them.
Reading is `LatentCache` with every hash compared, then batches in the order of a training. Memory is the anonymous
memory of a process at its peak: mapped files are not counted, which the system drops as it needs to.
"""

import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from common import Bench, Flag, in_fresh_process, main, process_memory

from diffusers_d2it import DynamicAutoencoderKL, load_preset
from diffusers_d2it.data import EncodedRows, LatentCache, LatentCachePlan, write_latent_cache
from diffusers_d2it.data.loaders import make_loader
from diffusers_d2it.models import LatentCodec


RESOLUTION, BATCH_SIZE, NUM_BATCHES = 32, 256, 200


class Peak:
    """The largest anonymous memory in MiB inside a `with`, looked at ten times a second."""

    def __enter__(self) -> "Peak":
        self.most, self._end = process_memory("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._end.wait(0.1):
            self.most = max(self.most, process_memory("RssAnon"))

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()


def write(folder: Path, num_images: int, rows_per_shard: int) -> tuple[float, float]:
    """Seconds, and MiB beyond what there is before."""
    codec = LatentCodec(DynamicAutoencoderKL(**load_preset("dvae-f8f16")))
    plan = LatentCachePlan(
        **codec.describe(), resolution=RESOLUTION, flips=True, source="random codes", data_fingerprint="",
        num_rows=num_images, rows_per_shard=rows_per_shard, num_classes=None, id2label=None,
    )  # fmt: skip
    sides = [RESOLUTION // factor for factor in sorted(plan.downsample_factors, reverse=True)]

    def encode(shards: list[int]):
        for shard in shards:
            rows = torch.tensor(plan.rows(shard))
            shape = (len(rows), 2, 2 * plan.latent_channels)
            tensors = {f"moments.{i}": torch.randn(*shape, s, s).half() for i, s in enumerate(sides)}
            tensors["entropy"] = torch.rand(len(rows), sides[0], sides[0])
            yield shard, EncodedRows({**tensors, "class_labels": torch.zeros_like(rows), "rows": rows})

    before, start = process_memory("RssAnon"), time.perf_counter()
    with Peak() as peak:
        write_latent_cache(folder, plan, Accelerator(cpu=True), encode)
    return time.perf_counter() - start, peak.most - before


def read(folder: Path) -> tuple[float, float, float]:
    """Seconds to open, images a second of batches, and MiB beyond what there is before."""
    before, start = process_memory("RssAnon"), time.perf_counter()
    with Peak() as peak:
        cache = LatentCache(folder, None, seed=0)
        opened = time.perf_counter()
        batches = make_loader(Accelerator(cpu=True), cache, batch_size=BATCH_SIZE).batches_from(0)
        next(batches)  # the order of the epoch
        begun = time.perf_counter()
        list(None for _ in islice(batches, NUM_BATCHES))
        seconds = time.perf_counter() - begun
    return opened - start, NUM_BATCHES * BATCH_SIZE / seconds, peak.most - before


def measure(bench: Bench, num_images: int, rows_per_shard: int) -> str:
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # what is freed goes back to the system
    memory = {}
    for number in (num_images // 10, num_images):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "cache")
            seconds, of_writing = in_fresh_process(write, folder, number, rows_per_shard, **at_once)
            bench.record(f"writing {number:,} images", [1e3 * seconds])
            opening, rate, of_reading = in_fresh_process(read, folder, **at_once)
            bench.record(f"opening {number:,} images, hashes compared", [1e3 * opening])
            bench.note(f"images a second in random order, of {number:,}", rate)
            bench.note(f"MB of {number:,} images", sum(f.stat().st_size for f in folder.rglob("*.*")) / 1e6)
        for what, found in (("writing", of_writing), ("reading", of_reading)):
            bench.note(f"MiB, {what} {number:,}", found)
            memory[what, number] = found
    for what in ("writing", "reading"):
        growth = (memory[what, num_images] - memory[what, num_images // 10]) * 2**20 / (num_images - num_images // 10)
        bench.claim(f"bytes of memory an image, {what}", growth, 32)
    return f"A latent cache of {num_images:,} images"


if __name__ == "__main__":
    main(
        measure,
        devices=("cpu",),
        num_images=Flag(1_281_167, "images", lambda value: value >= 10 * BATCH_SIZE),
        rows_per_shard=Flag(4096, "images of a file, as examples/cache_latents.py has them"),
    )
