# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Images a second of the whole pipeline, and a step of D2iT against a step of DiT with coarse and with fine tokens.

    python benchmarks/sampling.py --device cuda     # content-xl, dvae-f8f16, batch 128; bf16, compiled
    python benchmarks/sampling.py                   # the width and depth of DiT-S, one image; fp32, eager

Whole calls begin with class labels and end with PIL images: grain sampling, guided denoising and decoding are in them.
diffusers' DiTPipeline takes as many steps, at the same width and depth and with the same decoder, its model as it is
and, on a GPU, compiled.

A step is one forward of a batch with and without labels. DiT/2 and DiT/1 are made of the blocks of D2iT's backbone:
DiT/2 has one token for a region, as where D2iT is coarse, DiT/1 has four, as where it is fine. For DiT/1 latents are
twice as wide instead of the patch half as wide: the number of tokens is the same. D2iT works on grain maps of
photographs with the given share of fine regions. DiT/2 computes what diffusers' DiT computes, which is checked.
"""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Claim, Timing, parse_args, report, time_sides
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import logging
from peers import CHANNELS, XL, DiTShape, backbone, check_equal, compiled, content_model, diffusers_dit_of
from photo_maps import maps_of_shares, photograph_entropies
from torch import nn

from diffusers_d2it import D2iTContentModel, D2iTGrainModel, D2iTPipeline, DynamicAutoencoderKL, load_preset
from diffusers_d2it.grains import tie


REGION_SIZE = 16  # pixels
D2IT, DIT_2, DIT_1, DIFFUSERS = "D2iT", "DiT/2", "DiT/1", "diffusers' DiT"


@dataclass(frozen=True)
class Form:
    """What is sampled on a device.

    Args:
        name: of the size.
        shape: width, depth and tokens of DiT/2.
        num_refine_layers: how many of its blocks D2iT gives to RefineNet.
        batch_size: images.
        num_steps: of long and of short sampling.
        num_turns: timed calls of each.
        dtype: of weights.
        vae, grain_model: presets.
    """

    name: str
    shape: DiTShape
    num_refine_layers: int
    batch_size: int
    num_steps: tuple[int, int]
    num_turns: tuple[int, int]
    dtype: torch.dtype
    vae: str
    grain_model: str


FORMS = {
    "cuda": Form("content-xl", XL, 5, 128, (250, 20), (2, 5), torch.bfloat16, "dvae-f8f16", "grain-s"),
    "cpu": Form("DiT-S", DiTShape(12, 6, 64, 32), 2, 1, (8, 4), (1, 3), torch.float32, "dvae-tiny", "grain-tiny"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def step_of(
    model: D2iTContentModel | DiTTransformer2DModel, grain_map: torch.Tensor, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """A guided step: one forward of latents with these maps (B, h, w), first with class labels and then without."""
    device, batch_size, side = grain_map.device, len(grain_map), model.config.sample_size
    latents = torch.randn(batch_size, CHANNELS, side, side, generator=torch.Generator().manual_seed(0))
    latents = tie(latents.to(device, dtype), grain_map).repeat(2, 1, 1, 1)
    timestep = torch.full((2 * batch_size,), 500, device=device)
    labels = torch.arange(batch_size, device=device)
    labels = torch.cat([labels, torch.full_like(labels, 1000)])
    if isinstance(model, DiTTransformer2DModel):
        return lambda: model(latents, timestep=timestep, class_labels=labels, return_dict=False)[0]
    layout = model.prepare_grain_map(grain_map.repeat(2, 1, 1))
    return lambda: model(latents, timestep, layout, labels, return_dict=False)[0]


def time_steps(models: dict[str, nn.Module], grain_map: torch.Tensor, form: Form, args) -> dict[str, Timing]:
    """A step of D2iT with these maps, and of both DiTs, for which all regions are fine."""
    fine = torch.ones_like(grain_map)
    maps = {D2IT: grain_map, DIT_2: fine, DIT_1: fine.repeat(1, 2, 2)}
    sides = {f"step, {name}": step_of(models[name], maps[name], form.dtype) for name in maps}
    with torch.no_grad():
        return time_sides(sides, args)


# ---------------------------------------------------------------------------------------------------------------------
# Whole calls
# ---------------------------------------------------------------------------------------------------------------------


def d2it_pipeline(transformer: D2iTContentModel, vae: DynamicAutoencoderKL, form: Form, device: str) -> D2iTPipeline:
    """A pipeline with a grain model of random weights."""
    grain_model = D2iTGrainModel(**load_preset(form.grain_model) | {"num_classes": form.shape.num_classes}).eval()
    for parameter in grain_model.parameters():
        nn.init.normal_(parameter, std=0.02)  # as it starts, all regions are equally likely to be fine
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    grain_scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    grain_model.to(device, form.dtype)
    return _quiet(D2iTPipeline(vae, grain_model, transformer, scheduler, grain_scheduler))


def dit_pipeline(transformer: DiTTransformer2DModel, vae: DynamicAutoencoderKL) -> DiTPipeline:
    """diffusers' pipeline, with the decoder of D2iT."""
    transformer.register_to_config(out_channels=CHANNELS)  # which the pipeline compares
    return _quiet(DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False, timestep_spacing="trailing")))


