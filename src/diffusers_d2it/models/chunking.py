# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Dynamic chunking of DC-DiT (arXiv:2603.06351): which cells of a latent are kept as tokens, and the way back to all.

Shapes:
    B images, H W sides of the latent grid in cells, L = H * W, D width
    M cells kept of an image, T of all images together: one image after the other, in raster order
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..limits import can_be_read, check_values
from .layers import of_any_size


NATURAL = 0.5  # boundary probability above which a cell wants to be a token
_NEVER_0_NOR_1 = 1e-4  # distance that the probability keeps from both in smoothing
_NO_NEIGHBOUR = 1e-8  # added to sums of weights
_ROUNDING = 1e-3  # of a number of cells: in float32 five times (1 - 0.8) is less than one


@dataclass(frozen=True)
class Chunks:
    """The cells that are kept, and where they are: made once a forward pass, for every block.

    What compiled blocks read is tensors, whose T and N one graph takes as they come; N is M of the longest image.
    """

    kept: torch.Tensor  # (B, H, W) bool
    cells: torch.Tensor  # (T,) int64, their places among all B * L cells
    images: torch.Tensor  # (T,) int64, the image of each
    lengths: tuple[int, ...]  # M of each image
    starts: torch.Tensor  # (B + 1,) int32, where the tokens of each image begin, and T
    is_token: torch.Tensor  # (B, N) bool, which places of a batch are taken that is padded to the longest image
    slots: torch.Tensor  # (T,) int64, where among these B * N each token stands

    @classmethod
    @torch.compiler.disable  # a graph would be one of these lengths
    def of(cls, kept: torch.Tensor) -> "Chunks":
        """From which cells are kept, (B, H, W) bool. The numbers of an accelerator are read here, once."""
        number = kept.flatten(1).sum(dim=1)  # (B,)
        lengths = tuple(number.tolist())
        longest = max(2, *lengths)  # for compilers a dimension of 1 is another case
        cells = torch.nonzero_static(kept.flatten(), size=sum(lengths))[:, 0]
        images = cells // kept[0].numel()
        starts = F.pad(number.cumsum(0), (1, 0))
        is_token = torch.arange(longest, device=kept.device) < number[:, None]
        in_image = torch.arange(len(cells), device=kept.device) - starts.index_select(0, images)
        return cls(
            kept=kept,
            cells=of_any_size(cells, 0),
            images=of_any_size(images, 0),
            lengths=lengths,
            starts=starts.to(torch.int32),
            is_token=of_any_size(is_token, 1),
            slots=of_any_size(images * longest + in_image, 0),
        )

    def to(self, device: torch.device | str | None = None, non_blocking: bool = False) -> "Chunks":
        """The same on another device, None for where it is: accelerate asks for it where several share the blocks."""
        if device is None:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: one.to(device, non_blocking=non_blocking) for name, one in tensors.items()})


@torch.compiler.disable  # and one of this budget
def keep_likeliest(probability: torch.Tensor, budget: float | torch.Tensor = 1.0) -> torch.Tensor:
    """The natural cells without the least probable of them, as many as the budget takes away.

    Of n natural cells the floor(n * (1 - budget)) least probable fall, equally probable ones in raster order, and one
    stays at least. So a smaller budget keeps a part of what a larger one keeps.

    Args:
        probability: (B, H, W) in [0, 1], of the router.
        budget: share of the natural cells in (0, 1], of all images or (B,) of each.

    Returns:
        Which cells are kept, (B, H, W) bool.

    Raises:
        ValueError: a budget is out of its range, or there is not one for each image.
    """
    budgets = _budgets(budget, probability)
    natural = (probability > NATURAL).flatten(1)  # (B, L)
    number = natural.sum(dim=1)  # (B,)
    falling = (number * (1 - budgets) + _ROUNDING).floor().minimum(number - 1)
    from_least = probability.flatten(1).masked_fill(~natural, torch.inf).argsort(dim=1, stable=True)
    rank = from_least.argsort(dim=1)  # of each cell
    return (natural & (rank >= falling[:, None])).view_as(probability)


