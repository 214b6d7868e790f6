# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Grain maps and latents for tests, and the codes of latents by plain loops."""

from collections.abc import Iterator

import torch

from diffusers_d2it.grains import GrainLayout


def random_map(num_grains: int, shape: tuple[int, int, int] = (3, 4, 6), seed: int = 0) -> torch.Tensor:
    """A random map (B, h, w) with every grain in the first row of every image."""
    grain_map = torch.randint(num_grains, shape, generator=torch.Generator().manual_seed(seed))
    grain_map[:, 0, :num_grains] = torch.arange(num_grains)
    return grain_map


def random_latents(grain_map: torch.Tensor, num_grains: int, channels: int = 2, seed: int = 0) -> torch.Tensor:
    """Normal latents (B, C, h * R, w * R), not tied."""
    batch, height, width = grain_map.shape
    cells = 2 ** (num_grains - 1)
    shape = (batch, channels, height * cells, width * cells)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layout_of(latents: torch.Tensor, grain_map: torch.Tensor) -> GrainLayout:
    """The layout of a map, with as many grains as the latents have cells for."""
    return GrainLayout.from_grain_map(grain_map, (latents.shape[-1] // grain_map.shape[-1]).bit_length())


def check_tied(latents: torch.Tensor, grain_map: torch.Tensor) -> None:
    """Raise a ValueError unless every coarse code of `latents` has one value over its cells."""
    layout_of(latents, grain_map).check_tied(latents)


def codes(
    latents: torch.Tensor, grain_map: torch.Tensor, num_grains: int
) -> Iterator[tuple[int, int, int, int, torch.Tensor]]:
    """(image, grain, row and column on the grid of that grain, cells (C, side, side)) of every code."""
    cells = 2 ** (num_grains - 1)
    for image, row, column in torch.cartesian_prod(*(torch.arange(size) for size in grain_map.shape)).tolist():
        grain = grain_map[image, row, column].item()
        side = cells >> grain
        for y in range(row << grain, (row + 1) << grain):
            for x in range(column << grain, (column + 1) << grain):
                block = latents[image, :, y * side : (y + 1) * side, x * side : (x + 1) * side]
                yield image, grain, y, x, block
