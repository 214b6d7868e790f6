# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Where the tokens of RefineNet stand, worked out once per grain map.

The map is constant along a sampling trajectory, so these indices are too. RefineNet of level l works on the regions
whose grain is l or finer. Its tokens are packed: only these regions have any, whichever image they belong to, and the
cost of a layer follows their number. They are ordered so that no layer has to move them:

- the windows of attention (Eq. 10) that hold equally many fine regions stand next to each other, so a slice of the
  packed tokens is a batch of equally long sequences, without padding and without a mask;
- the four children of a coarser token stand next to each other, so an up-projection of the parents is a reshape away.

How many windows hold one, two, ... fine regions differs from map to map. For compiled blocks the lists are rounded:
each is filled up with windows that stand nowhere, so that there are always the same lists, none of them empty, and one
graph serves every map.

Shapes:
    B batch, h w sides of the grain map in regions, k grains, l level 1 ... k-1
    m = 2 ** l tokens along a side of a region; v regions along a side of a window
    N packed tokens; W windows and L tokens a window of one group
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch


_ROUNDING = 64  # a rounded list of windows grows by less than this part of all windows
_MAX_LISTS = 4  # lists are rounded where a window has no more regions than this, and so no more lists


@dataclass(frozen=True)
class WindowGroup:
    """Windows that hold equally many fine regions: a slice of the packed tokens that reads as (W, L).

    Args:
        length: L, tokens in each window.
        relative_index: (P, L, L) int64, row of the bias table for each query and key, for P arrangements of fine
            regions.
        arrangement: (W,) int64, which of them each window has.
    """

    length: int
    relative_index: torch.Tensor
    arrangement: torch.Tensor


