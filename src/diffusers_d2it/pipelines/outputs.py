# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What pipelines return: images, and where the model spent its work on them.

Shapes:
    B images, C latent channels, H W image sides in pixels, f pixels along a side of a cell, N steps
    h w sides of a grain map in regions
"""

from dataclasses import InitVar, dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput, make_image_grid

from ..grains import fine_share
from ..words import counted


@dataclass
class ImagesOutput(BaseOutput):
    """Images as a call was asked for them: `output_type` decides their kind."""

    # B PIL images, array (B, H, W, 3) or tensor (B, 3, H, W) in [0, 1], or latents (B, C, H / f, W / f)
    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor

    def _spent(self) -> str:
        """On what the model spent its work, in a few words."""

    def __repr__(self) -> str:
        """One line: "3 images 128x128, fine share 0.48"."""
        first = self.images[0]
        if isinstance(first, PIL.Image.Image):
            size = f"{first.width}x{first.height}"
        else:
            size = "x".join(map(str, first.shape))
        return f"{counted(len(self.images), 'image')} {size}, {self._spent()}"

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: the images beside one another, None if they are not pictures."""
        if not isinstance(self.images[0], PIL.Image.Image):
            return None
        return make_image_grid(self.images, rows=1, cols=len(self.images))._repr_png_()


@dataclass(repr=False)
class D2iTPipelineOutput(ImagesOutput):
    """Output of the pipelines of D2iT."""

    grain_maps: torch.Tensor  # the grain of every region, (B, h, w) int64, 0 = coarsest
    num_grains: InitVar[int | None] = None  # of the model; None for those of the maps. No item, as it is no tensor

    def __post_init__(self, num_grains: int | None) -> None:
        super().__post_init__()
        self.num_grains = num_grains

    def _spent(self) -> str:
        num_grains = self.num_grains or int(self.grain_maps.max()) + 1
        return f"fine share {fine_share(self.grain_maps, num_grains).mean():.2f}"


@dataclass(repr=False)
class DCDiTPipelineOutput(ImagesOutput):
    """Output of `DCDiTPipeline`. Tokens are those of the passes with a label."""

    # Which cells were tokens, bool: in the last step (B, H / f, W / f), or in all of them (B, N, H / f, W / f)
    boundary_maps: torch.Tensor
    token_counts: torch.Tensor  # how many, (B, N) int64

    def _spent(self) -> str:
        cells = self.boundary_maps[0].numel() // (self.boundary_maps.shape[1] if self.boundary_maps.ndim == 4 else 1)
        return f"tokens kept {self.token_counts.float().mean() / cells:.2f}"
