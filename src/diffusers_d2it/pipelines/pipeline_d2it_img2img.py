# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From a picture to variations of it, under its own grain map or another."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from ..data.images import ImageInput
from .calls import one_call
from .editing import EditingPipeline, start_of_edit
from .grain_maps import MapInput
from .outputs import D2iTPipelineOutput
from .sampling_steps import TiedScheduler


class D2iTImg2ImgPipeline(EditingPipeline):
    r"""Variations of a picture: it is encoded, noised in part, and denoised as an image of a class.

        pipe = D2iTImg2ImgPipeline.from_pretrained(bundled_checkpoint())
        pipe([207], image="dog.jpg", strength=0.5, num_images_per_prompt=4).images

    The picture keeps its own grain map, so detail stays where it was, unless another is given.
    """

    @one_call
    def __call__(
        self,
        class_labels: int | str | list[int | str] | np.ndarray | torch.Tensor | None = None,
        image: ImageInput | None = None,
        strength: float = 0.6,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.3, 1.0),
        grain_map: MapInput | list[MapInput] = "image",
        fine_ratio: float | list[float | None] | None = None,
        grain_num_inference_steps: int = 10,
        grain_guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["D2iTImg2ImgPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[Literal["latents"]] = ["latents"],
        height: int | None = None,
        width: int | None = None,
        guidance_power: float | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float | None = None,
        attention_kwargs: dict | None = None,
    ) -> D2iTPipelineOutput | tuple:
        """Change pictures.

        Args:
            class_labels: one for all pictures, or one for each; as of `D2iTPipeline`.
            image: a picture, or a list of them: paths, PIL images, arrays ([B,] H, W, 3) or tensors ([B,] 3, H, W), in
                [0, 1] or of 8 or 16 bits. Its centre is fitted to the size asked for, as in training.
            strength: share of the steps that are taken, in [0, 1]: 0 gives the reconstruction, 1 only the map of the
                picture, as `D2iTPipeline` with it.
            grain_map: "image" for the picture's own at `fine_ratio`, "draw" for one of the grain model, or a map as of
                `D2iTPipeline`.
            fine_ratio: of the picture's own map as of `grain_map_from_image`, of others as of `D2iTPipeline`.
            latents: noise, (B, C, H / f, W / f), standard normal.
            num_images_per_prompt: variations of each picture.
            num_inference_steps, guidance_scale, guidance_interval, guidance_power: as of `D2iTPipeline`; shares of the
                steps, as of an interval, are of all steps, those left out included.
            grain_num_inference_steps, grain_guidance_scale, timesteps, sigmas, eta, attention_kwargs: as of it.
            generator, output_type, return_dict, height, width: as of it.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as of it.

        Raises:
            ValueError: an argument is out of range, unknown, or contradicts another or the model; a picture cannot be
                used; or the strength is less than a step.
        """
        # 1. Arguments and pictures
        call = locals()
        batch, ids, size, pictures = self.begin_edit(call)
        pixels = self.fit_images(pictures, batch, size)  # (B, 3, H, W)

        # 2. Grain map
        batch = self.with_own_maps(batch, pixels, torch.ones(batch.size, *size, dtype=torch.bool))
        grain_map = self.prepare_grain_map(batch, ids, size, call)
        layout = self.transformer.prepare_grain_map(grain_map)

        # 3. The pictures, noised
        noise = self.prepare_latents(latents, batch.size, size, batch.generator)
        own = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta}
        steps = TiedScheduler(self.scheduler, layout, num_inference_steps, noise.device, batch.generator, **own)
        steps.start_at(strength)
        latents = start_of_edit(steps, self.encode_images(pixels, grain_map), noise)  # (B, C, h * R, w * R)

        # 4. Denoise
        latents = self.denoise(latents, steps, {"grain_map": layout, "class_labels": ids}, call)

        # 5. Decode
        images = self.decode_latents(latents, output_type)
        return self.output(D2iTPipelineOutput(images, grain_map, layout.num_grains), return_dict)