def _budgets(budget: float | torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """A budget as (B,) or (), float32."""
    if not isinstance(budget, torch.Tensor):
        check_values({"budget": budget}, {"budget": float}, {"budget": (0, 1)}, exact=False)
        if budget == 0:
            raise ValueError("`budget` must be larger than 0: every image keeps a token.")
        return torch.full((), float(budget), device=probability.device)  # no copy that a device is waited for
    if budget.shape not in ((), (len(probability),)):
        raise ValueError(
            f"`budget` must be a number or one for each image, ({len(probability)},), got {tuple(budget.shape)}."
        )
    if can_be_read(budget) and not ((0 < budget) & (budget <= 1)).all():
        raise ValueError(f"`budget` must lie in (0, 1], got {budget.min().item():g} to {budget.max().item():g}.")
    return budget.to(probability.device, torch.float32)


def nearest_kept(kept: torch.Tensor) -> torch.Tensor:
    """The nearest kept cell of every cell, by Euclid; of equally near ones the first in raster order.

    An exact distance transform: the nearest kept cell of its column is known for every cell from one pass down and
    one up, and the nearest of all is the nearest of those of the columns.

    Args:
        kept: (B, H, W) bool; every image keeps one cell at least.

    Returns:
        Raster index of that cell in its image, (B, H, W) int64.
    """
    height, width = kept.shape[1:]
    rows = torch.arange(height, device=kept.device)[:, None]  # (H, 1)
    columns = torch.arange(width, device=kept.device)
    far = 2 * (height + width)  # further than any cell
    above = torch.where(kept, rows, -far).cummax(dim=1).values  # (B, H, W): row of the last kept cell so far
    below = torch.where(kept, rows, height + far).flip(1).cummin(dim=1).values.flip(1)
    row = torch.where(rows - above <= below - rows, above, below)  # of equally near ones the upper
    squares = (rows - row).square()[:, :, None] + (columns[:, None] - columns).square()  # (B, H, W, W): to each column
    places = (row * width + columns)[:, :, None]  # (B, H, 1, W)
    key = squares * (height * width) + places.clamp(0, height * width - 1)  # the distance decides, then the place
    return key.min(dim=-1).values % (height * width)


def smooth(tokens: torch.Tensor, probability: torch.Tensor, chunks: Chunks, sigma: float) -> torch.Tensor:
    """Each kept token drawn to its kept neighbours, the more the less it is a boundary: Eq. 2 of the paper.

    The mean of the neighbours has the weights exp(-distance ** 2 / (2 sigma ** 2)) * probability. A Gaussian of two
    dimensions is one along the rows and then one along the columns, so the sums over all pairs are two products with
    small matrices, of tokens on the grid that are zero where none is kept.

    Args:
        tokens: (T, D) float32.
        probability: (B, H, W) float32.
        chunks: which cells the tokens are of.
        sigma: in cells.

    Returns:
        (T, D).
    """
    batch, height, width = probability.shape
    weights = probability.flatten()[chunks.cells].clamp(_NEVER_0_NOR_1, 1 - _NEVER_0_NOR_1)[:, None]  # (T, 1)
    along_columns, along_rows = (_gaussian(side, sigma, tokens) for side in (height, width))

    def summed(values: torch.Tensor) -> torch.Tensor:
        """Of all tokens around each, (T, E) -> (T, E)."""
        grid = values.new_zeros(batch * height * width, values.shape[1]).index_copy(0, chunks.cells, values)
        grid = torch.matmul(along_columns, grid.view(batch, height, -1))  # (B, H, W * E)
        grid = torch.matmul(along_rows, grid.view(batch * height, width, -1))  # (B * H, W, E)
        return grid.flatten(0, 1).index_select(0, chunks.cells)

    neighbours = summed(weights * tokens) / (summed(weights) + _NO_NEIGHBOUR)
    return torch.lerp(neighbours, tokens, weights)


def dechunk(tokens: torch.Tensor, probability: torch.Tensor, chunks: Chunks, sigma: float) -> torch.Tensor:
    """From the kept tokens to all cells: they are smoothed, and every cell takes its nearest one.

    Args:
        tokens: (T, D) float32.
        probability, chunks, sigma: as of `smooth`.

    Returns:
        (B, H, W, D).
    """
    smoothed = smooth(tokens, probability, chunks, sigma)
    starts = torch.arange(len(chunks.kept), device=tokens.device) * chunks.kept[0].numel()
    place = chunks.kept.flatten().cumsum(0) - 1  # among the tokens, of each kept cell
    return smoothed[place[nearest_kept(chunks.kept) + starts[:, None, None]]]


def confidence(probability: torch.Tensor) -> torch.Tensor:
    """How sure the router was of each cell, as a factor that is 1 and has the gradient of that: (B, H, W)."""
    sure = torch.where(probability > NATURAL, probability, 1 - probability)
    return 1 + (sure - sure.detach())


def _gaussian(side: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    """(side, side) exp(-(i - j) ** 2 / (2 sigma ** 2))."""
    places = torch.arange(side, device=like.device, dtype=like.dtype)
    return ((places[:, None] - places).square() / (-2 * sigma**2)).exp()
