# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Dynamic Grained Coding (sec. 3.1, arXiv:2504.09454): from entropy to the map of grains, and latents that have it.

Grains are numbered here, once for the package: 0 is the coarsest, ``k - 1`` the finest, the order of the latents'
resolution. (The paper sorts its factors from fine to coarse, ``f_1 < f_2``, and numbers its
maps from coarse to fine, ``1 < 2``; one order is enough.)

Shapes:
    B batch, C latent channels, k number of grains, h w height and width of the grain map in regions
    R cells per region side at the finest grain: R = 2 ** (k - 1); latents are (B, C, h * R, w * R)
"""

from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map_only

from .limits import can_be_read


# ---------------------------------------------------------------------------------------------------------------------
# From entropy to the grain map
# ---------------------------------------------------------------------------------------------------------------------


def grain_map_from_entropy(entropy: torch.Tensor, thresholds: list[float]) -> torch.Tensor:
    """The grain of every region: a region is finer than grain i when its entropy exceeds threshold T_i (sec. 3.1).

    Args:
        entropy: (B, h, w), nats.
        thresholds: T_0 <= ... <= T_{k-2}, nats, from a data set and never from the batch.

    Returns:
        Grain map (B, h, w), int64, 0 = coarsest.
    """
    return sum((entropy > threshold).long() for threshold in thresholds)


def check_grain_map(grain_map: torch.Tensor, num_grains: int | None, name: str = "grain_map") -> None:
    """Raise a ValueError that names the argument unless it is int64 (B, h, w) with values 0 ... num_grains - 1.

    Values are checked where they `can_be_read`, and the number of grains is known.
    """
    if not isinstance(grain_map, torch.Tensor):
        raise ValueError(f"`{name}` must be a torch.Tensor, got {type(grain_map).__name__}.")
    if grain_map.dtype != torch.int64:
        raise ValueError(f"`{name}` must be int64, got {grain_map.dtype}.")
    if grain_map.ndim != 3 or 0 in grain_map.shape:
        raise ValueError(f"`{name}` must have shape (B, h, w), got {tuple(grain_map.shape)}.")
    if num_grains is not None and can_be_read(grain_map):
        low, high = torch.aminmax(grain_map)
        if low < 0 or high >= num_grains:
            raise ValueError(
                f"`{name}` must hold grains 0 (coarsest) to {num_grains - 1} (finest), got values from {low.item()} to"
                f" {high.item()}."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Latents with grains: every region holds 4 ** grain codes, each copied over its cells ("neighbor copying", sec. 3.1)
# ---------------------------------------------------------------------------------------------------------------------


def grain_map_to_cells(grain_map: torch.Tensor, cells: int) -> torch.Tensor:
    """Copy the grain of every region to its cells: (B, h, w) -> (B, h * cells, w * cells)."""
    return grain_map.repeat_interleave(cells, dim=1).repeat_interleave(cells, dim=2)


def code_weights(grain_map: torch.Tensor, num_grains: int) -> torch.Tensor:
    """Share of a code that one cell of each region holds: 1 / 4 ** (k - 1 - grain), the alpha of Eq. 11.

    Args:
        grain_map: (B, h, w) or its cells (B, hR, wR).

    Returns:
        float32 weights of the same shape; over the cells of one code they sum to one.
    """
    return 0.25 ** (num_grains - 1 - grain_map).float()


def fine_share(grain_map: torch.Tensor, num_grains: int) -> torch.Tensor:
    """Share of regions in the finest grain, per image: (B, h, w) -> (B,), float32 in [0, 1]."""
    return (grain_map == num_grains - 1).float().mean(dim=(-2, -1))


# ---------------------------------------------------------------------------------------------------------------------
# The map as one object
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GrainLayout:
    """A grain map with all that follows from it, worked out once a call or once a batch.

    layout = model.prepare_grain_map(grain_map)         # with the packed tokens of the model's RefineNets
    noise = layout.tie(torch.randn(shape))              # one value for each code
    noise = model(noised, timestep, layout).sample
    layout.num_tokens["refine"]                         # of each image
    """

    grain_map: torch.Tensor  # (B, h, w) int64, 0 = coarsest
    num_grains: int  # k
    # Where the codes of grain 0 ... k-2 are, each (B, 1, h * 2^grain, 1, w * 2^grain, 1) bool: it broadcasts to
    # latents whose sides are split into codes and the cells of a code
    masks: tuple[torch.Tensor, ...]
    levels: tuple = ()  # packed tokens of level 1 ... k-1 (`models.refine_net`); none without a model
    window_size: int | None = None  # side of the attention windows in tokens for which they were packed

    @classmethod
    def from_grain_map(cls, grain_map: torch.Tensor, num_grains: int) -> "GrainLayout":
        """The layout of a map alone; that of a content model is `D2iTContentModel.prepare_grain_map`.

        Raises:
            ValueError: what `check_grain_map` raises.
        """
        check_grain_map(grain_map, num_grains)
        chosen = (grain_map_to_cells(grain_map == grain, 1 << grain) for grain in range(num_grains - 1))
        return cls(grain_map, num_grains, tuple(mask[:, None, :, None, :, None] for mask in chosen))

    @property
    def cells(self) -> int:
        """R, cells along a side of a region."""
        return 1 << (self.num_grains - 1)

    @property
    def num_tokens(self) -> dict[str, torch.Tensor]:
        """Tokens of each image by stage, (B,) int64: one a region in the backbone, 4^l a region in RefineNet l."""
        regions = self.grain_map.flatten(1)
        refined = sum((regions >= level).sum(dim=1) * 4**level for level in range(1, self.num_grains))
        return {"backbone": torch.full_like(refined, regions.shape[1]), "refine": refined}

    @property
    def grain_of_cell(self) -> torch.Tensor:
        """Grain of every cell, (B, h * R, w * R) int64."""
        return grain_map_to_cells(self.grain_map, self.cells)

    def check_sides(self, latents: torch.Tensor) -> None:
        """Raise a ValueError unless latents (B, ., h * R, w * R) have the batch size and sides of the map."""
        batch, height, width = self.grain_map.shape
        sides = (height * self.cells, width * self.cells)
        if latents.ndim != 4 or latents.shape[0] != batch or latents.shape[2:] != sides:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} do not match a `grain_map` of {batch} x {height}x{width}"
                f" regions: a region has {self.cells}x{self.cells} cells."
            )

    def merge(self, codes: list[torch.Tensor]) -> torch.Tensor:
        """Take each region from the codes of its grain, coarser codes copied to the finest grid.

        Args:
            codes: one tensor per grain, coarsest first: (B, C, h, w), (B, C, 2h, 2w), ... (B, C, h * R, w * R).

        Returns:
            Latents (B, C, h * R, w * R).
        """
        latents = codes[-1]
        self.check_sides(latents)
        for grain, mask in enumerate(self.masks):
            copied = codes[grain][:, :, :, None, :, None]
            latents = torch.where(mask, copied, self._codes(latents, grain)).reshape(latents.shape)
        return latents.contiguous()  # convolutions may give codes with their channels last

    def split(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """The codes of each grain, coarsest first, the inverse of `merge`: `merge(split(z)) == z` for tied z.

        A code is read at its top-left cell. Entries of regions that have another grain hold that region's cell and are
        ignored by `merge`.
        """
        self.check_sides(latents)
        return [latents[..., :: self.cells >> grain, :: self.cells >> grain] for grain in range(self.num_grains)]

    def tie(self, latents: torch.Tensor) -> torch.Tensor:
        """Give every code one value: each cell takes the value of the top-left cell of its code.

        Schedulers step element by element and draw independent noise, so one cell of a coarse code follows exactly
        the process that the whole code should follow. A mean over the cells would shrink the variance of the noise to
        a quarter, and untied cells drift apart without bound, as no network ever predicts their difference.

        Args:
            latents: (B, C, h * R, w * R), latents or noise.
        """
        self.check_sides(latents)
        for grain, mask in enumerate(self.masks):
            codes = self._codes(latents, grain)
            latents = torch.where(mask, codes[:, :, :, :1, :, :1], codes).reshape(latents.shape)
        return latents

    def average(self, latents: torch.Tensor, grain: int) -> torch.Tensor:
        """Give the cells of every code of one grain their mean; other regions stay as they are.

        For predictions, where the mean is the best single value of a code; samples and noise are tied by `tie`.
        """
        self.check_sides(latents)
        if grain == self.num_grains - 1:
            return latents
        codes = self._codes(latents, grain)
        return torch.where(self.masks[grain], codes.mean(dim=(3, 5), keepdim=True), codes).reshape(latents.shape)

    def check_tied(self, latents: torch.Tensor) -> None:
        """Raise a ValueError unless every coarse code of `latents` has one value over its cells."""
        tied = self.tie(latents)
        if torch.equal(latents, tied):
            return
        # Compared as numbers-or-NaN: a NaN is another fault and is reported elsewhere.
        if not torch.equal(torch.nan_to_num(latents), torch.nan_to_num(tied)):
            raise ValueError(
                "latents differ inside a coarse region. Multi-grained diffusion keeps one value for each code: pass"
                " noise through `diffusers_d2it.tie(noise, grain_map)`, and the sample again after every step."
            )

    def to(self, device: torch.device | str | None = None, non_blocking: bool = False) -> "GrainLayout":
        """The layout on another device, None for where it is."""
        if device is None:
            return self
        return tree_map_only(torch.Tensor, lambda part: part.to(device, non_blocking=non_blocking), self)

    def _codes(self, latents: torch.Tensor, grain: int) -> torch.Tensor:
        """Latents as (B, C, h * 2^grain, side, w * 2^grain, side), `side` cells along a side of a code."""
        side = self.cells >> grain
        return latents.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))


def tie(latents: torch.Tensor, grain_map: torch.Tensor) -> torch.Tensor:
    """`GrainLayout.tie` for a single use: (B, C, h * R, w * R) and (B, h, w), R a power of two.

    Raises:
        ValueError: latents and map do not match, or the map holds no grains of theirs.
    """
    check_grain_map(grain_map, None)  # its sides tell how many grains there are
    cells = max(latents.shape[-1] // grain_map.shape[-1], 1)  # along a side of a region
    return GrainLayout.from_grain_map(grain_map, cells.bit_length()).tie(latents)


# A tree of tensors to whatever walks arguments: torch.export, hooks, DataParallel
torch.export.register_dataclass(GrainLayout)
