# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A random number for each image, from its own generator, on its device; tensors are of diffusers' `randn_tensor`.

Shapes:
    B generators
"""

import torch


def draw_uniform(generators: list[torch.Generator]) -> torch.Tensor:
    """(B,) float32 in [0, 1)."""
    return torch.stack([torch.rand((), generator=one, device=one.device) for one in generators])


def draw_integers(end: int, generators: list[torch.Generator]) -> torch.Tensor:
    """(B,) int64 in 0 ... end - 1."""
    return torch.stack([torch.randint(end, (), generator=one, device=one.device) for one in generators])
