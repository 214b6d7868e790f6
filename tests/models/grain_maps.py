# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Grain maps for tests of the autoencoder."""

import torch

from diffusers_d2it import DynamicAutoencoderKL


def mixed_map(photos: torch.Tensor, vae: DynamicAutoencoderKL, seed: int = 0) -> torch.Tensor:
    """A random map with every grain in every image, whatever the photographs."""
    batch, _, height, width = photos.shape
    shape = (batch, height // vae.region_size, width // vae.region_size)
    grain_map = torch.randint(vae.num_grains, shape, generator=torch.Generator().manual_seed(seed))
    grain_map[:, 0, : vae.num_grains] = torch.arange(vae.num_grains)
    return grain_map
