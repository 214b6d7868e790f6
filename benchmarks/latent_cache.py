# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How long a training step waits for its batch from a latent cache, and what memory a larger cache takes.

    python benchmarks/latent_cache.py

The step is that of train_d2it.py, content-tiny on 32 px crops of photographs, from codes and noise to the update of
the weights and their average; one worker reads batches on the second core, as `--dataloader_num_workers 1` does, and
none is timed too. Steps shorter than these of the tiny preset are not to be expected. Memory is the anonymous memory
of a process that has read every image of a cache, and of one ten times as large.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import Accelerator
from common import Claim, Timing, load_photographs, parse_args, report
from diffusers.training_utils import EMAModel

from diffusers_d2it import D2iTContentModel, DynamicAutoencoderKL, load_preset
from diffusers_d2it.data.latent_cache import LatentCache, read_codes
from diffusers_d2it.data.latent_cache_files import LatentCachePlan, describe_vae
from diffusers_d2it.data.latent_cache_writer import EncodedRows, LatentCacheWriter, encode_images
from diffusers_d2it.data.loaders import batches_from, make_loader
from diffusers_d2it.grains import grain_map_from_entropy, tie
from diffusers_d2it.losses import multi_grained_loss
from diffusers_d2it.objectives import make_objective


BATCH_SIZE = 32
RESOLUTION = 32  # of dvae-tiny

# Anonymous memory in KiB after every image was read; what the file system keeps of the shards is not part of it.
MEASURE_MEMORY = """
import sys
from pathlib import Path
import torch
from diffusers_d2it.data.latent_cache import LatentCache
torch.set_num_threads(1)
cache = LatentCache(sys.argv[1], None, seed=0, verify=False)
for index in range(len(cache)):
    cache[index]
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")))
"""


def crops(num_images: int) -> torch.Tensor:
    """Crops of four photographs, (N, 3, 32, 32): a grid of them at 512 px, and again from one pixel further on."""
    photographs = load_photographs(None, size=512)
    found = []
    for shift in range(RESOLUTION):
        shifted = photographs[..., shift : 512 - RESOLUTION + shift, shift : 512 - RESOLUTION + shift]
        tiles = shifted.unfold(2, RESOLUTION, RESOLUTION).unfold(3, RESOLUTION, RESOLUTION)
        found.append(tiles.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, RESOLUTION, RESOLUTION))
        if sum(map(len, found)) >= num_images:
            break
    return torch.cat(found)[:num_images].contiguous()


def write_cache(folder: Path, vae: DynamicAutoencoderKL, num_images: int, rows_per_shard: int) -> None:
    """Cache crops of photographs and their mirrors."""
    plan = LatentCachePlan(
        **describe_vae(vae),
        resolution=RESOLUTION,
        flips=True,
        source=f"{num_images} crops of photographs of scikit-image",
        data_fingerprint=str(num_images),
        num_rows=num_images,
        rows_per_shard=rows_per_shard,
        num_classes=10,
        id2label={label: str(label) for label in range(10)},
    )
    pixels = crops(num_images)
    writer = LatentCacheWriter(folder, plan, Accelerator(cpu=True))
    for shard in writer.start():
        rows = torch.arange(plan.rows(shard).start, plan.rows(shard).stop)
        parts = [encode_images(vae, pixels[part], flips=True) for part in rows.split(256)]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        writer.write_shard(shard, EncodedRows({**tensors, "class_labels": rows % 10, "rows": rows}))
    writer.finish()


def time_steps(cache: Path, vae: DynamicAutoencoderKL, num_workers: int, num_steps: int) -> list[tuple[float, float]]:
    """Seconds of waiting, and of the whole step, for steps of train_d2it.py after three to warm up."""
    accelerator = Accelerator(cpu=True)
    args = Namespace(train_batch_size=BATCH_SIZE, dataloader_num_workers=num_workers, seed=0)
    dataset = LatentCache(cache, vae, seed=0, resolution=RESOLUTION)
    torch.manual_seed(0)
    transformer = D2iTContentModel(**load_preset("content-tiny"))
    objective = make_objective("epsilon")
    ema = EMAModel(transformer.parameters(), foreach=True)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(transformer, optimizer, make_loader(accelerator, dataset, args))
    generator = torch.Generator().manual_seed(0)
    batches = batches_from(accelerator, loader, 0)
    seconds = []
    for _ in range(3 + num_steps):
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        with torch.no_grad():
            moments, entropy = read_codes(vae, batch)
            grain_map = grain_map_from_entropy(entropy, vae.thresholds())
            latents = vae.scale_latents(vae.posterior(moments, grain_map).sample(generator))
        noise = tie(torch.randn(latents.shape, generator=generator), grain_map)
        timesteps = objective.sample_timesteps(len(latents), generator)
        noised = objective.add_noise(latents, noise, timesteps)
        prediction = model(noised, timesteps, grain_map, batch["class_labels"]).sample
        losses = multi_grained_loss(prediction, objective.target(latents, noise, timesteps), grain_map)
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(transformer.parameters())
        losses["loss"].item()
        seconds.append((waited, time.perf_counter() - start))
    return seconds[3:]


def anonymous_memory(cache: Path) -> int:
    """KiB of a fresh process that has read all of a cache."""
    command = [sys.executable, "-c", MEASURE_MEMORY, str(cache)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=2048, help="images of the smaller cache")
    args = parse_args(parser, "latent_cache")
    if args.device != "cpu" or not Path("/proc/self/status").is_file():
        parser.error("this is about the CPU, and reads /proc of Linux.")

    vae = DynamicAutoencoderKL(**load_preset("dvae-tiny")).eval()
    timings, claims, notes = {}, [], {}
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder) / name for name in ("small", "large")]
        for cache, times in zip(caches, (1, 10)):
            write_cache(cache, vae, times * args.num_images, rows_per_shard=args.num_images // 4)
        for num_workers in (1, 0):
            steps = time_steps(caches[1], vae, num_workers, num_steps=10 * args.repeats)
            waited, whole = ([1e3 * step[i] for step in steps] for i in (0, 1))
            for name, times in (("waiting", waited), ("step", whole)):
                timings[f"{name}, {num_workers} workers"] = Timing(min(times), statistics.median(times), max(times))
            shares = [wait / step for wait, step in steps]
            notes[f"waiting share of all steps together, {num_workers} workers"] = sum(waited) / sum(whole)
            claims.append(
                Claim(f"waiting share of a step, median, {num_workers} workers", statistics.median(shares), 0.05)
            )

        sizes = [sum(path.stat().st_size for path in cache.glob("*.safetensors")) / 2**20 for cache in caches]
        small, large = (statistics.median(anonymous_memory(cache) for _ in range(3)) / 1024 for cache in caches)
        notes |= {"cache, MiB": sizes[0], "ten times as many images, MiB": sizes[1]}
        notes |= {"anonymous memory, MiB": small, "ten times as many images, anonymous memory, MiB": large}
        claims.append(
            Claim("more anonymous memory per MiB of more cache", (large - small) / (sizes[1] - sizes[0]), 0.01)
        )

    report(args, f"Training from a latent cache, content-tiny, batch {BATCH_SIZE}", timings, claims, notes)


if __name__ == "__main__":
    main()