def _quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def time_calls(pipes: dict[str, DiffusionPipeline], fine_ratio: float, form: Form, args) -> dict[str, Timing]:
    """Whole calls: of every pipeline in the fewer steps, of D2iT in the more steps too."""
    labels = list(range(form.batch_size))

    def call(pipe: DiffusionPipeline, num_steps: int) -> object:
        options = {"fine_ratio": fine_ratio} if isinstance(pipe, D2iTPipeline) else {}
        return pipe(labels, num_inference_steps=num_steps, guidance_scale=4.0, **options)

    timings = {}
    for num_steps, num_turns in zip(form.num_steps, form.num_turns):
        names = pipes if num_steps == min(form.num_steps) else [D2IT]
        sides = {f"call, {name}, {num_steps} steps": lambda p=pipes[name], n=num_steps: call(p, n) for name in names}
        turns = argparse.Namespace(**vars(args) | {"repeats": min(args.repeats, num_turns)})
        timings |= time_sides(sides, turns, warmup=1)
    return timings


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fine_ratio", type=float, default=0.5, help="share of fine regions")
    args = parse_args(parser, "sampling")
    if not 0 < args.fine_ratio < 1:
        parser.error("--fine_ratio must lie between 0 and 1.")
    form, cuda = FORMS[args.device], args.device == "cuda"
    shape = form.shape

    logging.set_verbosity_error()  # a cast warns of modules to keep in float32, of which there are none
    torch._dynamo.config.automatic_dynamic_shapes = False  # or one model's graphs would be made to serve another too
    torch.manual_seed(0)
    entropy = photograph_entropies(form.batch_size, REGION_SIZE * shape.side, REGION_SIZE)
    grain_map = maps_of_shares(entropy, (1 - args.fine_ratio, args.fine_ratio)).to(args.device)
    models: dict[str, nn.Module] = {
        D2IT: content_model(shape, form.num_refine_layers),
        DIT_2: backbone(shape),
        DIT_1: backbone(dataclasses.replace(shape, sample_size=2 * shape.sample_size)),
    }
    peer = diffusers_dit_of(models[DIT_2]).to(args.device)
    fine = torch.ones_like(grain_map[:1])
    with torch.no_grad():  # in float32, before all are cast
        sides = {DIT_2: models[DIT_2].to(args.device), DIFFUSERS: peer}
        error = check_equal({name: step_of(dit, fine, torch.float32)() for name, dit in sides.items()}, 1e-4)
    peer.to(form.dtype)
    for name, model in models.items():
        model.to(args.device, form.dtype)
        models[name] = compiled(model) if cuda else model

    timings = time_steps(models, grain_map, form, args)
    vae = DynamicAutoencoderKL(**load_preset(form.vae)).to(args.device, form.dtype).eval()
    pipes = {D2IT: d2it_pipeline(models[D2IT], vae, form, args.device), DIFFUSERS: dit_pipeline(peer, vae)}
    if cuda:
        pipes[f"{DIFFUSERS}, compiled"] = dit_pipeline(compiled(peer), vae)
    timings |= time_calls(pipes, args.fine_ratio, form, args)

    claims, notes = claims_and_notes({name: timing.median for name, timing in timings.items()}, form, cuda)
    notes["share of fine regions"] = args.fine_ratio
    notes["relative difference of DiT/2 and diffusers' DiT"] = error
    title = f"Sampling, size {form.name}, batch {form.batch_size}, guided, {form.dtype}"
    report(args, title, timings, claims, notes)


def claims_and_notes(median: dict[str, float], form: Form, cuda: bool) -> tuple[list[Claim], dict[str, float]]:
    """What is promised of content-xl on a GPU, and the same numbers of the small form as notes; images a second."""
    notes = {
        f"images a second, {name.removeprefix('call, ')}": 1e3 * form.batch_size / milliseconds
        for name, milliseconds in median.items()
        if name.startswith("call, ")
    }
    ratios = {peer: median[f"step, {D2IT}"] / median[f"step, {peer}"] for peer in (DIT_2, DIT_1)}
    if not cuda:
        return [], notes | {f"step of D2iT / {peer}, {form.name}": ratio for peer, ratio in ratios.items()}
    claims = []
    for num_steps, least in zip(form.num_steps, (3.2, 36)):
        images = notes.pop(f"images a second, {D2IT}, {num_steps} steps")
        claims.append(Claim(f"images a second, {num_steps} steps", images, least, at_least=True, goal=8))
    for peer, most in ((DIT_2, 1.25), (DIT_1, 0.35)):
        claims.append(Claim(f"step of D2iT / {peer}", ratios[peer], most, goal=8))
    return claims, notes


if __name__ == "__main__":
    main()
