# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From a class label to an image and its grain map: the whole of Fig. 2 (Stage 2) of arXiv:2504.09454.

Shapes:
    B images, C latent channels, H W image sides in pixels, f finest downsample factor, S region side in pixels
    h = H / S, w = W / S sides of the grain map, k grains
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..grains import GrainLayout
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.transformer_d2it_content import D2iTContentModel
from ..models.transformer_d2it_grain import D2iTGrainModel
from ..visualization import visualize_grain_map
from ..words import shown
from .checks import SAMPLING_LIMITS, check_components, check_latents, check_map_arguments, map_size
from .class_conditional import ClassConditionalPipeline
from .grain_maps import grain_map_of_image, random_grain_map, sample_grain_map
from .labels import class_ids
from .tied_scheduler import TiedScheduler


@dataclass
class D2iTPipelineOutput(BaseOutput):
    """Output of `D2iTPipeline`.

    Args:
        images: list of B PIL images, array (B, H, W, 3) in [0, 1], tensor (B, 3, H, W) in [0, 1], or latents
            (B, C, H / f, W / f), by `output_type`.
        grain_maps: the grain of every region, (B, h, w) int64, 0 = coarsest.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    grain_maps: torch.Tensor


class D2iTPipeline(ClassConditionalPipeline):
    r"""Class-conditional (or unconditional) generation with D2iT.

        pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
        output = pipe(class_labels=["golden retriever"], generator=torch.manual_seed(0))
        output.images[0]
        visualize_grain_map(output.images[0], output.grain_maps[0])

    The grain model draws a grain map for the class, the content model denoises latents that have this grain, the
    Dynamic VAE decodes them. The map can also be given, or asked to have a share of fine regions.

    Args:
        vae: decoder of the latents; its thresholds also make maps from images.
        grain_model: draws grain maps; None if maps are always given.
        transformer: the content model.
        scheduler: any of `KarrasDiffusionSchedulers`, or of flow matching for a model trained with it.
        grain_scheduler: scheduler of the grain model, with prediction_type "sample".
        id2label: names of the classes by id, several names separated by commas. Only these ids can be asked for; None
            allows every id of the model.

    Raises:
        ValueError: the components do not fit one another.
    """

    model_cpu_offload_seq = "grain_model->transformer->vae"
    _models = {"vae": "DynamicAutoencoderKL", "grain_model": "D2iTGrainModel", "transformer": "D2iTContentModel"}
    _schedulers = ("scheduler", "grain_scheduler")
    _optional_components = ["grain_model", "grain_scheduler"]
    _limits = SAMPLING_LIMITS

    def __init__(
        self,
        vae: DynamicAutoencoderKL,
        grain_model: D2iTGrainModel | None,
        transformer: D2iTContentModel,
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
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae.region_size, do_resize=False)

    # -----------------------------------------------------------------------------------------------------------------
    # Grain maps
    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def grain_map_from_image(
        self,
        image: PIL.Image.Image | list[PIL.Image.Image] | np.ndarray | torch.Tensor,
        fine_ratio: float | None = None,
    ) -> torch.Tensor:
        """The grain maps of images, by their entropy: what Dynamic Grained Coding does in the first stage.

        Args:
            image: a PIL image or a list of them, an array (B, H, W, 3) or tensor (B, 3, H, W) in [0, 1]. Sides are
                multiples of S: nothing is resized.
            fine_ratio: share of fine regions over the calibration set; None for the autoencoder's default.

        Returns:
            (B, h, w) int64.

        Raises:
            ValueError: sides are not multiples of S, values lie outside [0, 1], the ratio lies outside [0, 1] or the
                autoencoder has not been calibrated.
        """
        return grain_map_of_image(self.vae, image, fine_ratio, self._execution_device)

    visualize_grain_map = staticmethod(visualize_grain_map)

    def prepare_grain_map(
        self,
        grain_map: torch.Tensor | np.ndarray | str | None,
        fine_ratio: float | None,
        class_ids: torch.Tensor | None,
        batch_size: int,
        size: tuple[int, int],
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The maps of a batch, (B, h, w) on the execution device: given, constant, random, or drawn."""
        device = self._execution_device
        num_grains = self.transformer.config.num_grains
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
        if isinstance(grain_map, str):
            if grain_map == "random":
                ratio = fine_ratio
                if ratio is None:
                    ratio = self.vae.grain_ratios[-1]
                return random_grain_map((batch_size, *size), num_grains, ratio, generator, device)
            return torch.full((batch_size, *size), 0 if grain_map == "coarse" else num_grains - 1, device=device)
        grain_map = torch.as_tensor(grain_map, device=device)
        return grain_map.expand(batch_size, *size) if grain_map.ndim == 2 else grain_map.expand(batch_size, -1, -1)

    # -----------------------------------------------------------------------------------------------------------------
    # The call
    # -----------------------------------------------------------------------------------------------------------------

    def check_inputs(
        self,
        *,
        batch_size: int,
        guidance_interval: tuple[float, float],
        grain_map,
        fine_ratio: float | None,
        generator,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise a ValueError that names the first argument of `__call__` that contradicts another or the model."""
        if guidance_interval[0] > guidance_interval[1]:
            raise ValueError(f"`guidance_interval` must be (start, stop) with start <= stop, got {guidance_interval}.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be callable, got {shown(callback_on_step_end)}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got"
                f" {sorted(unknown)}."
            )
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        if len(generators) != batch_size or not all(isinstance(g, torch.Generator | None) for g in generators):
            raise ValueError(
                f"`generator` must be a torch.Generator, or a list of one for each of {batch_size} images, got"
                f" {shown(generator)}."
            )
        num_grains = self.transformer.config.num_grains
        check_map_arguments(grain_map, fine_ratio, batch_size, num_grains, self.grain_model is not None)
        if latents is not None:
            check_latents(latents, batch_size, self.transformer)

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
        """One prediction of the content model, guided where the scale is not 1: in one pass of twice the batch.

        Args:
            model_input: what the network reads, tied, (B, C, h * R, w * R).
            timestep: scalar, on the device.
            passes: layout and labels by whether a pass is guided; None as labels of an unconditional model.
            scale: of classifier-free guidance.

        Returns:
            (B, O, h * R, w * R).
        """
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
            prediction = self.transformer(model_input, timestep, layout, class_ids).sample
        channels = self.transformer.config.in_channels
        if guided:
            prediction, null = prediction.chunk(2)
            noise, null_noise = prediction[:, :channels], null[:, :channels]
            noise = null_noise + scale * (noise - null_noise)
            prediction = torch.cat([noise, prediction[:, channels:]], dim=1)
        return prediction.clone()  # a CUDA graph writes its next output to the same place

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int] | list[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        grain_map: torch.Tensor | np.ndarray | str | None = None,
        fine_ratio: float | None = None,
        grain_num_inference_steps: int = 10,
        grain_guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["D2iTPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        height: int | None = None,
        width: int | None = None,
        guidance_power: float | None = None,
    ) -> D2iTPipelineOutput | tuple:
        """Generate images and their grain maps.

        Args:
            class_labels: an id, a name, or a list of either, one image each; None for an unconditional model.
            num_images_per_prompt: images for each label.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance w, eps = eps_null + w (eps_class - eps_null); 1 is without, and an
                unconditional model has none.
            guidance_interval: first and last share of the steps that are guided, 0 = first step (noise), 1 = last.
                Steps outside take one pass instead of two.
            grain_map: the map, int64 (h, w), (1, h, w) or (B, h, w), 0 = coarsest; or "coarse", "fine", "random". None
                lets the grain model draw it. Its size decides the size of the image.
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

        Raises:
            ValueError: an argument is out of range, unknown, or contradicts another or the model.
        """
        # 1. Arguments
        self.check_settings({name: value for name, value in locals().items() if name in self._limits})
        ids = class_ids(class_labels, self.transformer.config.num_classes, self.id2label)
        batch_size = (1 if ids is None else len(ids)) * num_images_per_prompt
        self.check_inputs(
            batch_size=batch_size,
            guidance_interval=guidance_interval,
            grain_map=grain_map,
            fine_ratio=fine_ratio,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        size = map_size(grain_map, latents, height, width, self.vae, self.transformer)
        device = self._execution_device
        self._guidance_scale = guidance_scale
        self._interrupt = False
        if ids is not None:
            ids = torch.tensor(ids, device=device).repeat_interleave(num_images_per_prompt)  # (B,)

        # 2. Grain map
        grain_map = self.prepare_grain_map(
            grain_map,
            fine_ratio=fine_ratio,
            class_ids=ids,
            batch_size=batch_size,
            size=size,
            num_inference_steps=grain_num_inference_steps,
            guidance_scale=grain_guidance_scale,
            generator=generator,
        )  # (B, h, w)

        # 3. Noise with the grain of its region
        if latents is None:
            cells, channels = self.transformer.patch_size, self.transformer.config.in_channels
            shape = (batch_size, channels, size[0] * cells, size[1] * cells)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        layout = self.transformer.prepare_grain_map(grain_map)
        steps = TiedScheduler(self.scheduler, layout, num_inference_steps, device, generator)
        latents = steps.prior(latents.to(device))  # (B, C, h * R, w * R)

        # 4. Denoise
        self._num_timesteps = len(steps.timesteps)
        passes, self._cached_pass = {False: (layout, ids)}, None
        progresses = [i / self._num_timesteps for i in range(self._num_timesteps)]
        if any(self._guidance_at(progress, guidance_interval, guidance_power) != 1.0 for progress in progresses):
            passes[True] = self._prepare_guided(layout, ids)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(steps.timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                scale = self._guidance_at(progresses[i], guidance_interval, guidance_power)
                model_input, timestep = steps.model_input(latents, t)
                prediction = self._predict(model_input, timestep, passes, scale)  # (B, O, h * R, w * R)
                latents = steps.step(prediction.to(latents.dtype), t, latents)
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = layout.tie(callback_on_step_end(self, i, t, tensors).get("latents", latents))
                progress_bar.update()

        # 5. Decode
        layout.check_tied(latents)
        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, grain_map)
        return D2iTPipelineOutput(images=images, grain_maps=grain_map)
