# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Calls of a pipeline that give the same images for the same seed."""

import torch


MAP_ALONE = {"num_inference_steps": 1, "output_type": "latent"}  # where only the map of a call is looked at


def call_with(**defaults):
    """call(pipe, *args, seed=0, **kwargs): what a pipeline returns; `kwargs` replace the defaults."""

    def call(pipe, *args, seed: int = 0, **kwargs):
        return pipe(*args, generator=torch.Generator().manual_seed(seed), **(defaults | kwargs))

    return call
