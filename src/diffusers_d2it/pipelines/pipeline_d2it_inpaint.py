# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From a picture and a mask to the picture with what is masked drawn anew."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from diffusers.utils import logging

from ..data.images import ImageInput
from .calls import one_call
from .editing import EditingPipeline, start_of_edit
from .grain_maps import MapInput, read_maps
from .inpainting import crop_around, is_new, masks_of, paste_part, pasted_back, touched, whole_codes
from .outputs import D2iTPipelineOutput
from .pictures import MaskInput
from .sampling_steps import TiedScheduler


logger = logging.get_logger(__name__)


class D2iTInpaintPipeline(EditingPipeline):
    r"""In-painting: what a mask shows white is drawn anew, given the rest of the picture and of its grain map.

        pipe = D2iTInpaintPipeline.from_pretrained(bundled_checkpoint())
        pipe([207], image="dog.jpg", mask_image="face.png").images[0]

    Codes that the mask touches are new, all others keep their value; regions that it touches have their grain drawn
    given all others.
    """

    @one_call
    def __call__(
        self,
        class_labels: int | str | list[int | str] | np.ndarray | torch.Tensor | None = None,
        image: ImageInput | None = None,
        mask_image: MaskInput | None = None,
        strength: float = 1.0,
        padding_mask_crop: int | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.3, 1.0),
        grain_map: MapInput | list[MapInput] = "draw",
        fine_ratio: float | list[float | None] | None = None,
        grain_num_inference_steps: int = 10,
        grain_guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["D2iTInpaintPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[Literal["latents"]] = ["latents"],
        height: int | None = None,
        width: int | None = None,
        guidance_power: float | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float | None = None,
        attention_kwargs: dict | None = None,
        paste_back: bool = True,
    ) -> D2iTPipelineOutput | tuple:
        """Draw parts of pictures anew.

        Args:
            class_labels: one for all pictures, or one for each; as of `D2iTPipeline`.
            image: pictures, as of `D2iTImg2ImgPipeline`.
            mask_image: one mask for all pictures, or one for each, of the size of its picture: white, from the middle
                grey on, is new. Paths, PIL images, arrays or tensors, as of `pictures.read_masks`.
            strength: share of the steps that are taken, in [0, 1]; below 1 what is masked is a variation of what was
                there.
            padding_mask_crop: pixels around the mask: only this part of a picture is drawn, at the size asked for, and
                put back at its own. For PIL output, and pictures of any size; `grain_maps` are those of the parts.
            grain_map: "draw" for the picture's own map outside the mask and one that is drawn given it inside,
                "image" for its own everywhere, or a map as of `D2iTPipeline`.
            fine_ratio: of the picture's own map, as of `grain_map_from_image`; where all of a map is drawn, of that.
            paste_back: keep the pixels of the picture outside the mask, exactly; False returns what is decoded.
            num_images_per_prompt, latents, ...: as of `D2iTImg2ImgPipeline`.

        Raises:
            ValueError: an argument is out of range, unknown, or contradicts another or the model; a picture or a mask
                cannot be used, or they differ in size; or the strength is less than a step.
        """
        # 1. Arguments, pictures and masks
        call = locals()
        if padding_mask_crop is not None:
            return self._draw_crops(call)
        batch, ids, size, pictures = self.begin_edit(call)
        pixels = self.fit_images(pictures, batch, size)  # (B, 3, H, W)
        new = is_new(masks_of(mask_image, pictures), self.image_size(size))[batch.pictures].to(pixels.device)
        if not new.flatten(1).any(dim=1).all():  # of each image
            logger.warning("`mask_image` is black, or white only where the picture is cut: nothing is new there.")
        strength = strength if new.any() else 0.0

        # 2. Grain map
        batch = self.with_own_maps(batch, pixels, touched(new, self.vae.region_size))
        grain_map = self.prepare_grain_map(batch, ids, size, call)
        layout = self.transformer.prepare_grain_map(grain_map)

        # 3. The pictures, noised; noise alone where they are new
        noise = self.prepare_latents(latents, batch.size, size, batch.generator)
        own = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta}
        steps = TiedScheduler(self.scheduler, layout, num_inference_steps, noise.device, batch.generator, **own)
        steps.start_at(strength)
        kept = self.encode_images(pixels, grain_map)  # (B, C, h * R, w * R)
        new_cells = whole_codes(touched(new, self.vae.downsample_factor), layout)  # (B, 1, h * R, w * R)

        def put_back(latents: torch.Tensor, i: int) -> torch.Tensor:
            if steps.is_halfway(i):
                return latents
            return torch.where(new_cells, latents, steps.noised(kept, noise, i + 1))

        latents = torch.where(new_cells, start_of_edit(steps, kept, noise), steps.noised(kept, noise, 0))

        # 4. Denoise
        latents = self.denoise(latents, steps, {"grain_map": layout, "class_labels": ids}, call, put_back)

        # 5. Decode
        if paste_back and output_type != "latent":
            pasted = pasted_back(self.decode_latents(latents, "pt"), pixels, new, self.vae.region_size)
            images = self.image_processor.postprocess(pasted, output_type, [False] * batch.size)
        else:
            images = self.decode_latents(latents, output_type)
        return self.output(D2iTPipelineOutput(images, grain_map, layout.num_grains), return_dict)

    def _draw_crops(self, call: dict[str, Any]) -> D2iTPipelineOutput | tuple:
        """The call for parts of the pictures around their masks, each put back into its picture."""
        self.check_settings(call)
        if call["output_type"] != "pil" or not call["paste_back"]:
            raise ValueError(
                "`padding_mask_crop` puts parts back into pictures of any size: it needs `output_type` 'pil' and"
                f" `paste_back`, got {call['output_type']!r} and {call['paste_back']}."
            )
        pictures = self.read_pictures(call["image"])
        masks = masks_of(call["mask_image"], pictures)
        maps = read_maps(call["grain_map"], self.transformer.config.num_grains, self._map_names)
        sides = self.image_size(self.map_size(call, maps))
        crops = [crop_around(one, mask, sides, call["padding_mask_crop"]) for one, mask in zip(pictures, masks)]
        boxes, parts, part_masks = zip(*crops)
        whole = {name: value for name, value in call.items() if name != "self"}
        whole |= {"image": list(parts), "mask_image": list(part_masks), "padding_mask_crop": None, "return_dict": True}
        output = D2iTInpaintPipeline.__call__.__wrapped__(self, **whole)
        per_picture = len(output.images) // len(pictures)
        for i, part in enumerate(output.images):
            one = i // per_picture
            output.images[i] = paste_part(pictures[one], masks[one], boxes[one], part)
        return output if call["return_dict"] else output.to_tuple()
