# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every argument of the pipeline with values of every kind: used as they mean, or refused at once and by name."""

import inspect
import math
from functools import partial

import numpy as np
import torch

from diffusers_d2it import D2iTPipeline


VALUES = [
    "x", -1, 0, math.nan, math.inf, -math.inf, [], {}, [[]], object(), 10**9, 2.5, True, [1, "x"], torch.zeros(3),
    b"x", (None,), np.float32("nan"),
]  # fmt: skip

# What these arguments may well be: those that are left must be refused
FINE = {
    "class_labels": [0],
    "guidance_scale": [-1, 0, 2.5],
    "grain_guidance_scale": [-1, 0, 2.5],
    "fine_ratio": [0],
    "guidance_power": [2.5],
    "callback_on_step_end_tensor_inputs": [[]],
}


def is_fine(name: str, value: object) -> bool:
    return any(type(value) is type(good) and value == good for good in FINE.get(name, []))


def test_arguments_of_every_kind(make_pipeline, fault):
    count = fault("argument of the pipeline of the wrong kind or out of range")
    pipe = make_pipeline()
    names = inspect.signature(D2iTPipeline.__call__).parameters.keys() - {"self", "return_dict"}
    assert FINE.keys() <= names
    for name in sorted(names):
        for value in VALUES:
            arguments = {"class_labels": 3, "num_inference_steps": 1, "output_type": "latent", name: value}
            if is_fine(name, value):
                assert pipe(**arguments).images.isfinite().all()
                continue
            count.refused(partial(pipe, **arguments), name, what=(name, value))


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
