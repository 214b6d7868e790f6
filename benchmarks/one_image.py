# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""One forward for one image with guidance (batch 2) against diffusers' DiT and the original DiT, eager and compiled.

    python benchmarks/one_image.py --device cuda     # DiT-XL/2, 256x256 pixels, bf16
    python benchmarks/one_image.py                   # a small shape, fp32

All sides have the same width, the same number of blocks and the same coarse tokens. D2iT gives some of its blocks to
RefineNet, as content-xl does, and works on the grain map of a photograph of which half the regions are fine: it does
more than a DiT of its size, because a fine region has four more tokens there. That model is what the claims are about.
The backbone alone, all blocks in the Multi-grained Net, computes what the two peers compute, which is checked. A
compiled side is one graph.
"""

import peers
import torch
from common import Bench, main
from peers import DIFFUSERS, ORIGINAL, XL, DiTShape, Inputs
from photo_maps import load_photographs, real_grain_maps

from diffusers_d2it.grains import fine_share


# On an accelerator one image is bound by the launches of operators, so the small form is small enough for that too.
SMALL = DiTShape(num_layers=12, heads=3, head_dim=64, sample_size=16)
FINE_RATIO = 0.5
D2IT, BACKBONE = "D2iT", "backbone alone"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of a compiled form, relative to the largest value


@torch.no_grad()
def measure(bench: Bench) -> str:
    shape, num_refine_layers, dtype = (XL, 5, torch.bfloat16) if bench.cuda else (SMALL, 2, torch.float32)

    torch.manual_seed(0)
    photograph = load_photographs(1, size=16 * shape.side).to(bench.device)
    grain_map = real_grain_maps(photograph, FINE_RATIO)
    models = {D2IT: peers.content_model(shape, num_refine_layers), BACKBONE: peers.backbone(shape)}
    models |= peers.peers_of(models[BACKBONE])
    inputs = Inputs.random(grain_map).guided()
    of_model = {name: inputs if name == D2IT else inputs.all_fine() for name in models}

    models = {name: peers.cast(model, bench.device, torch.float32) for name, model in models.items()}
    outputs = {name: peers.forward_of(models[name], of_model[name])() for name in (BACKBONE, ORIGINAL, DIFFUSERS)}
    bench.note("largest relative difference of backbone and peers", peers.check_equal(outputs, 1e-4))
    bench.note("share of fine regions", fine_share(grain_map, 2).mean().item())

    sides = {}
    for name, model in models.items():
        forms = {name: peers.cast(model, bench.device, dtype), f"{name}, compiled": peers.compiled(model)}
        forms = {form: peers.forward_of(one, of_model[name].to(dtype)) for form, one in forms.items()}
        difference = peers.check_equal({form: forward() for form, forward in forms.items()}, TOLERANCE[dtype])
        bench.note(f"relative difference of eager and compiled, {name}", difference)
        sides |= forms
    median = bench.time(sides)
    for ours, form, at_least in (("eager", "", 2.0), ("compiled", "", 3.0), ("compiled", ", compiled", 1.15)):
        ratio = median[DIFFUSERS + form] / median[D2IT if ours == "eager" else f"{D2IT}, compiled"]
        text = f"{DIFFUSERS} {'compiled' if form else 'eager'} / D2iT {ours}"
        bench.claim(text, ratio, at_least, at_least=True, goal=2)
    for form in ("", ", compiled"):
        for peer in (DIFFUSERS, ORIGINAL):
            bench.note(f"{peer} / backbone alone{form or ', eager'}", median[peer + form] / median[BACKBONE + form])
        bench.note(f"{ORIGINAL} / D2iT{form or ', eager'}", median[ORIGINAL + form] / median[D2IT + form])
    blocks = f"{shape.num_layers} blocks (D2iT {shape.num_layers - num_refine_layers} + {num_refine_layers})"
    return f"Forward for one image with guidance: width {shape.width}, {blocks}, {shape.side**2} tokens, {dtype}"


if __name__ == "__main__":
    main(measure)
