# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Where the tokens of RefineNet stand: all that depends on the grain map alone, worked out once per map.

The map is constant along a sampling trajectory, so these indices are too. RefineNet of level l works on the regions
whose grain is l or finer. Its tokens are packed: only these regions have any, whichever image they belong to, and the
cost of a layer follows their number. They are ordered so that no layer has to move them:

- the windows of attention (Eq. 10) that hold equally many fine regions stand next to each other, so a slice of the
  packed tokens is a batch of equally long sequences, without padding and without a mask;
- the four children of a coarser token stand next to each other, so an up-projection of the parents is a reshape away.

Shapes:
    B batch, h w sides of the grain map in regions, k grains, l level 1 ... k-1
    m = 2 ** l tokens along a side of a region; v regions along a side of a window
    N packed tokens; W windows and L tokens a window of one group
"""

from dataclasses import dataclass

import torch

from ..grains import check_grain_map


@dataclass(frozen=True)
class WindowGroup:
    """Windows that hold equally many fine regions: a slice of the packed tokens that reads as (num_windows, length).

    Args:
        num_windows: W.
        length: L, tokens in each.
        relative_index: (P, L, L) int64, row of the bias table for each query and key, for the P arrangements of fine
            regions that occur.
        arrangement: (W,) int64, which of them each window has.
    """

    num_windows: int
    length: int
    relative_index: torch.Tensor
    arrangement: torch.Tensor


@dataclass(frozen=True)
class RefineLayout:
    """The packed tokens of one level.

    Args:
        tokens: (N,) int64, index of each packed token in the flattened (B, h * m, w * m) grid of tokens.
        parents: (N / 4,) int64, index of each parent in the tokens of the level before; its four children follow one
            another.
        images: (N / 4,) int64, the image of the batch that each parent belongs to.
        groups: slices of the packed tokens, in order.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    images: torch.Tensor
    groups: tuple[WindowGroup, ...]


@dataclass(frozen=True)
class GrainLayout:
    """A grain map with the layout of every level of refinement, from `D2iTContentModel.prepare_grain_map`.

    Args:
        grain_map: (B, h, w) int64.
        levels: the layouts of levels 1 ... k-1.
        window_size: side of an attention window in tokens.
    """

    grain_map: torch.Tensor
    levels: tuple[RefineLayout, ...]
    window_size: int

    @classmethod
    def from_grain_map(cls, grain_map: torch.Tensor, num_grains: int, window_size: int) -> "GrainLayout":
        """Work out the layout of a map.

        Args:
            grain_map: (B, h, w) int64 with values 0 ... num_grains - 1.
            num_grains: k.
            window_size: side of an attention window in tokens, a multiple of 2 ** (k - 1), the side of a region.

        Raises:
            ValueError: what `check_grain_map` raises.
        """
        check_grain_map(grain_map, num_grains)
        levels = []
        position = torch.arange(grain_map.numel(), device=grain_map.device)  # of each region in the level before
        for level in range(1, num_grains):
            layout, position = _refine_layout(grain_map, level, window_size, position)
            levels.append(layout)
        return cls(grain_map, tuple(levels), window_size)


def _refine_layout(
    grain_map: torch.Tensor, level: int, window_size: int, parent_position: torch.Tensor
) -> tuple[RefineLayout, torch.Tensor]:
    batch, height, width = grain_map.shape
    device = grain_map.device
    m = 2**level
    v = window_size // m

    # 1. The window of every fine region, and which of the window's v * v slots it takes
    image, row, column = (grain_map >= level).nonzero(as_tuple=True)
    windows_high, windows_wide = -(-height // v), -(-width // v)
    window = (image * windows_high + row // v) * windows_wide + column // v
    slot = (row % v) * v + column % v
    arrangement = torch.zeros(batch * windows_high * windows_wide, dtype=torch.int64, device=device)
    arrangement.scatter_add_(0, window, 2**slot)  # a bit for every slot
    count = torch.bincount(window, minlength=len(arrangement))

    # 2. Order: windows with equally many fine regions together, a window's regions together
    order = torch.argsort(window * v * v + slot)
    order = order[torch.argsort(count[window[order]], stable=True)]
    image, row, column, window, slot = (index[order] for index in (image, row, column, window, slot))

    # 3. Tokens of a region, children of one parent together
    inner_row, inner_column = _token_order(level, device)  # (m * m,)
    token_row = row[:, None] * m + inner_row
    token_column = column[:, None] * m + inner_column
    tokens = (image[:, None] * height * m + token_row) * width * m + token_column
    region = (image * height + row) * width + column
    parents_per_region = m * m // 4
    parents = parent_position[region][:, None] * parents_per_region + torch.arange(parents_per_region, device=device)
    position = torch.full_like(parent_position, -1)
    position[region] = torch.arange(len(region), device=device)

    # 4. Groups of windows, with the relative positions (Eq. 10) of every arrangement that occurs
    groups = []
    start = 0
    regions_per_count = torch.bincount(count[window], minlength=v * v + 1).tolist()
    for regions_in_window, num_regions in enumerate(regions_per_count):
        # A map without fine regions keeps one empty group: every parameter then gets a gradient, of zero.
        if num_regions == 0 and (len(region) > 0 or regions_in_window != 1):
            continue
        first = slice(start, start + num_regions, regions_in_window)  # the first region of every window
        occurring, which = torch.unique(arrangement[window[first]], return_inverse=True)
        slots = (occurring[:, None] >> torch.arange(v * v, device=device)) & 1
        slots = slots.nonzero()[:, 1].view(len(occurring), regions_in_window)
        token_rows = ((slots // v)[..., None] * m + inner_row).flatten(1)  # (P, L)
        token_columns = ((slots % v)[..., None] * m + inner_column).flatten(1)
        relative_row = token_rows[:, :, None] - token_rows[:, None, :] + v * m - 1
        relative_column = token_columns[:, :, None] - token_columns[:, None, :] + v * m - 1
        groups.append(
            WindowGroup(
                num_windows=num_regions // regions_in_window,
                length=regions_in_window * m * m,
                relative_index=relative_row * (2 * v * m - 1) + relative_column,
                arrangement=which,
            )
        )
        start += num_regions

    layout = RefineLayout(
        tokens=tokens.flatten(),
        parents=parents.flatten(),
        images=image.repeat_interleave(parents_per_region),
        groups=tuple(groups),
    )
    return layout, position


def _token_order(level: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each token in its region, quarter by quarter: children of a parent are adjacent."""
    row = column = torch.zeros(1, dtype=torch.int64, device=device)
    quarter = torch.arange(4, device=device)
    for _ in range(level):
        row = (2 * row[:, None] + quarter // 2).flatten()
        column = (2 * column[:, None] + quarter % 2).flatten()
    return row, column
