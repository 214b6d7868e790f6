# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What generation and editing with D2iT share: components, maps, and the loop that denoises (Fig. 2, Stage 2).

Shapes:
    B images, C latent channels, H W image sides in pixels, f finest downsample factor, S region side in pixels
    h = H / S, w = W / S sides of the grain map, k grains, R = S / f cells along a side of a region
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, make_image_grid
from diffusers.utils.torch_utils import randn_tensor

from ..data.images import ImageInput
from ..grains import GrainLayout
from ..limits import plain
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_d2it_grain import D2iTGrainModel
from ..visualization import visualize_grain_map
from ..words import counted
from .base import Pipeline
from .batches import Batch, make_batch
from .checks import (
    SAMPLING_LIMITS,
    changed_by,
    check_components,
    check_inputs,
    map_size,
)
from .class_conditional import KEPT, ClassConditionalPipeline, class_ids
from .grain_maps import DRAWN, NAMES, as_regions, grain_map_from_image, read_maps
from .grain_sampling import random_grain_map, sample_grain_map
from .schedulers import check_scheduler, is_flow
from .tied_scheduler import TiedScheduler


@dataclass
class D2iTPipelineOutput(BaseOutput):
    """Output of the pipelines; `output_type` decides the kind of its images."""

    # B PIL images, array (B, H, W, 3) or tensor (B, 3, H, W) in [0, 1], or latents (B, C, H / f, W / f)
    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    grain_maps: torch.Tensor  # the grain of every region, (B, h, w) int64, 0 = coarsest

    def __repr__(self) -> str:
        """One line: "3 images 128x128, fine share 0.48", the share of regions finer than the coarsest."""
        share = (self.grain_maps > 0).float().mean()
        first = self.images[0]
        if isinstance(first, PIL.Image.Image):
            size = f"{first.width}x{first.height}"
        else:
            size = "x".join(map(str, first.shape))
        return f"{counted(len(self.images), 'image')} {size}, fine share {share:.2f}"

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: the images beside one another, None if they are not pictures."""
        if not isinstance(self.images[0], PIL.Image.Image):
            return None
        return make_image_grid(self.images, rows=1, cols=len(self.images))._repr_png_()


class DenoisingPipeline(ClassConditionalPipeline):
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
    _models = {"vae": DynamicAutoencoderKL, "grain_model": D2iTGrainModel, "transformer": D2iTContentModel}
    _schedulers = ("scheduler", "grain_scheduler")
    _optional_components = ["vae", "grain_model", "transformer", "grain_scheduler"]
    _limits = SAMPLING_LIMITS
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
        # JSON has strings for keys, so the dictionary is kept as it will be read back.
        if id2label is not None:
            id2label = {str(key): id2label[key] for key in sorted(id2label, key=int)}
        self.register_to_config(id2label=id2label)
        check_components(vae, grain_model, transformer, scheduler, grain_scheduler, self.id2label)
        self._of_flow = is_flow(scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @classmethod
    def from_pipe(cls: type[Pipeline], pipeline: DiffusionPipeline, **kwargs: Any) -> Pipeline:
        """As of diffusers; the models, which both pipelines then have, keep their dtypes where none is asked for."""
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = KEPT
        return super().from_pipe(pipeline, **kwargs)

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
        side = self.vae.config.sample_size if self.transformer is None else self._trained_side
        region = self.vae.region_size
        sides = [side if one is None else plain(one) for one in (height, width)]
        if any(not isinstance(one, int) or one < region or one % region for one in sides):
            raise ValueError(
                f"`height` and `width` must be multiples of the region size {region}, got {sides[0]} and {sides[1]}."
            )
        return sides[0] // region, sides[1] // region

    @property
    def _trained_side(self) -> int:
        return self.transformer.config.sample_size * self.vae.downsample_factor

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
        num_inference_steps: int,
        guidance_scale: float,
    ) -> torch.Tensor:
        """The maps of a batch, (B, h, w) on the execution device: given, by chance, or drawn, around what is held.

        Args:
            batch: its maps, their shares of fine regions, and what they are drawn from.
            class_ids: (B,), or None for an unconditional model.
            size: (h, w).
            num_inference_steps, guidance_scale: of the grain model.
        """
        maps, fine_ratios, generator = batch.maps, batch.fine_ratios, batch.map_generator
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
                    num_inference_steps,
                    guidance_scale,
                    [fine_ratios[row] for row in rows],
                    [generator[row] for row in rows] if isinstance(generator, list) else generator,
                    device,
                    held=None if is_drawn[rows].all() else given[rows],
                )
        return grain_map

    # -----------------------------------------------------------------------------------------------------------------
    # The parts of a call
    # -----------------------------------------------------------------------------------------------------------------

    def begin(self, call: dict[str, Any], num_pictures: int = 1) -> tuple[Batch, torch.Tensor | None, tuple[int, int]]:
        """Check the arguments of a call and what they are for, and forget the call before.

        Args:
            call: all arguments of `__call__` by name.
            num_pictures: that are edited.

        Returns:
            What each image is made of; their classes (B,) on the execution device, or None; (h, w).

        Raises:
            ValueError: an argument is out of range, unknown, or contradicts another or the model.
        """
        callback = call["callback_on_step_end"]
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            call = call | {"callback_on_step_end_tensor_inputs": callback.tensor_inputs}
        self.check_settings(call)
        if self.vae is None and call["output_type"] != "latent":
            raise ValueError(f"`output_type` must be 'latent' without a `vae`, got {call['output_type']!r}.")
        check_scheduler(self.scheduler, self.transformer, self._of_flow)
        config = self.transformer.config
        ids = class_ids(call["class_labels"], config.num_classes, self.id2label)
        maps = read_maps(call["grain_map"], config.num_grains, self._map_names)
        batch = make_batch(
            ids, call["num_images_per_prompt"], maps, call["fine_ratio"], call["generator"], num_pictures
        )
        check_inputs(batch, call["fine_ratio"], call["latents"], self.transformer, self.grain_model is not None)
        size = map_size(maps, call["latents"], call["height"], call["width"], self.vae, self.transformer)
        self._guidance_scale, self._interrupt, self._cached_pass = call["guidance_scale"], False, None
        self._attention_kwargs = call["attention_kwargs"]
        return batch, None if ids is None else torch.tensor(batch.ids, device=self._execution_device), size

    def prepare_latents(
        self,
        latents: torch.Tensor | None,
        batch_size: int,
        size: tuple[int, int],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Noise to start from, (B, C, h * R, w * R) on the execution device: given, or drawn."""
        sides = (side * self.transformer.patch_size for side in size)
        shape = (batch_size, self.transformer.config.in_channels, *sides)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        return latents.to(self._execution_device, torch.float32).expand(shape)

    def denoise(
        self,
        latents: torch.Tensor,
        steps: TiedScheduler,
        layout: GrainLayout,
        class_ids: torch.Tensor | None,
        guidance_interval: tuple[float, float],
        guidance_power: float | None,
        callback_on_step_end: Callable | None,
        tensor_inputs: list[str],
        put_back: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Latents (B, C, h * R, w * R) through all `steps`, tied after each.

        Args:
            latents: a sample at the first step.
            steps: of which some at the beginning may be left out, see `TiedScheduler.start_at`.
            layout: of the maps.
            class_ids: (B,), or None.
            guidance_interval, guidance_power, callback_on_step_end: as of a call.
            tensor_inputs: what the callback receives.
            put_back: called with the sample after step i and i; what it returns goes on.
        """
        total = steps.skipped + len(steps.timesteps)
        self._num_timesteps = len(steps.timesteps)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback_on_step_end.tensor_inputs
        passes = {False: (layout, class_ids)}
        if class_ids is not None and self._guidance_scale != 1.0:  # now, so that no step has to wait for it
            passes[True] = self._prepare_guided(layout, class_ids)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(steps.timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                scale = self._guidance_at((steps.skipped + i) / total, guidance_interval, guidance_power)
                model_input, timestep = steps.model_input(latents, t)
                prediction = self._predict(model_input, timestep, passes, scale)  # (B, O, h * R, w * R)
                latents = steps.step(prediction.to(latents.dtype), t, latents)
                if put_back is not None:
                    latents = put_back(latents, i)
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in tensor_inputs}
                    latents = layout.tie(changed_by(callback_on_step_end(self, i, t, tensors), latents))
                progress_bar.update()
        layout.check_tied(latents)
        return latents

    def output(self, images: Any, grain_map: torch.Tensor, return_dict: bool) -> D2iTPipelineOutput | tuple:
        """What a call returns; models that were loaded for it go back."""
        self.maybe_free_model_hooks()
        return D2iTPipelineOutput(images=images, grain_maps=grain_map) if return_dict else (images, grain_map)

    def _prepare_guided(self, layout: GrainLayout, class_ids: torch.Tensor) -> tuple[GrainLayout, torch.Tensor]:
        """Layout and labels of a batch twice: for the passes with a label and those without."""
        null_ids = torch.full_like(class_ids, self.transformer.config.num_classes)
        both = self.transformer.prepare_grain_map(torch.cat([layout.grain_map, layout.grain_map]))
        return both, torch.cat([class_ids, null_ids])  # of 2 * B

    def _predict(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        passes: dict[bool, tuple[GrainLayout, torch.Tensor | None]],
        scale: float,
    ) -> torch.Tensor:
        """One prediction, (B, O, h * R, w * R), guided where the scale is not 1: in one pass of twice the batch."""
        guided = scale != 1.0
        if guided != self._cached_pass:
            # What caches of diffusers hold is of the other pass, of a step long past, or of a failed call
            self.transformer._reset_stateful_cache()
            self._cached_pass = guided
        if guided not in passes:  # a callback has changed the scale
            passes[guided] = self._prepare_guided(*passes[False])
        layout, class_ids = passes[guided]
        if guided:
            model_input = torch.cat([model_input, model_input])  # (2 * B, C, h * R, w * R)
        with self.transformer.cache_context("guided" if guided else "cond"):
            model_input = model_input.to(self.transformer.dtype)
            kwargs = {"attention_kwargs": self._attention_kwargs}
            prediction = self.transformer(model_input, timestep, layout, class_ids, **kwargs).sample
        channels = self.transformer.config.in_channels
        if guided:
            prediction, null = prediction.chunk(2)
            noise, null_noise = prediction[:, :channels], null[:, :channels]
            noise = null_noise + scale * (noise - null_noise)
            prediction = torch.cat([noise, prediction[:, channels:]], dim=1)
        return prediction.clone()  # a CUDA graph writes its next output to the same place
