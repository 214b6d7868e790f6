# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From a class label to an image and its grain map: the whole of Fig. 2 (Stage 2) of arXiv:2504.09454."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from ..grains import tie
from ..limits import plain
from ..words import shown
from .calls import one_call, turn_of
from .grain_maps import MapInput
from .grained import GrainedPipeline
from .outputs import D2iTPipelineOutput
from .sampling_steps import TiedScheduler


class D2iTPipeline(GrainedPipeline):
    r"""Class-conditional (or unconditional) generation with D2iT.

        pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
        output = pipe(class_labels=["golden retriever"], generator=torch.manual_seed(0))
        output.images[0]
        visualize_grain_map(output.images[0], output.grain_maps[0])

    The grain model draws a grain map for the class, the content model denoises latents that have this grain, the
    Dynamic VAE decodes them. The map can also be given, whole or in part, or asked to have a share of fine regions.
    """

    @one_call
    def __call__(
        self,
        class_labels: int | str | list[int | str] | np.ndarray | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.3, 1.0),
        grain_map: MapInput | list[MapInput] = None,
        fine_ratio: float | list[float | None] | None = None,
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
            grain_map: one for all, one a label or one an image; several for a single image give one each, of the same
                noise. Whole numbers (h, w) are a map in regions, 0 = coarsest, -1 where the grain model draws, given
                the rest; its size decides that of the image, see `grain_map_size`. Pictures, paths, and arrays of
                bool, uint8 or floating point are masks of any size, white = finest, see `grain_map_from_mask`. Or
                "coarse", "fine", "random"; None lets the grain model draw all of it.
            fine_ratio: share of regions in the finest grain, in [0, 1], of all images or of each, met to the nearest
                region: the grain model is asked for it and its map trimmed. For "random" it is the probability of a
                fine region.
            grain_num_inference_steps: steps of the grain model. With 10 of them 98.8 % of the regions of the bundled
                checkpoint's maps are what they are with 100, with 20 of them 99.4 % (200 maps, the same noise).
            grain_guidance_scale: classifier-free guidance of the grain model, on its logits.
            generator: a torch generator, or one for each image, which then does not depend on the rest of the batch.
            latents: noise to start from, (B, C, H / f, W / f), standard normal; (1, ...) where several maps share it.
                It is tied to the map.
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
        call = locals()
        batch, ids, size = self.begin(call)

        # 2. Grain map
        grain_map = self.prepare_grain_map(batch, ids, size, call)
        layout = self.transformer.prepare_grain_map(grain_map)

        # 3. Noise with the grain of its region
        noise = self.prepare_latents(latents, batch.size, size, batch.generator)
        own = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta}
        steps = TiedScheduler(self.scheduler, layout, num_inference_steps, noise.device, batch.generator, **own)

        # 4. Denoise
        conditions = {"grain_map": layout, "class_labels": ids}
        latents = self.denoise(steps.prior(noise), steps, conditions, call)  # (B, C, h * R, w * R)

        # 5. Decode
        images = self.decode_latents(latents, output_type)
        return self.output(D2iTPipelineOutput(images, grain_map, layout.num_grains), return_dict)

    def interpolate(
        self,
        a: int | torch.Tensor,
        b: int | torch.Tensor,
        steps: int,
        class_labels: int | str | list[int | str] | None = None,
        **kwargs: Any,
    ) -> list[PIL.Image.Image]:
        """Pictures on the way from one noise to another, under one map: a list for `export_to_gif` of diffusers.

            export_to_gif(pipe.interpolate(0, 7, steps=24, class_labels=[207]), "between.gif")

        The way is spherical, between noises that are tied to the map, so each is as likely as the ends. Noise that a
        scheduler draws in its steps is the same for all. The label is one for all: between two labels there is no
        picture of both, and a change in the midst is seen as a jump.

        Args:
            a, b: seeds, or noise (1, C, H / f, W / f). The first picture is that of the seed a.
            steps: number of pictures, both ends included.
            class_labels: one label; None for an unconditional model.
            **kwargs: of `__call__` for one image. A map that is drawn is drawn once, for the first picture.

        Raises:
            ValueError: there are fewer than two steps, an end is neither seed nor noise, an argument is for several
                images, or as for `__call__`.
        """
        a, b, steps = plain(a), plain(b), plain(steps)
        kwargs = {name: plain(value) for name, value in kwargs.items()}
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(f"`steps` must be a whole number, at least 2, got {steps!r}.")
        for name, end in (("a", a), ("b", b)):
            if not isinstance(end, int | torch.Tensor):
                raise ValueError(f"`{name}` must be a seed or a tensor of noise, got {shown(end)}.")
        for name in ("latents", "generator", "num_images_per_prompt", "return_dict"):
            if name in kwargs:
                raise ValueError(f"`{name}` is not for `interpolate`, got {shown(kwargs[name])}.")
        given = inspect.signature(type(self).__call__).bind(self, class_labels, **kwargs)
        given.apply_defaults()
        with turn_of(self.transformer):
            grain_map, first, generator = self._map_and_noise(a, given.arguments)
            _, last, _ = self._map_and_noise(b, given.arguments)
            between = slerp(tie(first, grain_map), tie(last, grain_map), steps)  # (steps, C, h * R, w * R)
            state, kwargs = generator.get_state(), {**kwargs, "grain_map": grain_map, "fine_ratio": None}
            pictures = []
            for noise in between.split(1):
                generator.set_state(state)
                pictures += self(class_labels, latents=noise, generator=generator, **kwargs).images
        return pictures

    def _map_and_noise(
        self, end: int | torch.Tensor, call: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
        """What `__call__` draws of a seed, in its order: the map, then the noise; and the generator behind them."""
        generator = torch.Generator().manual_seed(end if isinstance(end, int) else 0)
        latents = None if isinstance(end, int) else end
        batch, ids, size = self.begin({**call, "generator": generator, "latents": latents})
        if batch.size != 1:
            raise ValueError(f"`class_labels`, `grain_map` and `fine_ratio` must be of one image, got {batch.size}.")
        grain_map = self.prepare_grain_map(batch, ids, size, call)
        return grain_map, self.prepare_latents(latents, 1, size, generator), generator


def slerp(a: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
    """On the sphere from a to b, (1, ...) each: (steps, ...), both ends included."""
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    share = torch.linspace(0, 1, steps, device=a.device).view(-1, *[1] * (a.ndim - 1))
    if angle.sin() < 1e-6:  # they are one and the same, or opposite: there is no one way on the sphere
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / angle.sin()
