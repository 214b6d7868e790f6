# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Decoding with the DVAE: layout of the memory, bfloat16, slicing and tiling; time, peak memory, change of the images.

    python benchmarks/decoding.py [--size 256] [--tile 256]

The decoder of `dvae-f8f16` has random weights, which time and memory do not ask about. It decodes one image of
`--size` pixels a side in both layouts of the memory and both dtypes, a batch sliced and at once, and images of two and
of four tiles a side whole and in tiles. The defaults of a CPU are small: with tiles of 64 pixels for 256, images of
128 and 256 pixels for 512 and 1024, every tensor is a sixteenth, so ratios of memory are those of the large images.
What tiles do to an image is measured on photographs with the bundled checkpoint, whose weights are trained.
"""

import argparse
import copy

import torch
from common import Claim, load_photographs, parse_args, peak_memory, report, time_sides
from peers import cast

from diffusers_d2it import DynamicAutoencoderKL, bundled_checkpoint, load_preset


PRESET = "dvae-f8f16"
NUM_SLICED = 4  # images of a batch that slicing takes apart


def relative_error(images: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean squared difference over the standard deviation of what is expected."""
    return ((images.float() - expected).square().mean().sqrt() / expected.std()).item()


def tiled(vae: DynamicAutoencoderKL, tile: int) -> DynamicAutoencoderKL:
    """The same autoencoder, same weights, decoding in tiles of so many pixels a side."""
    vae = copy.copy(vae)
    vae.tile_sample_min_size = tile
    vae.enable_tiling()
    return vae


def compare_formats(vae: DynamicAutoencoderKL, args: argparse.Namespace) -> tuple[dict, dict]:
    """One image in both layouts of the memory and both dtypes: timings and notes."""
    latents = torch.randn(1, 4, args.size // 8, args.size // 8, device=args.device)
    channels_last = {"memory_format": torch.channels_last}
    models = {
        "contiguous, float32": vae,
        "channels last, float32": copy.deepcopy(vae).to(**channels_last),
        "contiguous, bfloat16": cast(copy.deepcopy(vae), args.device, torch.bfloat16),
        "channels last, bfloat16": cast(copy.deepcopy(vae), args.device, torch.bfloat16).to(**channels_last),
    }
    sides = {
        name: lambda model=model: model.decode(latents.to(model.dtype), return_dict=False)[0]
        for name, model in models.items()
    }
    timings = time_sides(sides, args, warmup=1)
    expected = sides["contiguous, float32"]()
    notes = {}
    for name, decode in sides.items():
        notes[f"{name}: MiB"] = peak_memory(decode, args.device)
        notes[f"{name}: relative error"] = relative_error(decode(), expected)
    for dtype in ("float32", "bfloat16"):
        ratio = timings[f"channels last, {dtype}"].median / timings[f"contiguous, {dtype}"].median
        notes[f"channels last / contiguous, {dtype}"] = ratio
    kept = layers_in_channels_last(models["channels last, float32"], latents)
    notes["share of layers whose output stays channels last"] = kept
    return timings, notes


def layers_in_channels_last(vae: DynamicAutoencoderKL, latents: torch.Tensor) -> float:
    """Share of the decoder's modules that return feature maps, in which these are channels last."""
    kept = []

    def look(module: torch.nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            kept.append(output.is_contiguous(memory_format=torch.channels_last))

    handles = [module.register_forward_hook(look) for module in vae.decoder.modules()]
    vae.decode(latents)
    for handle in handles:
        handle.remove()
    return sum(kept) / len(kept)


def compare_slicing(vae: DynamicAutoencoderKL, args: argparse.Namespace) -> tuple[dict, dict]:
    """A batch at once and image by image: timings and notes."""
    latents = torch.randn(NUM_SLICED, 4, args.tile // 8, args.tile // 8, device=args.device)
    sliced = copy.copy(vae)
    sliced.enable_slicing()
    sides = {
        f"{NUM_SLICED} images of {args.tile} px, {name}": lambda model=model: model.decode(latents).sample
        for name, model in (("at once", vae), ("sliced", sliced))
    }
    timings = time_sides(sides, args, warmup=1)
    notes = {f"{name}: MiB": peak_memory(decode, args.device) for name, decode in sides.items()}
    at_once, one_by_one = (decode() for decode in sides.values())
    notes["sliced: relative error"] = relative_error(one_by_one, at_once)
    return timings, notes


def compare_tiling(vae: DynamicAutoencoderKL, args: argparse.Namespace) -> tuple[dict, dict, list[Claim]]:
    """Images of two and four tiles a side, whole and in tiles: timings of the smaller, peaks of both."""
    peaks, notes, timings = {}, {}, {}
    for tiles in (2, 4):
        side = tiles * args.tile
        latents = torch.randn(1, 4, side // 8, side // 8, device=args.device)
        sides = {
            f"{side} px, {name}": lambda model=model, z=latents: model.decode(z).sample
            for name, model in (("whole", vae), ("tiled", tiled(vae, args.tile)))
        }
        if tiles == 2:
            timings = time_sides(sides, args, warmup=1)
            whole, in_tiles = (timing.median for timing in timings.values())
            notes[f"{side} px, tiled / whole, time"] = in_tiles / whole
        for name, decode in sides.items():
            peaks[name] = notes[f"{name}: MiB"] = peak_memory(decode, args.device)
    small, large = (f"{tiles * args.tile} px" for tiles in (2, 4))
    notes["MiB of the larger image"] = 3 * (4 * args.tile) ** 2 * 4 / 2**20
    notes[f"peak of {large} over {small}, whole"] = peaks[f"{large}, whole"] / peaks[f"{small}, whole"]
    growth = peaks[f"{large}, tiled"] / peaks[f"{small}, tiled"]
    return timings, notes, [Claim(f"peak memory of {large} over {small}, tiled", growth, 1.2)]


def seams(device: str) -> float:
    """Relative error that tiles make in photographs, 256 px in tiles of 64, by the bundled checkpoint."""
    vae = DynamicAutoencoderKL.from_pretrained(bundled_checkpoint(), subfolder="vae").to(device)
    photographs = load_photographs(None).to(device)
    latents = vae.encode(photographs).latent_dist.mode()
    return relative_error(tiled(vae, vae.config.sample_size).decode(latents).sample, vae.decode(latents).sample)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="side in pixels of the image of layouts; default: 256, on a CPU 128")
    parser.add_argument("--tile", type=int, help="side of a tile in pixels; default: 256, on a CPU 64")
    args = parse_args(parser, "decoding")
    args.size = args.size or (128 if args.device == "cpu" else 256)
    args.tile = args.tile or (64 if args.device == "cpu" else 256)
    if args.size % 16 or args.tile % 32 or args.size < 16 or args.tile < 32:
        parser.error("--size must be a multiple of 16, --tile of 32.")

    torch.manual_seed(0)
    vae = DynamicAutoencoderKL(**load_preset(PRESET)).to(args.device).eval()
    with torch.no_grad():
        timings, notes = compare_formats(vae, args)
        for compare in (compare_slicing, compare_tiling):
            more_timings, more_notes, *claims = compare(vae, args)
            timings |= more_timings
            notes |= more_notes
        notes["photographs, bundled checkpoint, tiled: relative error"] = seams(args.device)
    report(args, f"Decoder of {PRESET}, {args.size} px; tiles of {args.tile} px", timings, claims[0], notes)


if __name__ == "__main__":
    main()
