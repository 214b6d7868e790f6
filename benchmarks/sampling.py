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
photographs, of which half the regions are fine. DiT/2 computes what diffusers' DiT computes, which is checked.
"""

import dataclasses
from dataclasses import dataclass

import peers
import torch
from common import Bench, main
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import logging
from peers import CHANNELS, DIFFUSERS, XL, DiTShape, Inputs
from photo_maps import maps_of_shares, photograph_entropies

from diffusers_d2it import D2iTPipeline, DynamicAutoencoderKL


REGION_SIZE = 16  # pixels
FINE_RATIO = 0.5
D2IT, DIT_2, DIT_1 = "D2iT", "DiT/2", "DiT/1"


@dataclass(frozen=True)
class Form:
    """What is sampled on a device."""

    name: str
    shape: DiTShape  # of DiT/2
    num_refine_layers: int  # how many of its blocks D2iT gives to RefineNet
    batch_size: int
    num_steps: tuple[int, int]  # of long and of short sampling
    num_turns: tuple[int, int]  # timed calls of each
    dtype: torch.dtype
    vae: str  # preset
    grain_model: str  # preset


FORMS = {
    "cuda": Form("content-xl", XL, 5, 128, (250, 20), (2, 5), torch.bfloat16, "dvae-f8f16", "grain-s"),
    "cpu": Form("DiT-S", DiTShape(12, 6, 64, 32), 2, 1, (8, 4), (1, 3), torch.float32, "dvae-tiny", "grain-tiny"),
}


def dit_pipeline(transformer: DiTTransformer2DModel, vae: DynamicAutoencoderKL) -> DiTPipeline:
    """diffusers' pipeline, with the decoder of D2iT."""
    transformer.register_to_config(out_channels=CHANNELS)  # which the pipeline compares
    return peers.quiet(DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False, timestep_spacing="trailing")))


@torch.no_grad()
def time_steps(bench: Bench, models: dict, grain_map: torch.Tensor, form: Form) -> None:
    """A step of D2iT with these maps, and of both DiTs, for which all regions are fine."""
    fine = torch.ones_like(grain_map)
    maps = {D2IT: grain_map, DIT_2: fine, DIT_1: fine.repeat(1, 2, 2)}
    inputs = {name: Inputs.random(grain_map).guided().to(form.dtype) for name, grain_map in maps.items()}
    median = bench.time({f"step, {name}": peers.forward_of(models[name], inputs[name]) for name in maps})
    for peer, most in ((DIT_2, 1.25), (DIT_1, 0.35)):
        bench.claim(f"step of D2iT / {peer}", median[f"step, {D2IT}"] / median[f"step, {peer}"], most, goal=8)


def time_calls(bench: Bench, pipes: dict[str, DiffusionPipeline], form: Form) -> None:
    """Whole calls: of every pipeline in the fewer steps, of D2iT in the more steps too."""

    def call(pipe: DiffusionPipeline, num_steps: int) -> object:
        options = {"fine_ratio": FINE_RATIO, "guidance_interval": (0.0, 1.0)} if isinstance(pipe, D2iTPipeline) else {}
        labels = list(range(form.batch_size))
        return pipe(labels, num_inference_steps=num_steps, guidance_scale=4.0, **options)

    for num_steps, num_turns, least in zip(form.num_steps, form.num_turns, (3.2, 36)):
        names = pipes if num_steps == min(form.num_steps) else [D2IT]
        sides = {f"call, {name}, {num_steps} steps": lambda p=pipes[name], n=num_steps: call(p, n) for name in names}
        for name, milliseconds in zip(names, bench.time(sides, warmup=1, repeats=num_turns).values()):
            text, speed = f"images a second, {name}, {num_steps} steps", 1e3 * form.batch_size / milliseconds
            if name == D2IT:
                bench.claim(text, speed, least, at_least=True, goal=8)
            else:
                bench.note(text, speed)


def measure(bench: Bench) -> str:
    form = FORMS[bench.device]
    shape = form.shape
    logging.set_verbosity_error()  # a cast warns of modules to keep in float32, of which there are none
    torch._dynamo.config.automatic_dynamic_shapes = False  # or one model's graphs would be made to serve another too
    torch.manual_seed(0)
    entropy = photograph_entropies(form.batch_size, REGION_SIZE * shape.side, REGION_SIZE)
    grain_map = maps_of_shares(entropy, (1 - FINE_RATIO, FINE_RATIO)).to(bench.device)
    models = {
        D2IT: peers.content_model(shape, form.num_refine_layers),
        DIT_2: peers.backbone(shape),
        DIT_1: peers.backbone(dataclasses.replace(shape, sample_size=2 * shape.sample_size)),
    }
    models[DIFFUSERS] = peers.diffusers_dit_of(models[DIT_2])
    fine = Inputs.random(torch.ones_like(grain_map[:1])).guided()
    with torch.no_grad():  # in float32, before all are cast
        sides = {name: peers.cast(models[name], bench.device, torch.float32) for name in (DIT_2, DIFFUSERS)}
        error = peers.check_equal({name: peers.forward_of(model, fine)() for name, model in sides.items()}, 1e-4)
    bench.note("relative difference of DiT/2 and diffusers' DiT", error)
    bench.note("share of fine regions", FINE_RATIO)
    for name, model in models.items():
        peers.cast(model, bench.device, form.dtype)
        models[name] = peers.compiled(model) if bench.cuda and name != DIFFUSERS else model

    time_steps(bench, models, grain_map, form)
    pipes = {D2IT: peers.random_pipeline(models[D2IT], form.vae, form.grain_model, bench.device, form.dtype)}
    pipes[DIFFUSERS] = dit_pipeline(models[DIFFUSERS], pipes[D2IT].vae)
    if bench.cuda:
        pipes[f"{DIFFUSERS}, compiled"] = dit_pipeline(peers.compiled(models[DIFFUSERS]), pipes[D2IT].vae)
    time_calls(bench, pipes, form)
    return f"Sampling, size {form.name}, batch {form.batch_size}, guided, {form.dtype}"


if __name__ == "__main__":
    main(measure)
