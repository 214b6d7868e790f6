# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What every class-conditional pipeline has: names of its classes, the schedule of guidance, decoding."""

import math

import torch

from .base import StrictPipeline
from .labels import label_ids


class ClassConditionalPipeline(StrictPipeline):
    """A pipeline of a denoiser with class labels, `transformer`, and of an autoencoder, `vae`.

    A subclass registers its components and `id2label`, and makes `image_processor`.
    """

    _callback_tensor_inputs = ["latents"]
    _current_timestep = None

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the classes by id, as serialised with the pipeline."""
        if self.config.id2label is None:
            return None
        return {int(key): name for key, name in self.config.id2label.items()}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Ids of class names.

        Args:
            label: a name or a list of names, as in `id2label`; one of several names separated by commas is enough.

        Raises:
            ValueError: a name is unknown (close ones are listed) or belongs to several classes, or the pipeline has no
                names.
        """
        return label_ids(label, self.id2label)

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; a callback may set `_guidance_scale` between steps."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running or last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the running or last step, for caches of diffusers that ask for it."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """A callback may set `_interrupt` to stop denoising; what has been reached is decoded."""
        return self._interrupt

    def _guidance_at(self, progress: float, interval: tuple[float, float], power: float | None) -> float:
        """Guidance scale after a share `progress` of the steps: 1 outside the interval, where one pass is enough."""
        if self.transformer.config.num_classes is None or not interval[0] <= progress < interval[1]:
            # The last step ends at progress 1, so an interval up to 1 includes it.
            return 1.0
        if power is None:
            return self._guidance_scale
        # Power-cosine schedule of MDT (Gao et al., arXiv:2303.14389): from 1 at pure noise to the full scale.
        return 1 + (self._guidance_scale - 1) * (1 - math.cos(math.pi * progress**power)) / 2

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil"):
        """Scaled latents (B, C, H / f, W / f) to images of `output_type`.

        Raises:
            ValueError: the latents are not finite (the model or the scheduler has diverged), or the images are not
                (the autoencoder has, or its dtype is too small). They would be black otherwise.
        """
        if not latents.isfinite().all():
            raise ValueError("denoising ended in latents that are not finite: the model or the scheduler diverged.")
        if output_type == "latent":
            return latents
        pixels = self.vae.decode(self.vae.unscale_latents(latents).to(self.vae.dtype)).sample
        if not pixels.isfinite().all():
            raise ValueError(
                f"`vae` decoded finite latents, up to {latents.abs().max().item():.4g}, to images that are not finite"
                f" in {self.vae.dtype}: its weights are damaged, or it needs another dtype."
            )
        return self.image_processor.postprocess(pixels.float(), output_type=output_type)
