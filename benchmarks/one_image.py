# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""One forward for one image with guidance (batch 2) against diffusers' DiT and the original DiT, eager and compiled.

    python benchmarks/one_image.py --device cuda     # DiT-XL/2, 256x256 pixels, bf16
    python benchmarks/one_image.py                   # a small shape, fp32

All sides have the same width, the same number of blocks and the same coarse tokens. D2iT gives some of its blocks to
RefineNet, as content-xl does, and works on the grain map of a photograph of which half the regions are fine: it does
more than a DiT of its size, because a fine region has four more tokens there. That model is what the claims are about.
The backbone alone, all blocks in the Multi-grained Net, computes what the two peers compute, which is checked.

Compiled are, on each side, what its class offers: the repeated blocks of D2iT, the whole model of the peers. A
compiled side is compared with its eager form.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack

import torch
from common import Claim, load_photographs, parse_args, real_grain_maps, report, time_sides
from peers import (
    CHANNELS,
    XL,
    DiTShape,
    all_fine_layout,
    backbone,
    cast,
    check_equal,
    compiled,
    content_model,
    diffusers_dit_of,
    original_dit_of,
)
from torch import nn

from diffusers_d2it.grains import fine_share, tie


# On an accelerator one image is bound by the launches of operators, so the small form is small enough for that too.
SMALL = DiTShape(num_layers=12, heads=3, head_dim=64, sample_size=16)
FINE_RATIO = 0.5
D2IT, BACKBONE, ORIGINAL, DIFFUSERS = "D2iT", "backbone alone", "original DiT", "diffusers' DiT"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of a compiled form, relative to the largest value


def forward_of(model: nn.Module, name: str, inputs: tuple, grain_map: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What one step of sampling calls. What depends on the map alone is prepared here, once for all steps."""
    latents, timestep, labels = inputs
    if name == ORIGINAL:
        return lambda: model(latents, timestep, labels)
    if name == DIFFUSERS:
        return lambda: model(latents, timestep=timestep, class_labels=labels, return_dict=False)[0]
    if name == BACKBONE:
        layout = all_fine_layout(model, len(latents), latents.device)
    else:
        layout = model.prepare_grain_map(grain_map)
    return lambda: model(latents, timestep, layout, labels, return_dict=False)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of photographs, of which the first is taken")
    args = parse_args(parser, "one_image")
    cuda = args.device == "cuda"
    shape, num_refine_layers, dtype = (XL, 5, torch.bfloat16) if cuda else (SMALL, 2, torch.float32)

    torch.manual_seed(0)
    photograph = load_photographs(args.images, limit=1, size=16 * shape.side).to(args.device)
    grain_map = real_grain_maps(photograph, FINE_RATIO).repeat(2, 1, 1)  # with and without the class label
    models = {D2IT: content_model(shape, num_refine_layers), BACKBONE: backbone(shape)}
    models |= {ORIGINAL: original_dit_of(models[BACKBONE]), DIFFUSERS: diffusers_dit_of(models[BACKBONE])}
    latents = tie(torch.randn(1, CHANNELS, shape.sample_size, shape.sample_size, device=args.device), grain_map[:1])
    timestep = torch.full((2,), 500, device=args.device)
    labels = torch.tensor([7, shape.num_classes], device=args.device)

    with torch.no_grad(), ExitStack() as context:
        inputs = (latents.repeat(2, 1, 1, 1), timestep, labels)
        outputs = {
            name: forward_of(cast(models[name], args.device, torch.float32), name, inputs, grain_map)()
            for name in (BACKBONE, ORIGINAL, DIFFUSERS)
        }
        error = check_equal(outputs, 1e-4)

        inputs = (inputs[0].to(dtype), timestep, labels)
        sides, differences = {}, {}
        for name, model in models.items():
            cast(model, args.device, dtype)
            forms = (model, compiled(model))
            if name in (D2IT, BACKBONE):  # as a sampling call does, once for all its steps
                for form in forms:
                    context.enter_context(form.fused_blocks())
            eager, fast = (forward_of(form, name, inputs, grain_map) for form in forms)
            differences[name] = check_equal({name: eager(), f"{name}, compiled": fast()}, TOLERANCE[dtype])
            sides |= {name: eager, f"{name}, compiled": fast}
        timings = time_sides(sides, args)

    claims, notes = claims_and_notes({name: timing.median for name, timing in timings.items()}, cuda)
    notes["share of fine regions"] = fine_share(grain_map, 2).mean().item()
    notes["largest relative difference of backbone and peers"] = error
    notes |= {f"relative difference of eager and compiled, {name}": value for name, value in differences.items()}
    title = (
        f"Forward for one image with guidance: width {shape.width}, {shape.num_layers} blocks (D2iT"
        f" {shape.num_layers - num_refine_layers} + {num_refine_layers}), {shape.side**2} tokens, {dtype}"
    )
    report(args, title, timings, claims, notes)


def claims_and_notes(median: dict[str, float], cuda: bool) -> tuple[list[Claim], dict[str, float]]:
    """How many times as fast D2iT is as diffusers' DiT: claims at the real size, notes at the small one."""
    promised = (
        ("diffusers' DiT eager / D2iT eager", median[DIFFUSERS] / median[D2IT], 2.0),
        ("diffusers' DiT eager / D2iT compiled", median[DIFFUSERS] / median[f"{D2IT}, compiled"], 3.0),
        (
            "diffusers' DiT compiled / D2iT compiled",
            median[f"{DIFFUSERS}, compiled"] / median[f"{D2IT}, compiled"],
            1.15,
        ),
    )
    claims = [Claim(text, measured, limit, at_least=True, goal=2) for text, measured, limit in promised]
    notes = {}
    if not cuda:
        claims, notes = [], {f"{text}, small shape": measured for text, measured, _ in promised}
    for form in ("", ", compiled"):
        for peer in (DIFFUSERS, ORIGINAL):
            notes[f"{peer} / backbone alone{form or ', eager'}"] = median[peer + form] / median[BACKBONE + form]
        notes[f"{ORIGINAL} / D2iT{form or ', eager'}"] = median[ORIGINAL + form] / median[D2IT + form]
    return claims, notes


if __name__ == "__main__":
    main()
