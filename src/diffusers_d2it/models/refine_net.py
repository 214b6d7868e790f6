# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""RefineNet (sec. 3.2.3 of arXiv:2504.09454): where its tokens stand, their attention in windows (Eq. 10), the net.

The map is constant along a sampling trajectory, so where tokens stand is worked out once per map. RefineNet of level l
works on the regions whose grain is l or finer. Its tokens are packed: only these regions have any, whichever image
they belong to, and the cost of a layer follows their number. They are ordered so that no layer has to move them:

- the windows of attention (Eq. 10) that hold equally many fine regions stand next to each other, so a slice of the
  packed tokens is a batch of equally long sequences, without padding and without a mask;
- the four children of a coarser token stand next to each other, so an up-projection of the parents is a reshape away.

How many windows hold one, two, ... fine regions differs from map to map. For compiled blocks the lists are rounded:
each is filled up with windows that stand nowhere, so that there are always the same lists, none of them empty, and one
graph serves every map. Where a graph is recorded from the map itself on, every window is whole, and its fine regions
attend to one another only: right for every map, at the cost of one that is fine throughout.

Shapes:
    B batch, C latent channels, O output channels, D width, A heads
    h w sides of the grain map in regions, k grains, l level 1 ... k-1, R = 2 ** (k-1) cells along a side of a region
    m = 2 ** l tokens along a side of a region; v regions along a side of a window
    N packed tokens; W windows and L tokens a window of one group
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from ..limits import is_traced
from .layers import (
    DiTBlock,
    FinalLayer,
    SelfAttention,
    TimestepEmbedder,
    attend,
    of_any_size,
    residual_stream,
    run_block,
)


_ROUNDING = 64  # a rounded list of windows grows by less than this part of all windows
_MAX_LISTS = 4  # lists are rounded where a window has no more regions than this, and so no more lists


@dataclass(frozen=True)
class WindowGroup:
    """Windows that hold equally many fine regions: a slice of the packed tokens that reads as (W, L)."""

    length: int  # L, tokens in each window
    # (P, L, L) int64, row of the bias table for query and key, for P arrangements; past its end: no attention
    relative_index: torch.Tensor
    arrangement: torch.Tensor  # (W,) int64, which of the P arrangements of fine regions each window has


@dataclass(frozen=True)
class RefineLayout:
    """The packed tokens of one level; the four children of a parent follow one another."""

    tokens: torch.Tensor  # (N,) int64, index of each in the flattened (B, h * m, w * m) grid; past its end: nowhere
    parents: torch.Tensor  # (N / 4,) int64, index of each parent in the tokens of the level before
    images: torch.Tensor  # (N / 4,) int64, the image of the batch that each parent belongs to
    groups: tuple[WindowGroup, ...]  # slices of the packed tokens, in order
    rounded: bool  # whether some tokens stand nowhere, and a compiled graph must not rely on the sizes


for _layout in (WindowGroup, RefineLayout):
    torch.export.register_dataclass(_layout)


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


def _fine_windows(
    grain_map: torch.Tensor, level: int, v: int, rounded: bool
) -> tuple[torch.Tensor, list[WindowGroup]]:
    """The fine regions of every window, windows with equally many of them together."""
    batch, height, width = grain_map.shape
    device = grain_map.device

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
    return torch.cat(packed), groups


def _whole_windows(grain_map: torch.Tensor, level: int, v: int) -> tuple[torch.Tensor, list[WindowGroup]]:
    """All regions of every window: sizes that no map changes."""
    height, width = grain_map.shape[1:]
    region = torch.arange(grain_map.numel(), device=grain_map.device).view(grain_map.shape)
    region = region.masked_fill(grain_map < level, -1)
    region = F.pad(region, (0, -width % v, 0, -height % v), value=-1)
    region = region.unflatten(2, (-1, v)).unflatten(1, (-1, v)).transpose(2, 3).reshape(-1, v * v)  # (W, v * v)
    is_fine = (region >= 0).repeat_interleave(4**level, dim=1)  # (W, L)
    relative_index = _relative_index(torch.arange(v * v, device=region.device)[None], level, v)
    apart = is_fine[:, :, None] != is_fine[:, None, :]
    relative_index = relative_index.masked_fill(apart, (2 * v * 2**level - 1) ** 2)  # (W, L, L)
    group = WindowGroup(v * v * 4**level, relative_index, torch.arange(region.shape[0], device=region.device))
    return region.flatten(), [group]


def _refine_layout(
    grain_map: torch.Tensor, level: int, window_size: int, parent_position: torch.Tensor, rounded: bool
) -> tuple[RefineLayout, torch.Tensor]:
    batch, height, width = grain_map.shape
    device = grain_map.device
    m = 2**level
    v = window_size // m
    traced = is_traced(grain_map)

    # 1. Regions in the order of their windows, -1 for those that stand nowhere
    region, groups = _whole_windows(grain_map, level, v) if traced else _fine_windows(grain_map, level, v, rounded)
    nowhere = region < 0
    position = parent_position.new_full((batch * height * width + 1,), -1)  # the last is that of nowhere, -1
    position[region] = torch.arange(region.shape[0], device=device)
    region, position = region.clamp_min(0), position[:-1]

    # 2. Tokens of a region, children of one parent together
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
        rounded=rounded or traced,
    )
    if rounded:
        for tensor in (layout.tokens, layout.parents, layout.images, *(group.arrangement for group in groups)):
            of_any_size(tensor, 0)
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


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


