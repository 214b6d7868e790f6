# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A pipeline whose numbers are no numbers any more says so, and which part of it: no black image comes out."""

import math
import re
from functools import partial

import pytest
import torch
from measuring import attempt


def fill(name: str, value: float, pipe) -> dict:
    """Make a weight of a part of the pipeline this value."""
    part, _, weight = name.partition(".")
    with torch.no_grad():
        getattr(pipe, part).get_parameter(weight).fill_(value)
    return {}


def diverging_callback(pipe) -> dict:
    return {"callback_on_step_end": lambda pipe, step, t, tensors: {"latents": tensors["latents"] * float("inf")}}


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
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
