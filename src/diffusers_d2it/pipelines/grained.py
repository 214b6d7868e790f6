# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What generation and editing with D2iT share: components and grain maps (Fig. 2, Stage 2, of arXiv:2504.09454).

Shapes:
    B images, C latent channels, H W image sides in pixels, f finest downsample factor, S region side in pixels
    h = H / S, w = W / S sides of the grain map, k grains, R = S / f cells along a side of a region
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers

from ..data.images import ImageInput
from ..limits import plain
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_d2it_grain import D2iTGrainModel
from ..visualization import visualize_grain_map
from .batches import Batch
from .checks import check_grain_components, check_maps, size_of_call
from .class_conditional import ClassConditionalPipeline
from .grain_maps import DRAWN, NAMES, as_regions, grain_map_from_image, read_maps
from .grain_sampling import random_grain_map, sample_grain_map
from .sampling_steps import TiedScheduler


class GrainedPipeline(ClassConditionalPipeline):
    r"""The family of D2iT: its members have the same components, and `from_pipe` makes one of another.

    Args:
        vae: encoder and decoder of latents; its thresholds also make maps from images. None if latents are all that is
            wanted.
        grain_model: draws grain maps; None if maps are always given.
        transformer: the content model; None if latents are only decoded.
        scheduler: any of `KarrasDiffusionSchedulers`, or of flow matching for a model trained with it.
        grain_scheduler: scheduler of the grain model, with prediction_type "sample".
        id2label: names of the classes by id, several names separated by commas. Only these ids can be asked for; None
            allows every id of the model.

    Raises:
        ValueError: the components do not fit one another.
    """

    vae: DynamicAutoencoderKL
    grain_model: D2iTGrainModel
    transformer: D2iTContentModel
    scheduler: SchedulerMixin
    grain_scheduler: SchedulerMixin

    model_cpu_offload_seq = "grain_model->transformer->vae"
    _models = {"vae": (DynamicAutoencoderKL,), "grain_model": (D2iTGrainModel,), "transformer": (D2iTContentModel,)}
    _schedulers = ("scheduler", "grain_scheduler")
    _optional_components = ["vae", "grain_model", "transformer", "grain_scheduler"]
    _limits = ClassConditionalPipeline._limits | {
        "fine_ratio": (0, 1),
        "grain_num_inference_steps": (1, 1_000_000),
        "grain_guidance_scale": (-1e6, 1e6),
    }
    _map_names = NAMES

    def __init__(
        self,
        vae: DynamicAutoencoderKL | None,
        grain_model: D2iTGrainModel | None,
        transformer: D2iTContentModel | None,
        scheduler: KarrasDiffusionSchedulers,
        grain_scheduler: KarrasDiffusionSchedulers | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            grain_model=grain_model,
            transformer=transformer,
            scheduler=scheduler,
            grain_scheduler=grain_scheduler,
        )
        self._prepare(id2label)
        check_grain_components(vae, grain_model, transformer, grain_scheduler)

    # -----------------------------------------------------------------------------------------------------------------
    # Sizes and grain maps
    # -----------------------------------------------------------------------------------------------------------------

    def grain_map_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Sides (h, w) of the map of an image of these sides in pixels; default: the size of training.

        Raises:
            ValueError: they are no multiples of a region.
        """
        if self.vae is None:
            raise ValueError("`vae` is None: without it there are no sides in pixels.")
        side = self.vae.config.sample_size if self.transformer is None else self.trained_side
        region = self.vae.region_size
        sides = [side if one is None else plain(one) for one in (height, width)]
        if any(not isinstance(one, int) or one < region or one % region for one in sides):
            raise ValueError(
                f"`height` and `width` must be multiples of the region size {region}, got {sides[0]} and {sides[1]}."
            )
        return sides[0] // region, sides[1] // region

    def image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the image of a map of these sides."""
        return size[0] * self.vae.region_size, size[1] * self.vae.region_size

    @torch.no_grad()
    def grain_map_from_image(
        self,
        image: ImageInput,
        fine_ratio: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """The grain maps of images, by their entropy: what Dynamic Grained Coding does in the first stage.

        Args:
            image: an image, or a list of images: a path, a PIL image, an array ([B,] H, W, 3) or tensor
                ([B,] 3, H, W), in [0, 1] or of 8 or 16 bits. It is read as in training: upright, transparency on
                white, ..., and its centre is fitted to the size asked for.
            fine_ratio: share of fine regions over the calibration set; None for the autoencoder's default.
            height, width: sides of the image in pixels, multiples of S; default: the size of training.

        Returns:
            (B, h, w) int64.

        Raises:
            ValueError: there is no such image, it is less than half as large, values lie outside [0, 1], sides are no
                multiples of S, the ratio lies outside [0, 1] or the autoencoder has not been calibrated.
        """
        size = self.image_size(self.grain_map_size(height, width))
        return grain_map_from_image(self.vae, image, size, plain(fine_ratio), self._execution_device)

    visualize_grain_map = staticmethod(visualize_grain_map)

    def prepare_grain_map(
        self,
        batch: Batch,
        class_ids: torch.Tensor | None,
        size: tuple[int, int],
        call: Mapping[str, Any],
    ) -> torch.Tensor:
        """The maps of a batch, (B, h, w) on the execution device: given, by chance, or drawn, around what is held.

        Args:
            batch: its maps, their shares of fine regions, and what they are drawn from.
            class_ids: (B,), or None for an unconditional model.
            size: (h, w).
            call: arguments of `__call__`, of which those for the grain model's steps and guidance are read.
        """
        maps, fine_ratios, generator = batch.each["grain_map"], batch.each["fine_ratio"], batch.map_generator
        device, num_grains = self._execution_device, self.transformer.config.num_grains
        random = [isinstance(one, str) and one == "random" for one in maps]
        if any(random):
            default = None if self.vae is None else self.vae.grain_ratios[-1]
            ratios = [default if one is None else one for one in fine_ratios]
            if any(ratio is None and is_random for ratio, is_random in zip(ratios, random)):
                raise ValueError("`fine_ratio` is required for a random map: without a `vae` there is no default.")
            ratios = [ratio if is_random else 0.0 for ratio, is_random in zip(ratios, random)]
            drawn = random_grain_map((len(maps), *size), num_grains, ratios, generator, device)
            if all(random):
                return drawn
            maps = [row if is_random else one for row, one, is_random in zip(drawn, maps, random)]
        given = torch.stack([as_regions(one, size, num_grains).cpu() for one in maps])
        is_drawn = (given == DRAWN).flatten(1)
        grain_map = given.to(device)
        # By themselves, those that are drawn around what is held: a map does not depend on the others of its batch
        for some in (is_drawn.all(dim=1), is_drawn.any(dim=1) & ~is_drawn.all(dim=1)):
            rows = some.nonzero()[:, 0].tolist()
            if rows:
                grain_map[rows] = sample_grain_map(
                    self.grain_model,
                    self.grain_scheduler,
                    size,
                    class_ids if class_ids is None else class_ids[rows],
                    len(rows),
                    call["grain_num_inference_steps"],
                    call["grain_guidance_scale"],
                    [fine_ratios[row] for row in rows],
                    [generator[row] for row in rows] if isinstance(generator, list) else generator,
                    device,
                    held=None if is_drawn[rows].all() else given[rows],
                )
        return grain_map

    # -----------------------------------------------------------------------------------------------------------------
    # The parts of a call
    # -----------------------------------------------------------------------------------------------------------------

    def _each(self, call: dict[str, Any], ids: list[int] | None) -> dict[str, list]:
        ratios = call["fine_ratio"] if isinstance(call["fine_ratio"], list) else [call["fine_ratio"]]
        maps = read_maps(call["grain_map"], self.transformer.config.num_grains, self._map_names)
        return {"grain_map": maps, "fine_ratio": ratios}

    def _size(self, call: dict[str, Any], batch: Batch) -> tuple[int, int]:
        check_maps(batch, call["fine_ratio"], self.grain_model is not None)
        return self.map_size(call, batch.each["grain_map"])

    def map_size(self, call: dict[str, Any], maps: list) -> tuple[int, int]:
        """(h, w) of the maps of a call: of those in regions, or as `size_of_call`."""
        sizes = sorted({tuple(one.shape) for one in maps if isinstance(one, torch.Tensor)})
        if len(sizes) > 1:
            raise ValueError(f"`grain_map` must be of one size, got maps of {sizes} regions.")
        return size_of_call(call, self.transformer, self.vae, *sizes)

    def denoise(self, latents: torch.Tensor, steps: TiedScheduler, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of every pipeline, and every code of the result is one value."""
        latents = super().denoise(latents, steps, *args, **kwargs)
        steps.layout.check_tied(latents)
        return latents

    def _guided(self, conditions: dict[str, Any], null_conditions: dict[str, torch.Tensor]) -> dict[str, Any]:
        layout = self.transformer.prepare_grain_map(torch.cat([conditions["grain_map"].grain_map] * 2))
        return super()._guided(conditions, null_conditions) | {"grain_map": layout}