@dataclass(frozen=True)
class RefineLayout:
    """The packed tokens of one level.

    Args:
        tokens: (N,) int64, index of each packed token in the flattened (B, h * m, w * m) grid of tokens; one past its
            end for tokens that stand nowhere.
        parents: (N / 4,) int64, index of each parent in the tokens of the level before; its four children follow one
            another.
        images: (N / 4,) int64, the image of the batch that each parent belongs to.
        groups: slices of the packed tokens, in order.
        rounded: whether there are tokens that stand nowhere, and sizes that a compiled graph must not rely on.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    images: torch.Tensor
    groups: tuple[WindowGroup, ...]
    rounded: bool


def pack_levels(grain_map: torch.Tensor, num_grains: int, window_size: int, rounded: bool) -> tuple[RefineLayout, ...]:
    """The packed tokens of levels 1 ... k-1.

    Args:
        grain_map: (B, h, w) int64 with values 0 ... num_grains - 1.
        num_grains: k.
        window_size: side of an attention window in tokens, a multiple of 2 ** (k - 1), the side of a region.
        rounded: round the lists of windows, for compiled blocks. They are left as they are where a window has more
            than four regions: there are too many of them, and graphs are compiled for some maps anew.
    """
    rounded = rounded and (window_size // 2) ** 2 <= _MAX_LISTS  # regions in a window of the first level, the most
    levels = []
    position = torch.arange(grain_map.numel(), device=grain_map.device)  # of each region in the level before
    for level in range(1, num_grains):
        layout, position = _refine_layout(grain_map, level, window_size, position, rounded)
        levels.append(layout)
    return tuple(levels)


def _refine_layout(
    grain_map: torch.Tensor, level: int, window_size: int, parent_position: torch.Tensor, rounded: bool
) -> tuple[RefineLayout, torch.Tensor]:
    batch, height, width = grain_map.shape
    device = grain_map.device
    m = 2**level
    v = window_size // m

    # 1. The window of every fine region, and which of the window's v * v slots it takes
    image, row, column = (grain_map >= level).nonzero(as_tuple=True)
    region = (image * height + row) * width + column
    windows_high, windows_wide = -(-height // v), -(-width // v)
    num_windows = batch * windows_high * windows_wide
    window = (image * windows_high + row // v) * windows_wide + column // v
    slot = (row % v) * v + column % v
    pattern = torch.zeros(num_windows, dtype=torch.int64, device=device)
    pattern.scatter_add_(0, window, 2**slot)  # a bit for every slot
    count = torch.bincount(window, minlength=num_windows)

    # 2. Order: windows with equally many fine regions together, a window's regions together. Lists end in regions that
    # stand nowhere, if they are rounded.
    order = torch.argsort(window * v * v + slot)
    order = order[torch.argsort(count[window[order]], stable=True)]
    region, window = region[order], window[order]
    regions_per_count = torch.bincount(count[window], minlength=v * v + 1).tolist()
    packed, groups, start = [], [], 0
    for regions_in_window, num_regions in enumerate(regions_per_count):
        # A map without fine regions keeps one empty group: every parameter then gets a gradient, of zero.
        if regions_in_window == 0 or (num_regions == 0 and not rounded and (len(region) or regions_in_window > 1)):
            continue
        first = slice(start, start + num_regions, regions_in_window)  # the first region of every window
        missing = _missing(num_regions // regions_in_window, num_windows) if rounded else 0
        packed += [region[start : start + num_regions], region.new_full((missing * regions_in_window,), -1)]
        groups.append(_window_group(pattern[window[first]], missing, regions_in_window, level, v, device))
        start += num_regions
    region = torch.cat(packed)
    nowhere = region < 0
    position = parent_position.new_full((batch * height * width + 1,), -1)  # the last is that of nowhere, -1
    position[region] = torch.arange(len(region), device=device)
    region, position = region.clamp_min(0), position[:-1]

    # 3. Tokens of a region, children of one parent together
    inner_row, inner_column = _token_order(level, device)  # (m * m,)
    image, row, column = region // (height * width), region // width % height, region % width
    token_row = row[:, None] * m + inner_row
    token_column = column[:, None] * m + inner_column
    tokens = (image[:, None] * height * m + token_row) * width * m + token_column
    tokens = tokens.masked_fill(nowhere[:, None], batch * height * m * width * m)
    parents_per_region = m * m // 4
    parents = parent_position[region][:, None] * parents_per_region + torch.arange(parents_per_region, device=device)

    layout = RefineLayout(
        tokens=tokens.flatten(),
        parents=parents.flatten().clamp_min(0),
        images=image.repeat_interleave(parents_per_region),
        groups=tuple(groups),
        rounded=rounded,
    )
    if rounded:
        sized = (layout.tokens, layout.parents, layout.images, *(group.arrangement for group in groups))
        for tensor in sized:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return layout, position


def _missing(num_windows: int, of: int) -> int:
    """Windows that fill a list up to a multiple of 1 / 64 of all; to two at least, as graphs treat 0 and 1 apart."""
    step = max(of // _ROUNDING, 1)
    return max(-(-num_windows // step) * step, 2) - num_windows


def _window_group(
    pattern: torch.Tensor, missing: int, regions_in_window: int, level: int, v: int, device: torch.device
) -> WindowGroup:
    """The group of windows with these patterns of slots (W,), and of `missing` windows that stand nowhere."""
    if v * v <= _MAX_LISTS:  # few enough to know them all beforehand
        relative_index, which = _all_arrangements(regions_in_window, level, v, device)
        arrangement = which[pattern]
    else:
        occurring, arrangement = torch.unique(pattern, return_inverse=True)
        slots = (occurring[:, None] >> torch.arange(v * v, device=device)) & 1
        slots = slots.nonzero()[:, 1].view(len(occurring), regions_in_window)
        relative_index = _relative_index(slots, level, v)
    arrangement = torch.cat([arrangement, arrangement.new_zeros(missing)])
    return WindowGroup(regions_in_window * 4**level, relative_index, arrangement)


@lru_cache(maxsize=64)
def _all_arrangements(
    regions_in_window: int, level: int, v: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative index of every arrangement of so many regions, and the arrangement of every pattern of slots."""
    slots = list(itertools.combinations(range(v * v), regions_in_window))
    which = torch.zeros(2 ** (v * v), dtype=torch.int64)
    for i, arrangement in enumerate(slots):
        which[sum(2**slot for slot in arrangement)] = i
    with torch.inference_mode(False):  # what is kept must also serve a later training step
        return _relative_index(torch.tensor(slots, device=device), level, v), which.to(device)


def _relative_index(slots: torch.Tensor, level: int, v: int) -> torch.Tensor:
    """Relative positions (Eq. 10) of the tokens of regions in these slots of a window: (P, regions) -> (P, L, L)."""
    m = 2**level
    inner_row, inner_column = _token_order(level, slots.device)
    rows = ((slots // v)[..., None] * m + inner_row).flatten(1)  # (P, L)
    columns = ((slots % v)[..., None] * m + inner_column).flatten(1)
    relative_row = rows[:, :, None] - rows[:, None, :] + v * m - 1
    relative_column = columns[:, :, None] - columns[:, None, :] + v * m - 1
    return relative_row * (2 * v * m - 1) + relative_column


def _token_order(level: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each token in its region, quarter by quarter: children of a parent are adjacent."""
    row = column = torch.zeros(1, dtype=torch.int64, device=device)
    quarter = torch.arange(4, device=device)
    for _ in range(level):
        row = (2 * row[:, None] + quarter // 2).flatten()
        column = (2 * column[:, None] + quarter % 2).flatten()
    return row, column
