# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Ways to sample faster, each against a full run of the bundled checkpoint: time saved, and how far the samples move.

    python benchmarks/step_savers.py --batch_size 3

The full run is of the first order (DDIM, or Euler for flow matching): 50 steps, guidance 4 in all of them. All runs
start from the same noise with the same grain maps, so that only the saver differs. For each saver:

- speed-up: time of the full run over its time, whole calls that end in latents;
- change: relative error of its latents against those of the full run, and the PSNR of the decoded images;
- the plain way: the relative error of DDIM with so few steps that it takes the same time (steps in proportion);
- error: relative error of its latents against a converged run, DDIM with many steps. The full run has one too, and a
  better solver moves samples away from the full run by as much: it is to be judged by this column.

DDIM is written here as DPM-Solver++ of order 1, which is the same: `DDIMScheduler` steps over `1000 // steps` training
steps, and so misses its own timesteps where that does not divide.
"""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import torch
from common import Bench, Flag, main
from diffusers import DPMSolverMultistepScheduler
from peers import quiet

from diffusers_d2it import D2iTPipeline, bundled_checkpoint, load_sampler


STEPS = 50
GUIDANCE = 4.0
FULL = f"full run: DDIM, {STEPS} steps"
MOST_TURNS = {"cpu": 5}  # of some fifteen calls that take seconds
EVERY_BLOCK = [r"(refine_nets\.\d+\.)?transformer_blocks\.\d+"]


@dataclass(frozen=True)
class Saver:
    """A way to sample."""

    num_inference_steps: int = STEPS
    sampler: str | None = None  # name for `load_sampler`; None for DDIM
    cache: Callable[[D2iTPipeline], object] | None = None  # makes the config of a cache for a pipeline
    arguments: dict = field(default_factory=dict)  # of the call of the pipeline


@dataclass(frozen=True)
class Inputs:
    """What all runs have in common: class ids, grain maps (B, h, w) and noise (B, C, H, W)."""

    class_labels: list[int]
    grain_map: torch.Tensor
    latents: torch.Tensor

    @classmethod
    def draw(cls, pipe: D2iTPipeline, batch_size: int, seed: int) -> "Inputs":
        """Classes in turn, maps of the grain model, and noise, from one seed for each image."""
        known = sorted(pipe.id2label)
        labels = [known[(3 * i + seed) % len(known)] for i in range(batch_size)]
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(batch_size)]
        output = pipe(labels, num_inference_steps=1, generator=generators, output_type="latent")
        noise = [torch.randn(output.images.shape[1:], generator=generator) for generator in generators]
        return cls(labels, output.grain_maps, torch.stack(noise))


def make_savers(mag_ratios: list[float]) -> dict[str, Saver]:
    """The savers by name: caches with the defaults of diffusers, and careful ones where those move samples far."""

    def broadcast(pipe: D2iTPipeline) -> diffusers.PyramidAttentionBroadcastConfig:
        return diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
        )

    def taylor(cache_interval: int, identifiers: list[str] | None) -> Callable:
        return lambda _: diffusers.TaylorSeerCacheConfig(cache_interval=cache_interval, cache_identifiers=identifiers)

    def mag(**settings) -> Callable:
        return lambda _: diffusers.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=mag_ratios, **settings)

    return {
        "DPM-Solver++, 20 steps": Saver(20, "dpmsolver++"),
        "UniPC, 20 steps": Saver(20, "unipc"),
        "UniPC, 15 steps": Saver(15, "unipc"),
        "FirstBlockCache, threshold 0.05": Saver(cache=lambda _: diffusers.FirstBlockCacheConfig(threshold=0.05)),
        "FirstBlockCache, threshold 0.01": Saver(cache=lambda _: diffusers.FirstBlockCacheConfig(threshold=0.01)),
        "MagCache": Saver(cache=mag()),
        "MagCache, 1 step at most": Saver(cache=mag(threshold=0.03, max_skip_steps=1)),
        "PAB, every 2nd attention": Saver(cache=broadcast),
        "TaylorSeer, attention, every 5th": Saver(cache=taylor(5, None)),
        "TaylorSeer, blocks, every 3rd": Saver(cache=taylor(3, EVERY_BLOCK)),
        "TaylorSeer, blocks, every 5th": Saver(cache=taylor(5, EVERY_BLOCK)),
        "guidance_interval (0, 0.8)": Saver(arguments={"guidance_interval": (0.0, 0.8)}),
        "guidance_interval (0.2, 0.8)": Saver(arguments={"guidance_interval": (0.2, 0.8)}),
    }


def sample(pipe: D2iTPipeline, saver: Saver, inputs: Inputs) -> torch.Tensor:
    """Latents of one call; the pipeline stays as it was."""
    plain = pipe.scheduler
    if saver.sampler is not None:
        pipe.scheduler = load_sampler(saver.sampler, plain)
    if saver.cache is not None:
        pipe.transformer.enable_cache(saver.cache(pipe))
    latents = pipe(
        **vars(inputs),
        num_inference_steps=saver.num_inference_steps,
        guidance_scale=GUIDANCE,
        output_type="latent",
        **({"guidance_interval": (0.0, 1.0)} | saver.arguments),
    ).images
    if saver.cache is not None:
        pipe.transformer.disable_cache()
    pipe.scheduler = plain
    return latents


def calibrate_mag_cache(pipe: D2iTPipeline, inputs: Inputs) -> list[float]:
    """Ratios of residuals from step to step, which diffusers prints at the end of a calibration run."""
    calibration = Saver(cache=lambda _: diffusers.MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        sample(pipe, calibration, inputs)
    ratios = json.loads(next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0")))
    if len(ratios) != STEPS:
        raise RuntimeError(f"calibration of MagCache gave {len(ratios)} ratios for {STEPS} steps.")
    return ratios


def relative_error(latents: torch.Tensor, expected: torch.Tensor) -> float:
    return ((latents - expected).norm() / expected.norm()).item()


def psnr(pipe: D2iTPipeline, latents: torch.Tensor, expected: torch.Tensor) -> float:
    """Decibel, over all pixels of the decoded images in [0, 1]."""
    images, expected_images = (pipe.decode_latents(x, "pt") for x in (latents, expected))
    return -10 * (images - expected_images).square().mean().log10().item()


def compare(
    pipe: D2iTPipeline, inputs: Inputs, samples: dict[str, torch.Tensor], median: dict, converged: torch.Tensor
) -> list[dict]:
    """A row for the full run, which comes first, and for every saver."""
    full = samples[FULL]
    plain_runs = {STEPS: full}
    rows = [{"saver": FULL, "error": relative_error(full, converged)}]
    for name, latents in list(samples.items())[1:]:
        speed_up = median[FULL] / median[name]
        steps = max(1, round(STEPS / speed_up))
        if steps not in plain_runs:
            plain_runs[steps] = sample(pipe, Saver(steps), inputs)
        row = {"saver": name, "speed_up": speed_up, "change": relative_error(latents, full)}
        row |= {"psnr": psnr(pipe, latents, full), "error": relative_error(latents, converged), "ddim_steps": steps}
        row["ddim_change"] = relative_error(plain_runs[steps], full)
        row["ddim_error"] = relative_error(plain_runs[steps], converged)
        rows.append(row)
    return rows


def savers_table(rows: list[dict]) -> str:
    """As Markdown."""
    lines = [
        "| | speed-up | change | PSNR, dB | error | DDIM in that time: steps, error |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {FULL} | 1 | | | {rows[0]['error']:.3f} | |"]
    columns = "| {saver} | {speed_up:.2f} | {change:.3f} | {psnr:.1f} | {error:.3f} | {ddim_steps}, {ddim_error:.3f} |"
    return "\n".join([*lines, *(columns.format(**row) for row in rows[1:])]) + "\n"


def measure(bench: Bench, batch_size: int, reference_steps: int) -> str:
    pipe = quiet(D2iTPipeline.from_pretrained(bundled_checkpoint())).to(bench.device)
    ddim = {"solver_order": 1, "timestep_spacing": "trailing"}  # for any number of steps
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **ddim)
    inputs = Inputs.draw(pipe, batch_size, seed=0)
    mag_ratios = calibrate_mag_cache(pipe, Inputs.draw(pipe, batch_size, seed=1))  # of other images

    savers = {FULL: Saver(), **make_savers(mag_ratios)}
    samples = {name: sample(pipe, saver, inputs) for name, saver in savers.items()}  # and a warm-up
    converged = sample(pipe, Saver(reference_steps), inputs)
    sides = {name: lambda saver=saver: sample(pipe, saver, inputs) for name, saver in savers.items()}
    rows = compare(pipe, inputs, samples, bench.time(sides, warmup=0), converged)
    print(savers_table(rows))
    bench.more = {"savers": rows, "mag_ratios": mag_ratios}
    return f"Step savers on the bundled checkpoint, {batch_size} images, guidance {GUIDANCE:g}"


if __name__ == "__main__":
    main(
        measure,
        most_turns=MOST_TURNS,
        batch_size=Flag({"cpu": 3, "cuda": 64}, "images of a call"),
        reference_steps=Flag({"cpu": 250, "cuda": 1000}, "of the converged run"),
    )
