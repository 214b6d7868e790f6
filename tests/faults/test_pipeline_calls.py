# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The pipeline: no argument is used other than it means, and numbers that are none any more give no black image."""

import inspect
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from measuring import attempt

from diffusers_d2it import D2iTImg2ImgPipeline, D2iTInpaintPipeline


VALUES = [
    "x", -1, 0, math.nan, math.inf, -math.inf, [], {}, [[]], object(), 10**9, 2.5, True, [1, "x"],
    b"x", (None,), np.float32("nan"), torch.full((3,), 0.5),
]  # fmt: skip

# What these arguments may well be: those that are left must be refused
FINE = {
    "class_labels": [0],
    "guidance_scale": [-1, 0, 2.5],
    "grain_guidance_scale": [-1, 0, 2.5],
    "fine_ratio": [0, (None,), torch.full((3,), 0.5)],  # a tuple or row is a share for each image
    "budget": [torch.full((3,), 0.5)],
    "null_budget": [torch.full((3,), 0.5)],
    "grain_map": [(None,)],
    "strength": [0],
    "paste_back": [True],
    "guidance_power": [2.5],
    "callback_on_step_end_tensor_inputs": [[]],
    "attention_kwargs": [{}],
    "eta": [0],
}


def is_fine(name: str, value: object) -> bool:
    return any(type(value) is type(good) and repr(value) == repr(good) for good in FINE.get(name, []))


def test_arguments_of_every_kind(make_pipeline, make_dcdit_pipeline, fault):
    count = fault("argument of the pipeline of the wrong kind or out of range")
    plain = make_pipeline()
    image = {"image": torch.rand(3, 32, 32)}
    mask = {"mask_image": torch.ones(32, 32, dtype=torch.bool)}
    changing, painting = (cls(**plain.components) for cls in (D2iTImg2ImgPipeline, D2iTInpaintPipeline))
    for pipe, pictures in ((plain, {}), (changing, image), (painting, image | mask), (make_dcdit_pipeline(), {})):
        cls = type(pipe)
        pipe.set_progress_bar_config(disable=True)
        for name in sorted(inspect.signature(cls.__call__).parameters.keys() - {"self", "return_dict"}):
            for value in VALUES:
                arguments = {"class_labels": 3, "num_inference_steps": 2, "output_type": "latent"} | pictures
                arguments[name] = value
                if is_fine(name, value):
                    assert pipe(**arguments).images.isfinite().all()
                    continue
                count.refused(partial(pipe, **arguments), name, what=(cls.__name__, name, value))


def test_numbers_of_numpy_are_numbers(make_pipeline):
    pipe = make_pipeline()
    arguments = {"num_inference_steps": 2, "num_images_per_prompt": 2, "guidance_scale": 1.5, "fine_ratio": 0.5}
    arguments |= {"grain_num_inference_steps": 2, "grain_guidance_scale": 2.0, "guidance_power": 2.0}
    kinds = {int: np.int64, float: np.float32}
    of_numpy = {name: kinds[type(value)](value) for name, value in arguments.items()}
    images = [
        pipe(3, generator=torch.Generator().manual_seed(0), output_type="latent", **given).images
        for given in (arguments, of_numpy)
    ]
    assert torch.equal(*images)


# ---- What is not finite ----


def fill(name: str, value: float, pipe) -> dict:
    """Make a weight of a part of the pipeline this value."""
    part, _, weight = name.partition(".")
    with torch.no_grad():
        getattr(pipe, part).get_parameter(weight).fill_(value)
    return {}


def diverging_callback(pipe) -> dict:
    return {"callback_on_step_end": lambda pipe, step, t, tensors: {"latents": tensors["latents"] * float("inf")}}


@pytest.mark.parametrize("output_type", ["pil", "latent"])
@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (partial(fill, "transformer.norm_out.proj_out.bias", math.nan), "denoising.*latents"),
        (partial(fill, "grain_model.norm_out.proj_out.bias", math.nan), "`grain_model`.*logits"),
        (partial(fill, "vae.decoder.conv_out.bias", math.nan), "`vae`.*torch.float32"),
        # Weights that are finite, and images that are not: what float16 does to some autoencoders
        (partial(fill, "vae.decoder.conv_out.weight", 1e38), "`vae`.*torch.float32"),
        (diverging_callback, "denoising.*latents"),
    ],
)
def test_what_is_not_finite_is_reported(make_pipeline, fault, output_type, plant, named):
    count = fault("part of a pipeline that diverges")
    pipe = make_pipeline()
    call = partial(pipe, 1, num_inference_steps=2, output_type=output_type, generator=torch.manual_seed(0))
    error = attempt(partial(call, **plant(pipe))).error
    if named.startswith("`vae`") and output_type == "latent":
        count.tried((named, error), silent=error is not None)
    else:
        count.tried((named, error), silent=type(error) is not ValueError or re.search(named, str(error)) is None)
