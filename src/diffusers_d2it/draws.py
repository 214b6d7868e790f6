# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Everything random of an image is its own: its generator, and a number from each. Tensors: diffusers' `randn_tensor`.

Shapes:
    B generators
"""

import numpy as np
import torch


NUM_SEEDS = 2**32  # torch's generator of a CPU reads no more bits of a seed: above, noise would repeat unnoticed


def random_word(seed: int, *key: int) -> int:
    """64 random bits, others for every key."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def generators_of(images: range, seed: int, *key: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """A generator for each image, no two of them alike; those of the CPU draw the same for every device."""
    first = random_word(seed, *key)
    return [torch.Generator(device).manual_seed((first + image) % NUM_SEEDS) for image in images]


def draw_uniform(generators: list[torch.Generator]) -> torch.Tensor:
    """(B,) float32 in [0, 1), on the device of the generators."""
    return torch.stack([torch.rand((), generator=one, device=one.device) for one in generators])


def draw_integers(end: int, generators: list[torch.Generator]) -> torch.Tensor:
    """(B,) int64 in 0 ... end - 1, on the device of the generators."""
    return torch.stack([torch.randint(end, (), generator=one, device=one.device) for one in generators])
