# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What starts from a picture: reading it, its own map, its latents, and where among the steps an edit begins.

Shapes as in `grained`; a picture is (3, H, W) in [-1, 1].
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import logging

from ..data.images import ImageInput
from ..grains import grain_map_from_entropy
from .batches import Batch
from .grain_maps import DRAWN
from .grained import GrainedPipeline
from .pictures import fit_image, read_images
from .sampling_steps import TiedScheduler


logger = logging.get_logger(__name__)


class EditingPipeline(GrainedPipeline):
    """A pipeline of D2iT whose first arguments are labels and an image."""

    _limits = GrainedPipeline._limits | {"strength": (0, 1), "padding_mask_crop": (0, 16_384)}
    _map_names = (*GrainedPipeline._map_names, "image", "draw")

    def begin_edit(
        self, call: dict[str, Any]
    ) -> tuple[Batch, torch.Tensor | None, tuple[int, int], list[torch.Tensor]]:
        """As `begin`, with the pictures as they were given, each (3, H, W) in [-1, 1]."""
        pictures = self.read_pictures(call["image"])
        batch, ids, size = self.begin({**call, "image": None}, len(pictures))
        if call["strength"] == 0:
            logger.warning("`strength` 0: nothing to do, this is the reconstruction.")
        sides = self.image_size(size)
        for picture in pictures:
            height, width = picture.shape[1:]
            if height * sides[1] != width * sides[0]:
                logger.warning("`image` of %dx%d: its centre is cut to %dx%d.", width, height, sides[1], sides[0])
        return batch, ids, size, pictures

    def read_pictures(self, image: ImageInput | None) -> list[torch.Tensor]:
        """The pictures that are to be edited, each (3, H, W) in [-1, 1].

        Raises:
            ValueError: there are none, or no autoencoder that could encode them.
        """
        if self.vae is None:
            raise ValueError("`vae` is None: this pipeline cannot encode an image.")
        if image is None:
            raise ValueError(f"`image` is required by {type(self).__name__}, got None.")
        return read_images(image)

    def fit_images(self, pictures: list[torch.Tensor], batch: Batch, size: tuple[int, int]) -> torch.Tensor:
        """The pictures of a batch at the size of maps (h, w): (B, 3, H, W) on the execution device."""
        fitted = torch.stack([fit_image(picture, self.image_size(size)) for picture in pictures])
        return fitted[batch.pictures].to(self._execution_device)

    def with_own_maps(self, batch: Batch, pixels: torch.Tensor, drawn: torch.Tensor) -> Batch:
        """A batch with "image" replaced by the map of each picture, "draw" by it where not all is `drawn`.

        A share of fine regions is then that of the picture's own map, where any of it is kept.

        Args:
            batch: of the call.
            pixels: (B, 3, H, W).
            drawn: (B, h, w) bool, regions that the grain model draws for "draw".
        """
        maps, fine_ratios = [], []
        for one, picture, ratio, is_drawn in zip(batch.each["grain_map"], pixels, batch.each["fine_ratio"], drawn):
            name = one if isinstance(one, str) else None
            if name == "image" or (name == "draw" and not is_drawn.all()):
                entropy = self.vae.region_entropy(picture[None])
                one, ratio = grain_map_from_entropy(entropy, self.vae.thresholds(ratio))[0], None
                one = one.masked_fill(is_drawn.to(one.device), DRAWN) if name == "draw" else one
            maps.append(None if name == "draw" and is_drawn.all() else one)
            fine_ratios.append(ratio)
        return replace(batch, each={"grain_map": maps, "fine_ratio": fine_ratios})

    def encode_images(self, pixels: torch.Tensor, grain_map: torch.Tensor) -> torch.Tensor:
        """Scaled latents of pictures under their maps, the means of the posterior: (B, C, h * R, w * R), tied."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype), grain_map).latent_dist
        return self.vae.scale_latents(posterior.mode()).float()


def start_of_edit(steps: TiedScheduler, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Clean latents as the sample at the first of the steps that are taken: noise alone where all of them are."""
    if steps.skipped == 0 and len(steps.timesteps):
        return steps.prior(noise)
    return steps.noised(latents, noise, 0)
