# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From a class label to an image and its grain map: the whole of Fig. 2 (Stage 2) of arXiv:2504.09454.

Shapes:
    B images, C latent channels, H W image sides in pixels, f finest downsample factor, S region side in pixels
    h = H / S, w = W / S sides of the grain map, k grains
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..grains import GrainLayout
from ..limits import plain
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_d2it_grain import D2iTGrainModel
from ..visualization import visualize_grain_map
from .calls import one_call
from .checks import (
    SAMPLING_LIMITS,
    MapName,
    as_grain_map,
    changed_by,
    check_components,
    check_inputs,
    check_scheduler,
    is_flow,
    map_size,
)
from .class_conditional import ClassConditionalPipeline
from .grain_maps import ImageInput, grain_map_of_image, random_grain_map, sample_grain_map
from .tied_scheduler import TiedScheduler


@dataclass
class D2iTPipelineOutput(BaseOutput):
    """Output of `D2iTPipeline`; `output_type` decides the kind of its images."""

    # B PIL images, array (B, H, W, 3) or tensor (B, 3, H, W) in [0, 1], or latents (B, C, H / f, W / f)
    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    grain_maps: torch.Tensor  # the grain of every region, (B, h, w) int64, 0 = coarsest


class D2iTPipeline(ClassConditionalPipeline):
    r"""Class-conditional (or unconditional) generation with D2iT.

        pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
        output = pipe(class_labels=["golden retriever"], generator=torch.manual_seed(0))
        output.images[0]
        visualize_grain_map(output.images[0], output.grain_maps[0])

    The grain model draws a grain map for the class, the content model denoises latents that have this grain, the
    Dynamic VAE decodes them. The map can also be given, or asked to have a share of fine regions.

    Args:
        vae: decoder of the latents; its thresholds also make maps from images. None if latents are all that is wanted.
        grain_model: draws grain maps; None if maps are always given.
        transformer: the content model; None if latents are only decoded.
        scheduler: any of `KarrasDiffusionSchedulers`, or of flow matching for a model trained with it.
        grain_scheduler: scheduler of the grain model, with prediction_type "sample".
        id2label: names of the classes by id, several names separated by commas. Only these ids can be asked for; None
            allows every id of the model.

    Raises:
        ValueError: the components do not fit one another.
    """

    model_cpu_offload_seq = "grain_model->transformer->vae"
    _models = {"vae": DynamicAutoencoderKL, "grain_model": D2iTGrainModel, "transformer": D2iTContentModel}
    _schedulers = ("scheduler", "grain_scheduler")
    _optional_components = ["vae", "grain_model", "transformer", "grain_scheduler"]
    _limits = SAMPLING_LIMITS

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

    # -----------------------------------------------------------------------------------------------------------------
    # Grain maps
    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def grain_map_from_image(
        self,
        image: ImageInput,
        fine_ratio: float | None = None,
    ) -> torch.Tensor:
        """The grain maps of images, by their entropy: what Dynamic Grained Coding does in the first stage.

        Args:
            image: an image, or a list of images of one size: a path, a PIL image, an array ([B,] H, W, 3) or tensor
                ([B,] 3, H, W), in [0, 1] or of 8 or 16 bits. It is read as in training: upright, transparency on
                white, ... Sides are multiples of S: nothing is resized.
            fine_ratio: share of fine regions over the calibration set; None for the autoencoder's default.

        Returns:
            (B, h, w) int64.

        Raises:
            ValueError: there is no such image, sides are not multiples of S, values lie outside [0, 1], the ratio
                lies outside [0, 1] or the autoencoder has not been calibrated.
        """
        return grain_map_of_image(self.vae, image, plain(fine_ratio), self._execution_device)

    visualize_grain_map = staticmethod(visualize_grain_map)

    def prepare_grain_map(
        self,
        grain_map: torch.Tensor | np.ndarray | MapName | None,
        fine_ratio: float | None,
        class_ids: torch.Tensor | None,
        batch_size: int,
        size: tuple[int, int],
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The maps of a batch, (B, h, w) on the execution device: given, constant, random, or drawn."""
        device, shape, num_grains = self._execution_device, (batch_size, *size), self.transformer.config.num_grains
        if grain_map is None:
            return sample_grain_map(
                self.grain_model,
                self.grain_scheduler,
                size,
                class_ids,
                batch_size,
                num_inference_steps,
                guidance_scale,
                fine_ratio,
                generator,
                device,
            )
        if not isinstance(grain_map, str):
            return torch.as_tensor(grain_map, device=device).expand(shape)
        if grain_map == "random":
            if self.vae is None and fine_ratio is None:
                raise ValueError("`fine_ratio` is required for a random map: without a `vae` there is no default.")
            ratio = self.vae.grain_ratios[-1] if fine_ratio is None else fine_ratio
            return random_grain_map(shape, num_grains, ratio, generator, device)
        return torch.full(shape, 0 if grain_map == "coarse" else num_grains - 1, device=device)

    # -----------------------------------------------------------------------------------------------------------------
    # The call
    # -----------------------------------------------------------------------------------------------------------------

    def prepare_latents(
        self,
        latents: torch.Tensor | None,
        batch_size: int,
        size: tuple[int, int],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Noise to start from, (B, C, h * R, w * R) on the execution device: given, or drawn."""
        if latents is None:
            sides = (side * self.transformer.patch_size for side in size)
            shape = (batch_size, self.transformer.config.in_channels, *sides)
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        return latents.to(self._execution_device, torch.float32)

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

    @one_call
    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | np.ndarray | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.3, 1.0),
        grain_map: torch.Tensor | np.ndarray | list | MapName | None = None,
        fine_ratio: float | None = None,
        grain_num_inference_steps: int = 10,
        grain_guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["D2iTPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[Literal["latents"]] = ["latents"],
        height: int | None = None,
        width: int | None = None,
        guidance_power: float | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float | None = None,
        attention_kwargs: dict | None = None,
    ) -> D2iTPipelineOutput | tuple:
        """Generate images and their grain maps.

        Args:
            class_labels: an id, a name, or a list of either, one image each; None for an unconditional model.
            num_images_per_prompt: images for each label.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance w, eps = eps_null + w (eps_class - eps_null); 1 is without, and an
                unconditional model has none.
            guidance_interval: first and last share of the steps that are guided, 0 = first step (noise), 1 = last.
                Steps outside take one pass instead of two. Guided from the first step on, codes spread wider than the
                data's (measured, like the other defaults, on the bundled checkpoints).
            grain_map: the map, whole numbers (h, w), (1, h, w) or (B, h, w), 0 = coarsest, or a mask of bool, True =
                finest; or "coarse", "fine", "random". None lets the grain model draw it. Its size, a cell a region,
                decides the size of the image; one that is not that of training is told in the log.
            fine_ratio: share of regions in the finest grain, in [0, 1], met in every image to the nearest region: the
                grain model is asked for it and its map trimmed. For "random" it is the probability of a fine region.
            grain_num_inference_steps: steps of the grain model. With 10 of them 98.8 % of the regions of the bundled
                checkpoint's maps are what they are with 100, with 20 of them 99.4 % (200 maps, the same noise).
            grain_guidance_scale: classifier-free guidance of the grain model, on its logits.
            generator: a torch generator, or one for each image, which then does not depend on the rest of the batch.
            latents: noise to start from, (B, C, H / f, W / f), standard normal. It is tied to the map.
            output_type: "pil", "np", "pt" or "latent" (scaled latents).
            return_dict: False returns the tuple (images, grain_maps).
            callback_on_step_end: called as callback(pipe, step, timestep, {"latents": ...}) after every step; what it
                returns under "latents" replaces them, tied to the map.
            callback_on_step_end_tensor_inputs: which tensors the callback receives.
            height, width: sides of the image in pixels, multiples of S; default: the size of training.
            guidance_power: exponent of MDT's power-cosine schedule of the scale; None keeps the scale constant.
            timesteps, sigmas: steps of one's own, descending, in the place of `num_inference_steps`, for schedulers
                that take them.
            eta: share of fresh noise in a step, in [0, 1], for DDIM.
            attention_kwargs: {"scale": ...} weighs adapters (LoRA) in this call.

        Raises:
            ValueError: an argument is out of range, unknown, or contradicts another or the model.
        """
        # 1. Arguments
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_settings(locals())
        if self.vae is None and output_type != "latent":
            raise ValueError(f"`output_type` must be 'latent' without a `vae`, got {output_type!r}.")
        check_scheduler(self.scheduler, self.transformer, self._of_flow)
        ids, batch_size = self.prepare_labels(class_labels, num_images_per_prompt)  # (B,)
        can_draw = self.grain_model is not None
        grain_map = as_grain_map(grain_map, self.transformer.config.num_grains)
        check_inputs(batch_size, grain_map, fine_ratio, generator, latents, self.transformer, can_draw)
        size = map_size(grain_map, latents, height, width, self.vae, self.transformer)
        self._guidance_scale, self._interrupt, self._cached_pass = guidance_scale, False, None
        self._attention_kwargs = attention_kwargs

        # 2. Grain map
        grain_map = self.prepare_grain_map(
            grain_map, fine_ratio, ids, batch_size, size, grain_num_inference_steps, grain_guidance_scale, generator
        )  # (B, h, w)
        layout = self.transformer.prepare_grain_map(grain_map)

        # 3. Noise with the grain of its region
        latents = self.prepare_latents(latents, batch_size, size, generator)
        own = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta}
        steps = TiedScheduler(self.scheduler, layout, num_inference_steps, latents.device, generator, **own)
        latents = steps.prior(latents)  # (B, C, h * R, w * R)

        # 4. Denoise
        self._num_timesteps = len(steps.timesteps)
        passes = {False: (layout, ids)}
        if ids is not None and guidance_scale != 1.0:  # now, so that no step has to wait for it
            passes[True] = self._prepare_guided(layout, ids)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(steps.timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                scale = self._guidance_at(i / self._num_timesteps, guidance_interval, guidance_power)
                model_input, timestep = steps.model_input(latents, t)
                prediction = self._predict(model_input, timestep, passes, scale)  # (B, O, h * R, w * R)
                latents = steps.step(prediction.to(latents.dtype), t, latents)
                if callback_on_step_end is not None:
                    tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                    latents = layout.tie(changed_by(callback_on_step_end(self, i, t, tensors), latents))
                progress_bar.update()

        # 5. Decode
        layout.check_tied(latents)
        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return D2iTPipelineOutput(images=images, grain_maps=grain_map) if return_dict else (images, grain_map)
