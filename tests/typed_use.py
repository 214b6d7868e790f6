# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What an editor knows of the public names: read by mypy (`make types`), never run."""

import torch
from PIL import Image
from typing_extensions import assert_type

from diffusers_d2it import (
    D2iTContentModel,
    D2iTGrainModel,
    D2iTImg2ImgPipeline,
    D2iTInpaintPipeline,
    D2iTPipeline,
    D2iTPipelineOutput,
    DynamicAutoencoderKL,
    GrainLayout,
    bundled_checkpoint,
    foveated_grain_map,
    grain_map_from_boxes,
    grain_map_from_mask,
    list_presets,
    region_entropy,
    tie,
)


pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
assert_type(pipe, D2iTPipeline)
assert_type(pipe.to("cpu"), D2iTPipeline)
assert_type(pipe.vae, DynamicAutoencoderKL)
assert_type(pipe.grain_model, D2iTGrainModel)
assert_type(pipe.transformer, D2iTContentModel)
assert_type(pipe("lion", grain_map=["coarse", None]), D2iTPipelineOutput | tuple)  # type: ignore[type-arg]
assert_type(pipe.interpolate(0, 7, steps=8), list[Image.Image])

size = pipe.grain_map_size()
assert_type(size, tuple[int, int])
assert_type(pipe.get_label_ids("lion"), list[int])
assert_type(grain_map_from_mask(Image.new("L", (64, 64)), size), torch.Tensor)
assert_type(grain_map_from_boxes([(0, 0, 16, 16)], size, image_size=(64, 64)), torch.Tensor)
assert_type(foveated_grain_map((8, 8), size, image_size=(64, 64), fine_ratio=0.3), torch.Tensor)
assert_type(region_entropy(torch.zeros(1, 3, 64, 64)), torch.Tensor)

edit = D2iTImg2ImgPipeline.from_pipe(pipe)
assert_type(edit, D2iTImg2ImgPipeline)
assert_type(D2iTInpaintPipeline.from_pipe(pipe), D2iTInpaintPipeline)

# (Of the models themselves diffusers' `register_to_config` hides the type of the class, not that of its instances.)
layout = pipe.transformer.prepare_grain_map(torch.zeros(1, 4, 4, dtype=torch.int64))
assert_type(layout, GrainLayout)
assert_type(layout.tie(torch.zeros(1, 4, 8, 8)), torch.Tensor)
assert_type(tie(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, dtype=torch.int64)), torch.Tensor)
assert_type(list_presets(), list[str])

pipe("lion", fine_ratoi=0.3)  # type: ignore[call-arg]
pipe("lion", num_inference_steps="twenty")  # type: ignore[arg-type]
