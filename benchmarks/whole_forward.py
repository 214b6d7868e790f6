# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The content model with RefineNet on packed fine tokens against the same model with RefineNet on the whole grid.

    python benchmarks/whole_forward.py                    # content-b, four photographs, fp32
    python benchmarks/whole_forward.py --device cuda      # content-xl, batch 32, bf16

Both sides have the same weights, all of them random, and compute the same function (`dense_refine.py`), which is
checked in fp32. The Multi-grained Net is the same code on both sides. What depends on the map alone is prepared
beforehand. Both run eagerly: packed RefineNet compiles block by block, the dense one is no part of the library.
"""

import torch
from common import Bench, Flag, main
from dense_refine import DenseContentModel
from peers import Inputs, cast, check_equal, forward_of, randomized
from photo_maps import load_photographs, real_grain_maps

from diffusers_d2it import D2iTContentModel, load_preset
from diffusers_d2it.grains import fine_share


FINE_RATIO = 0.5


@torch.no_grad()
def measure(bench: Bench, preset: str, batch_size: int) -> str:
    torch.manual_seed(0)
    packed = cast(randomized(D2iTContentModel(**load_preset(preset))), bench.device, torch.float32)
    size = 8 * packed.config.sample_size
    photographs = load_photographs(batch_size, size).to(bench.device)
    inputs = Inputs.random(real_grain_maps(photographs, FINE_RATIO, batch_size), packed.config.num_classes)
    models = {"dense": DenseContentModel(packed), "packed": packed}

    error = check_equal({name: forward_of(model, inputs)() for name, model in models.items()}, 1e-4)
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    cast(packed, bench.device, dtype)  # and the other: they share their weights
    median = bench.time({name: forward_of(model, inputs.to(dtype)) for name, model in models.items()})

    share, limit = fine_share(inputs.grain_map, 2).mean().item(), 0.85 if bench.cuda else 0.82
    ratio = median["packed"] / median["dense"]
    bench.claim(f"whole forward, packed / dense at fine share {share:.2f}", ratio, limit, goal=4)
    bench.claim("difference of packed and dense in fp32, relative", error, 1e-5, goal=4)
    return f"Forward of {preset}, {batch_size} images"


if __name__ == "__main__":
    main(
        measure,
        preset=Flag({"cpu": "content-b", "cuda": "content-xl"}, "preset of the content model, two grains"),
        batch_size=Flag({"cpu": 4, "cuda": 32}, "images"),
    )
