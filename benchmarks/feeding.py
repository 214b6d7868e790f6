# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How many images a second does a CPU core deliver to a training: from JPEGs, and from a latent cache?

    python benchmarks/feeding.py

Photographs of the size of ImageNet's (500x375, about 100 kB) come from a folder, a Parquet file, a tar and a stream of
it, as `ImageDataset` and `ImageStream` give them at 256 px. Beside them: the decoding alone, by Pillow and, if it is
installed, by simplejpeg (`pip install simplejpeg`, libjpeg-turbo without Pillow), with the largest difference of their
pixels. A batch from a cache is compared with reading as many bytes of its files.

Files are warm: what is measured is the processor, not the disk.
"""

import io
import tarfile
import tempfile
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import Bench, Flag, main
from photo_maps import load_photographs

from diffusers_d2it import DynamicAutoencoderKL, load_preset
from diffusers_d2it.data import EncodedRows, LatentCache, LatentCachePlan, write_latent_cache
from diffusers_d2it.data.bad_images import BadImages
from diffusers_d2it.data.images import decode_image, fitted, to_pixels
from diffusers_d2it.data.latent_cache import CODES
from diffusers_d2it.data.loaders import ImageDataset, ImageStream
from diffusers_d2it.data.source import load_images
from diffusers_d2it.models import LatentCodec


SIZE, QUALITY, RESOLUTION = (500, 375), 98, 256
WHOLE = (499, 375)  # of which whole pixels are cropped
CACHE_BATCH = 32


def encoded_photographs(num_images: int) -> list[bytes]:
    """JPEGs of crops of photographs."""
    files = []
    photographs = load_photographs(size=512)
    for i in range(num_images):
        pixels = np.roll(photographs[i % len(photographs)].permute(1, 2, 0).numpy(), 7 * i, axis=1)
        image = PIL.Image.fromarray((127.5 * (pixels + 1)).round().clip(0, 255).astype(np.uint8))
        file = io.BytesIO()
        PIL.ImageOps.fit(image, SIZE, PIL.Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
        files.append(file.getvalue())
    return files


def resize_by_torch(image: torch.Tensor) -> torch.Tensor:
    """Bytes (1, 3, H, W), cropped and resized as `fitted` does where the crop falls on whole pixels."""
    side = min(image.shape[-2:])
    top, left = ((length - side) // 2 for length in image.shape[-2:])
    square = image[..., top : top + side, left : left + side]
    return F.interpolate(square, (RESOLUTION, RESOLUTION), mode="bicubic", antialias=True)


def write_all(folder: Path, files: list[bytes]) -> dict[str, Path]:
    """The same images as a folder, a Parquet file and a tar, each by the name of its side."""
    places = {name: folder / name for name in ("folder", "parquet", "tar")}
    for place in places.values():
        place.mkdir()
    with tarfile.open(places["tar"] / "train.tar", "w") as archive:
        for i, data in enumerate(files):
            (places["folder"] / f"{i:05d}.jpg").write_bytes(data)
            entry = tarfile.TarInfo(f"{i:05d}.jpg")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    rows = {"image": [{"bytes": data, "path": None} for data in files]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict(rows, features).to_parquet(places["parquet"] / "train.parquet")
    return places


def write_cache(folder: Path, num_images: int) -> LatentCache:
    """A cache of random codes of the size that images of 256 px have."""
    vae = DynamicAutoencoderKL(**load_preset("dvae-f8f16"))
    factors = sorted(LatentCodec(vae).describe()["downsample_factors"], reverse=True)
    plan = LatentCachePlan(
        **LatentCodec(vae).describe(), resolution=RESOLUTION, flips=True, source="random codes", data_fingerprint="",
        num_rows=num_images, rows_per_shard=num_images, num_classes=None, id2label=None,
    )  # fmt: skip

    def encode(shards: list[int]):
        for shard in shards:
            sides = [RESOLUTION // factor for factor in factors]
            shape = (num_images, 2, 2 * plan.latent_channels)
            tensors = {f"moments.{i}": torch.randn(*shape, s, s).half() for i, s in enumerate(sides)}
            tensors["entropy"] = torch.rand(num_images, sides[0], sides[0])
            rows = torch.arange(num_images)
            yield shard, EncodedRows({**tensors, "class_labels": torch.zeros_like(rows), "rows": rows})

    write_latent_cache(folder, plan, Accelerator(cpu=True), encode)
    return LatentCache(folder, None, seed=0, verify=False)


def measure(bench: Bench, num_images: int) -> str:
    files = encoded_photographs(num_images)
    bench.note("kB of a JPEG", sum(map(len, files)) / len(files) / 1e3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bad_images, sides = BadImages(folder / "bad_images.jsonl"), {}
        datasets.disable_progress_bars()
        datasets.config.HF_DATASETS_CACHE = folder / "datasets"
        for kind, place in write_all(folder, files).items():
            images = ImageDataset(load_images(place), RESOLUTION, 0, bad_images)
            sides[kind] = lambda images=images: [images[i] for i in range(num_images)]
        stream = iter(ImageStream(load_images(folder / "tar", streaming=True), RESOLUTION, 0, bad_images))
        sides["stream"] = lambda: list(islice(stream, num_images))
        sides["decoding alone, Pillow"] = lambda: [PIL.Image.open(io.BytesIO(data)).load() for data in files]
        decoded = [decode_image({"bytes": data}) for data in files]
        sides["resizing alone"] = lambda: [to_pixels(image, RESOLUTION) for image in decoded]
        cropped = [image.crop((0, 0, *WHOLE)) for image in decoded]
        tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] for image in cropped]
        resized = {
            "resizing by Pillow": lambda: [np.asarray(fitted(image, (RESOLUTION, RESOLUTION))) for image in cropped],
            "resizing by torch": lambda: [resize_by_torch(one) for one in tensors],
        }
        sides |= resized
        pairs = zip(*(make() for make in resized.values()))
        most = max(np.abs(a.astype(int) - b[0].permute(1, 2, 0).numpy()).max() for a, b in pairs)
        bench.note("largest difference of torch's resizing", most)
        try:
            from simplejpeg import decode_jpeg
        except ImportError:
            decode_jpeg = None
        if decode_jpeg is not None:
            sides["decoding alone, simplejpeg"] = lambda: [decode_jpeg(data) for data in files]
            pairs = ((np.asarray(image, int), decode_jpeg(data)) for image, data in zip(decoded, files))
            bench.note("largest difference of simplejpeg's pixels", max(abs(a - b).max() for a, b in pairs))
        cache = write_cache(folder / "cache", 64 * CACHE_BATCH)
        order = torch.randperm(len(cache)).split(CACHE_BATCH)
        codes = [path.read_bytes for path in (folder / "cache").rglob(CODES)]
        sides["latent cache"] = lambda: [cache.__getitems__(batch.tolist()) for batch in order]
        sides["the cache's files, read"] = lambda: [read() for read in codes]
        median = bench.time(sides, warmup=1)
        rates = {name: 1e3 * num_images / median[name] for name in ("folder", "parquet", "tar", "stream")}
        rates["latent cache"] = 1e3 * len(cache) / median["latent cache"]
        megabytes = sum(len(read()) for read in codes) / 1e6
    for name, rate in rates.items():
        bench.note(f"images a second, {name}", rate)
    bench.note("kB an image in the cache", 1e3 * megabytes / len(cache))
    bench.claim("MB/s from a latent cache", megabytes / median["latent cache"] * 1e3, 1000, at_least=True)
    for part in ("decoding alone, Pillow", "resizing alone"):
        bench.note(f"{part}, share of an image from a folder", median[part] / median["folder"])
    bench.more["rates"] = rates
    return f"Images of {RESOLUTION} px a second on one core"


def cores_table(rates: dict[str, float], models: dict[str, dict]) -> str:
    """Cores that a GPU needs, as Markdown: of the images a second of benchmarks/arithmetic.py, one GPU."""
    lines = [f"| model, {RESOLUTION} px | GPU | images/s | " + " | ".join(rates) + " |"]
    lines += ["|---|---|" + "---|" * (1 + len(rates)), "| images/s of a core, measured | | | "]
    lines[-1] += " | ".join(f"{rate:,.0f}" for rate in rates.values()) + " |"
    for name, sizes in models.items():
        alone = next(run for run in sizes["runs"][str(RESOLUTION)] if run["gpus"] == 1)
        for gpu, found in ((key, value) for key, value in alone.items() if isinstance(value, dict)):
            if "images_per_second" in found:
                needed = found["images_per_second"]
                cells = [name, gpu, f"{needed:,.0f}", *(f"{needed / rate:.2g}" for rate in rates.values())]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(
        measure,
        devices=("cpu",),
        most_turns={"cpu": 7},
        num_images=Flag(64, "JPEGs", lambda value: value > 0),
    )
