# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Overlapping tiles of an image or of latents: where they begin, and how they are joined."""

import torch


def tile_starts(side: int, tile: int, stride: int) -> range:
    """Where the tiles of a side begin: the last one is the first that reaches its end."""
    return range(0, max(side - (tile - stride), 1), stride)


def blend_tiles(tiles: list[list[torch.Tensor]], stride: int, overlap: int) -> torch.Tensor:
    """Join overlapping tiles: where two meet, the earlier fades linearly into the later."""
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            if i > 0:
                tile = _fade(tiles[i - 1][j], tile, stride, overlap, dim=-2)
            if j > 0:
                tile = _fade(row[j - 1], tile, stride, overlap, dim=-1)
            row[j] = tile
    rows = [torch.cat([*(tile[..., :stride] for tile in row[:-1]), row[-1]], dim=-1) for row in tiles]
    return torch.cat([*(row[..., :stride, :] for row in rows[:-1]), rows[-1]], dim=-2)


def _fade(before: torch.Tensor, after: torch.Tensor, stride: int, overlap: int, dim: int) -> torch.Tensor:
    shared = min(overlap, before.shape[dim] - stride, after.shape[dim])
    if shared <= 0:
        return after
    ramp = torch.linspace(0, 1, shared + 2, device=after.device, dtype=after.dtype)[1:-1]
    ramp = ramp[:, None] if dim == -2 else ramp
    start = after.narrow(dim, 0, shared)
    faded = before.narrow(dim, stride, shared) * (1 - ramp) + start * ramp
    return torch.cat([faded, after.narrow(dim, shared, after.shape[dim] - shared)], dim=dim)
