# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What share of a training step from a latent cache goes into waiting for its batch, and into updating the weights
and their average; and what memory a larger cache takes.

    python benchmarks/training_step.py --threads 2

The steps are those of examples/train_d2it.py, content-tiny in batches of 32 from a cache of 32 px crops of
photographs. No step is shorter, so none has larger shares. The goal is for `--dataloader_num_workers 0`, the
default; a worker is timed too, but to hand a batch over takes it longer than to read one. Memory is the anonymous
memory of a process that has read every image of a cache, and of one ten times as large.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from common import Bench, Flag, in_fresh_process, load_script, main, process_memory
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from photo_maps import load_photographs

from diffusers_d2it import D2iTGrainModel, DynamicAutoencoderKL, load_preset
from diffusers_d2it.data import (
    EncodedRows,
    LatentCache,
    LatentCachePlan,
    encode_images,
    write_latent_cache,
)
from diffusers_d2it.models import LatentCodec
from diffusers_d2it.training import run as training_run


BATCH_SIZE = 32
RESOLUTION = 32  # of dvae-tiny


def crops(num_images: int) -> torch.Tensor:
    """Crops of four photographs, (N, 3, 32, 32): a grid of them at 512 px, and again from one pixel further on."""
    photographs = load_photographs(size=512)
    found = []
    for shift in range(RESOLUTION):
        shifted = photographs[..., shift : 512 - RESOLUTION + shift, shift : 512 - RESOLUTION + shift]
        tiles = shifted.unfold(2, RESOLUTION, RESOLUTION).unfold(3, RESOLUTION, RESOLUTION)
        found.append(tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, RESOLUTION, RESOLUTION))
    return torch.cat(found)[:num_images].contiguous()


def write_cache(folder: Path, vae: DynamicAutoencoderKL, num_images: int, rows_per_shard: int) -> None:
    """Cache crops of photographs and their mirrors."""
    pixels = crops(num_images)
    plan = LatentCachePlan(
        **LatentCodec(vae).describe(),
        resolution=RESOLUTION,
        flips=True,
        source="crops of photographs of scikit-image",
        data_fingerprint="",
        num_rows=len(pixels),
        rows_per_shard=rows_per_shard,
        num_classes=10,
        id2label={label: str(label) for label in range(10)},
    )

    def encode(shards: list[int]) -> Iterator[tuple[int, EncodedRows]]:
        for shard in shards:
            rows = torch.arange(plan.rows(shard).start, plan.rows(shard).stop)
            parts = [encode_images(vae, pixels[part], flips=True) for part in rows.split(256)]
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            yield shard, EncodedRows({**tensors, "class_labels": rows % 10, "rows": rows})

    write_latent_cache(folder, plan, Accelerator(cpu=True), encode)


def time_steps(folder: Path, output: Path, num_workers: int, num_steps: int) -> list[tuple[float, float, float]]:
    """Milliseconds of waiting, of the update and of the whole step, for the steps of a run but the first and last."""
    script = load_script("train_d2it")
    asked, given, updated = [], [], []
    batches_from = training_run.batches_from

    def timed(*arguments) -> Iterator[dict]:
        batches = batches_from(*arguments)
        while True:
            asked.append(time.perf_counter())
            batch = next(batches)
            given.append(time.perf_counter())
            yield batch

    def timed_step(step: Callable) -> Callable:
        def method(*arguments, **options):
            start = time.perf_counter()
            result = step(*arguments, **options)
            updated.append(time.perf_counter() - start)
            return result

        return method

    flags = f"--latent_cache {folder / 'large'} --vae {folder / 'vae'} --grain {folder} --preset content-tiny"
    flags += f" --resolution {RESOLUTION} --train_batch_size {BATCH_SIZE} --dataloader_num_workers {num_workers}"
    flags += f" --max_train_steps {num_steps} --output_dir {output} --report_to none"
    optimizer = patch.object(torch.optim.AdamW, "step", timed_step(torch.optim.AdamW.step))
    average = patch.object(EMAModel, "step", timed_step(EMAModel.step))
    with optimizer, average, patch.object(training_run, "batches_from", timed):
        script.main(script.parse_args(flags.split()))
    waited = [1e3 * (end - start) for start, end in zip(asked, given)]
    update = [1e3 * (weights + average) for weights, average in zip(updated[::2], updated[1::2])]
    whole = [1e3 * (end - start) for start, end in zip(asked, asked[1:])]
    return list(zip(waited, update, whole))[3:]


def anonymous_memory(cache: Path) -> float:
    """MiB after every image of a cache was read; what the file system keeps of the shards is not part of it."""
    images = LatentCache(cache, None, seed=0)
    for index in range(len(images)):
        images[index]
    return process_memory("RssAnon")


def measure(bench: Bench, num_images: int) -> str:
    torch.manual_seed(0)
    vae, shares = DynamicAutoencoderKL(**load_preset("dvae-tiny")).eval(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vae.save_pretrained(folder / "vae")
        D2iTGrainModel(**load_preset("grain-tiny")).save_pretrained(folder / "grain_model")
        DDIMScheduler(prediction_type="sample", clip_sample=False).save_pretrained(folder / "grain_scheduler")
        caches = [folder / "small", folder / "large"]
        for cache, times in zip(caches, (1, 10)):
            write_cache(cache, vae, times * num_images, rows_per_shard=num_images // 4)
        for num_workers in (0, 1):
            steps = time_steps(folder, folder / f"run-{num_workers}", num_workers, num_steps=10 * bench.repeats)
            for part, times in zip(("waiting", "optimizer and average", "step"), zip(*steps)):
                bench.record(f"{part}, {num_workers} workers", times)
            shares[num_workers] = [statistics.median(step[part] / step[2] for step in steps) for part in (0, 1)]
        bench.claim("waiting, share of a step", shares[0][0], 0.05)
        bench.claim("optimizer and average, share of a step", shares[0][1], 0.10)
        bench.note("waiting, share of a step with a worker", shares[1][0])

        # The C library returns what is freed at once, instead of keeping it as it sees fit
        at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        sizes, memory = [], []
        for text, cache in zip(("a cache", "ten times as many images"), caches):
            sizes.append(sum(path.stat().st_size for path in cache.rglob("*.safetensors")) / 2**20)
            used = [in_fresh_process(anonymous_memory, cache, **at_once) for _ in range(3)]
            memory.append(statistics.median(used))
            bench.note(f"MiB of {text}", sizes[-1])
            bench.note(f"MiB of anonymous memory, {text}", memory[-1])
        growth = (memory[1] - memory[0]) / (sizes[1] - sizes[0])
        bench.claim("growth of anonymous memory over growth of the cache", growth, 0.01)
    return f"Training from a latent cache, content-tiny, batch {BATCH_SIZE}"


if __name__ == "__main__":
    main(measure, devices=("cpu",), num_images=Flag(2048, "images of the smaller cache"))
