# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Decoding with the DVAE: layout of the memory, bfloat16 and tiling; time, peak memory, change of the images.

    python benchmarks/decoding.py

The decoder of `dvae-f8f16` has random weights, which time and memory do not ask about. It decodes one image in both
layouts of the memory and both dtypes, and images of two and of four tiles a side whole and in tiles. On a CPU they are
small: with tiles of 64 pixels for 256, images of 128 and 256 pixels for 512 and 1024, every tensor is a sixteenth, so
ratios of memory are those of the large images.
What tiles do to an image is measured on photographs with the bundled checkpoint, whose weights are trained.
"""

import copy

import torch
from common import Bench, main
from peers import cast
from photo_maps import load_photographs

from diffusers_d2it import DynamicAutoencoderKL, bundled_checkpoint, load_preset


PRESET = "dvae-f8f16"


def relative_error(images: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean squared difference over the standard deviation of what is expected."""
    return ((images.float() - expected).square().mean().sqrt() / expected.std()).item()


def tiled(vae: DynamicAutoencoderKL, tile: int) -> DynamicAutoencoderKL:
    """The same autoencoder, same weights, decoding in tiles of so many pixels a side."""
    vae = copy.copy(vae)
    vae.tile_sample_min_size = tile
    vae.enable_tiling()
    return vae


def compare_formats(bench: Bench, vae: DynamicAutoencoderKL, size: int) -> None:
    """One image in both layouts of the memory and both dtypes."""
    latents = torch.randn(1, 4, size // 8, size // 8, device=bench.device)
    in_bfloat16 = cast(copy.deepcopy(vae), bench.device, torch.bfloat16)
    models = {"contiguous, float32": vae, "contiguous, bfloat16": in_bfloat16}
    for dtype in ("float32", "bfloat16"):
        plain = copy.deepcopy(models[f"contiguous, {dtype}"])
        models[f"channels last, {dtype}"] = plain.to(memory_format=torch.channels_last)
    sides = {name: lambda vae=model: vae.decode(latents.to(vae.dtype)).sample for name, model in models.items()}
    median = bench.time(sides, warmup=1)
    expected = sides["contiguous, float32"]()
    for name, decode in sides.items():
        bench.note(f"{name}: MiB", bench.peak_memory(decode))
        bench.note(f"{name}: relative error", relative_error(decode(), expected))
    for dtype in ("float32", "bfloat16"):
        ratio = median[f"channels last, {dtype}"] / median[f"contiguous, {dtype}"]
        bench.note(f"channels last / contiguous, {dtype}", ratio)


def compare_tiling(bench: Bench, vae: DynamicAutoencoderKL, tile: int) -> None:
    """Images of two and four tiles a side, whole and in tiles: times of the smaller, peaks of both."""
    models, peaks = {"whole": vae, "tiled": tiled(vae, tile)}, {}
    for tiles in (2, 4):
        side = tiles * tile
        latents = torch.randn(1, 4, side // 8, side // 8, device=bench.device)
        sides = {name: lambda model=model, z=latents: model.decode(z).sample for name, model in models.items()}
        if tiles == 2:
            whole, in_tiles = bench.time({f"{side} px, {name}": decode for name, decode in sides.items()}, 1).values()
            bench.note(f"{side} px, tiled / whole, time", in_tiles / whole)
        for name, decode in sides.items():
            peaks[tiles, name] = bench.peak_memory(decode)
            bench.note(f"{side} px, {name}: MiB", peaks[tiles, name])
    growth = f"{4 * tile} px over {2 * tile} px"
    bench.note("MiB of the larger image", 3 * (4 * tile) ** 2 * 4 / 2**20)
    bench.note(f"peak of {growth}, whole", peaks[4, "whole"] / peaks[2, "whole"])
    bench.claim(f"peak memory of {growth}, tiled", peaks[4, "tiled"] / peaks[2, "tiled"], 1.2)


def seams(device: str) -> float:
    """Relative error that tiles make in photographs, 256 px in tiles of 64, by the bundled checkpoint."""
    vae = DynamicAutoencoderKL.from_pretrained(bundled_checkpoint(), subfolder="vae").to(device)
    photographs = load_photographs().to(device)
    latents = vae.encode(photographs).latent_dist.mode()
    return relative_error(tiled(vae, vae.config.sample_size).decode(latents).sample, vae.decode(latents).sample)


@torch.no_grad()
def measure(bench: Bench) -> str:
    size, tile = (256, 256) if bench.cuda else (128, 64)  # pixels
    torch.manual_seed(0)
    vae = DynamicAutoencoderKL(**load_preset(PRESET)).to(bench.device).eval()
    compare_formats(bench, vae, size)
    compare_tiling(bench, vae, tile)
    bench.note("photographs, bundled checkpoint, tiled: relative error", seams(bench.device))
    return f"Decoder of {PRESET}, {size} px; tiles of {tile} px"


if __name__ == "__main__":
    main(measure)
