# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A pipeline whose numbers are no numbers any more says so, and which part of it: no black image comes out."""

import re

import pytest
import torch


def plant_nan(name: str):
    def plant(pipe):
        part, _, weight = name.partition(".")
        with torch.no_grad():
            getattr(pipe, part).get_parameter(weight).fill_(float("nan"))
        return {}

    return plant


def overflow_decoder(pipe):
    """Weights that are finite, and images that are not: what float16 does to some autoencoders."""
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.fill_(1e38)
    return {}


def diverging_callback(pipe):
    return {"callback_on_step_end": lambda pipe, step, t, tensors: {"latents": tensors["latents"] * float("inf")}}


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (plant_nan("transformer.norm_out.proj_out.bias"), "denoising ended in latents that are not finite"),
        (plant_nan("grain_model.norm_out.proj_out.bias"), "`grain_model` ended in logits that are not finite"),
        (plant_nan("vae.decoder.conv_out.bias"), "`vae` decoded finite latents.*not finite in torch.float32"),
        (overflow_decoder, "`vae` decoded finite latents.*not finite in torch.float32"),
        (diverging_callback, "denoising ended in latents that are not finite"),
    ],
)
def test_what_is_not_finite_is_reported(make_pipeline, fault, output_type, plant, message):
    count = fault("part of a pipeline that diverges")
    pipe = make_pipeline()
    options = plant(pipe)
    reported = not message.startswith("`vae`") or output_type != "latent"
    try:
        pipe(1, num_inference_steps=2, output_type=output_type, generator=torch.manual_seed(0), **options)
    except ValueError as error:
        count.tried(f"{message}: {error}", silent=re.search(message, str(error)) is None or not reported)
    else:
        count.tried(f"{message}: nothing", silent=reported)