class WindowAttention(SelfAttention):
    """Self-attention inside windows of `side` tokens a side, with a learned bias per head and relative position."""

    def __init__(self, dim: int, heads: int, side: int):
        super().__init__(dim, heads)
        self.relative_position_bias = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RefineLayout
    ) -> torch.Tensor:
        """Packed tokens, each (N / 4, 4, A, D / A) -> the same, attending inside their windows, Eq. 10.

        A window holds at most a few dozen tokens, so the scores are written out: for so few keys a plain matrix
        product and softmax is as fast as a fused kernel, and faster in the backward pass, where a bias needs the
        scores anyway.
        """
        shape = query.shape
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # (N, A, D / A)
        lengths = [group.arrangement.shape[0] * group.length for group in layout.groups]
        bias_table = self.relative_position_bias
        if layout.rounded:
            bias_table = F.pad(bias_table, (0, 0, 0, 1), value=-torch.inf)
        attended = []
        for group, *qkv in zip(layout.groups, query.split(lengths), key.split(lengths), value.split(lengths)):
            q, k, v = (x.unflatten(0, (-1, group.length)).transpose(1, 2) for x in qkv)  # (W, A, L, D / A)
            bias = bias_table[group.relative_index]  # (P, L, L, A)
            bias = bias.permute(0, 3, 1, 2).index_select(0, group.arrangement)  # (W, A, L, L)
            attended.append(attend(q, k, v, bias).transpose(1, 2).flatten(0, 1))  # (W * L, A, D / A)
        return torch.cat(attended).view(shape)


class RefineBlock(DiTBlock):
    """DiT block on packed tokens: the modulation of each token's image, attention inside windows (Eq. 10)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, side: int):
        super().__init__(dim, heads, mlp_ratio, attn=WindowAttention(dim, heads, side))

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, layout: RefineLayout) -> torch.Tensor:
        """hidden_states (N / 4, 4, D), conditioning (B, D) after its SiLU -> (N / 4, 4, D)."""
        # Looked up once for the four children of a parent, the modulation takes a quarter of the memory.
        modulation = self.adaln(conditioning).index_select(0, layout.images)[:, None]  # (N / 4, 1, 6 * D)
        return self.modulated(hidden_states, modulation, layout)


class RefineNet(nn.Module):
    """Corrects the rough noise of finer regions (Eq. 8), with half the patch size of the level before.

    Input of a token: its share of the coarser token's up-projection, and an embedding of its patch of [z_t; noise].
    Output: a residual on the noise, zero at the start. `patch_size` is the side of a token's patch in cells, `side`
    that of an attention window in tokens.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        dim: int,
        num_layers: int,
        heads: int,
        mlp_ratio: float,
        side: int,
        frequency_shift: float,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.residual_dtype = torch.float32  # under autocast
        self.patch_size = patch_size
        self.time_embed = TimestepEmbedder(dim, frequency_shift)
        self.up_proj = nn.Linear(dim, 4 * dim)
        self.patch_embed = nn.Linear((in_channels + out_channels) * patch_size**2, dim)
        self.transformer_blocks = nn.ModuleList([RefineBlock(dim, heads, mlp_ratio, side) for _ in range(num_layers)])
        self.norm_out = FinalLayer(dim, out_channels * patch_size**2)

    def forward(
        self,
        parents: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timestep: torch.Tensor,
        label_embedding: torch.Tensor | float,
        layout: RefineLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual on the noise and the refined tokens.

        Args:
            parents: tokens of the level before, (M, D).
            latents: z_t, (B, C, h * R, w * R).
            noise: prediction so far, (B, O, h * R, w * R).
            timestep: (B,).
            label_embedding: (B, D), shared with the Multi-grained Net, or 0.
            layout: packed tokens of this level.

        Returns:
            residual (B, O, h * R, w * R), zero outside the regions of this level, and tokens (N, D).
        """
        if layout.tokens.shape[0] == 0 and not torch.is_grad_enabled():  # gradients of an empty map are not missing
            return torch.zeros_like(noise), parents[:0]
        conditioning = F.silu(self.time_embed(timestep, latents.dtype) + label_embedding)  # (B, D)
        patches = patchify(torch.cat([latents, noise], dim=1), self.patch_size).flatten(0, 1)
        if layout.rounded:
            patches = F.pad(patches, (0, 0, 0, 1))  # of the tokens that stand nowhere
        tokens = self.up_proj(parents.index_select(0, layout.parents)).unflatten(-1, (4, -1))  # (N / 4, 4, D)
        tokens = tokens + self.patch_embed(patches.index_select(0, layout.tokens)).view_as(tokens)
        tokens = residual_stream(tokens, self.residual_dtype)
        if layout.rounded:
            of_any_size(tokens, 0)

        for block in self.transformer_blocks:
            tokens = run_block(self, block, tokens, conditioning, layout)  # (N / 4, 4, D)

        correction = self.norm_out(tokens, conditioning, layout.images).flatten(0, 1)  # (N, O * patch ** 2)
        batch, _, height, width = noise.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        residual = correction.new_zeros(batch * rows * columns + 1, correction.shape[-1])  # the last stands nowhere
        residual = residual.index_copy(0, layout.tokens, correction)[:-1]  # (B * rows * columns, O * patch ** 2)
        return unpatchify(residual.view(batch, rows * columns, -1), rows, self.patch_size), tokens.flatten(0, 1)


def patchify(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, C, y * p, x * p) -> (B, y * x, C * p * p), a patch's values in the order of a convolution's weight."""
    cells = image.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, y, p, x, p)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: torch.Tensor, rows: int, patch_size: int) -> torch.Tensor:
    """(B, y * x, p * p * C) -> (B, C, y * p, x * p), a patch's values in the order of DiT's output layer."""
    cells = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (rows, -1))  # (B, y, x, p, p, C)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
