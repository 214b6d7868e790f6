# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What every class-conditional pipeline has: labels, the loop that denoises under guidance, decoding.

Shapes:
    B images, C latent channels, H W sides of the latents in cells, O output channels of the denoiser
    h w sides of what a call draws, in units of the denoiser: its `patch_size` cells along a side, a region of D2iT
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, get_type_hints

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..limits import check_values
from ..models.latent_codec import LatentCodec
from .base import Pipeline, StrictPipeline
from .batches import Batch, make_batch
from .calls import turn_of
from .checks import changed_by, check_components, check_noise, size_of_call
from .labels import class_ids, ids_of_names, label_id
from .lora import LoraPipelineMixin
from .outputs import ImagesOutput
from .sampling_steps import SamplingSteps
from .schedulers import check_scheduler, is_flow


_KEPT = object()  # the dtype that models have: diffusers' `from_pipe` casts all to float32 where it is given none


class ClassConditionalPipeline(LoraPipelineMixin, StrictPipeline):
    """A pipeline of a denoiser with class labels, `transformer`, its `scheduler`, and of an autoencoder, `vae`.

    A subclass registers these and what it has beside, then calls `_prepare`.
    """

    _schedulers = ("scheduler",)
    _limits: Mapping[str, tuple[float, float]] = {  # of arguments of `__call__`
        "num_images_per_prompt": (1, 10_000),
        "num_inference_steps": (1, 1_000_000),
        "guidance_scale": (-1e6, 1e6),
        "guidance_interval": (0, 1),
        "guidance_power": (1e-6, 1e6),
        "height": (1, 16_384),
        "width": (1, 16_384),
        "timesteps": (0, 1_000_000),
        "sigmas": (0, 1e6),
        "eta": (0, 1),
    }
    _callback_tensor_inputs = ["latents"]
    _current_timestep = None

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Raise a ValueError unless these arguments of `__call__` are of their types and in their ranges.

        Labels have a check of their own, `class_ids`; an interval must not end before it begins.
        """
        annotations = get_type_hints(cls.__call__)
        annotations.pop("class_labels", None)
        check_values(settings, annotations, cls._limits, exact=False)
        start, stop = settings.get("guidance_interval", (0, 1))
        if start > stop:
            raise ValueError(f"`guidance_interval` must be (start, stop) with start <= stop, got ({start}, {stop}).")

    def _prepare(self, id2label: dict[int, str] | dict[str, str] | None) -> None:
        """What a constructor does once its components are registered: names of classes, and whether all fits."""
        # JSON has strings for keys, so the dictionary is kept as it will be read back.
        if id2label is not None:
            id2label = {str(key): id2label[key] for key in sorted(id2label, key=int)}
        self.register_to_config(id2label=id2label)
        check_components(self.vae, self.transformer, self.scheduler, self.id2label)
        self._of_flow = is_flow(self.scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @classmethod
    def from_pipe(cls: type[Pipeline], pipeline: DiffusionPipeline, **kwargs: Any) -> Pipeline:
        """As of diffusers; the models, which both pipelines then have, keep their dtypes where none is asked for."""
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = _KEPT
        return super().from_pipe(pipeline, **kwargs)

    def to(self: Pipeline, *args: Any, **kwargs: Any) -> Pipeline:
        """As of diffusers; a call that is under way in another thread ends first."""
        if kwargs.get("dtype") is _KEPT:
            return self
        with nullcontext() if self.transformer is None else turn_of(self.transformer):
            return super().to(*args, **kwargs)

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the classes by id, as serialised with the pipeline."""
        if self.config.id2label is None:
            return None
        return {int(key): name for key, name in self.config.id2label.items()}

    @property
    def components(self) -> dict[str, Any]:
        """All that another pipeline of this class is made from, the names of the classes included."""
        return super().components | {"id2label": self.id2label}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Ids of class names.

        Args:
            label: a name or a list of names, as in `id2label`; one of several names separated by commas is enough.

        Raises:
            ValueError: a name is unknown (close ones are listed) or belongs to several classes, or the pipeline has no
                names.
        """
        ids_of_name = ids_of_names(self.id2label or {})
        labels = [label] if isinstance(label, str) else label
        return [label_id(one, self.id2label, ids_of_name) for one in labels]

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; a callback may set `_guidance_scale` between steps."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running or last call is guided, in some of its steps at least."""
        return self._guidance_scale != 1.0 and self.transformer.config.num_classes is not None

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What the running or last call was given for attention: {"scale": ...} weighs adapters."""
        return self._attention_kwargs

    @property
    def labels(self) -> dict[str, int]:
        """Ids of the classes by their names, each of several separated by commas; empty without names."""
        return {name: ids[0] for name, ids in ids_of_names(self.id2label or {}).items() if len(ids) == 1}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along a side of a cell of the latents."""
        return LatentCodec(self.vae).factor

    @property
    def trained_side(self) -> int:
        """Pixels along a side of the images that the transformer was trained on."""
        return self.transformer.config.sample_size * self.vae_scale_factor

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
        ids = class_ids(call["class_labels"], self.transformer.config.num_classes, self.id2label)
        self._guidance_scale, self._interrupt, self._cached_pass = call["guidance_scale"], False, None
        self._attention_kwargs = call["attention_kwargs"]
        self._tensor_inputs = call["callback_on_step_end_tensor_inputs"]
        each = self._each(call, ids)
        batch = make_batch(ids, call["num_images_per_prompt"], call["generator"], num_pictures, **each)
        check_noise(batch, call["latents"], self.transformer)
        size = self._size(call, batch)
        return batch, None if ids is None else torch.tensor(batch.ids, device=self._execution_device), size

    def _each(self, call: dict[str, Any], ids: list[int] | None) -> dict[str, list]:
        """By the name of an argument what each image may have of it: one for all, one a pair or one an image."""

    def _size(self, call: dict[str, Any], batch: Batch) -> tuple[int, int]:
        """(h, w) of what a call draws."""
        return size_of_call(call, self.transformer, self.vae)

    def prepare_latents(
        self,
        latents: torch.Tensor | None,
        batch_size: int,
        size: tuple[int, int],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Noise to start from, (B, C, H, W) on the execution device, of a size (h, w): given, or drawn."""
        sides = (side * self.transformer.patch_size for side in size)
        shape = (batch_size, self.transformer.config.in_channels, *sides)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        return latents.to(self._execution_device, torch.float32).expand(shape)

    def denoise(
        self,
        latents: torch.Tensor,
        steps: SamplingSteps,
        conditions: dict[str, Any],
        call: Mapping[str, Any],
        put_back: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        null_conditions: dict[str, torch.Tensor] | None = None,
        notice: Callable[[Any], None] | None = None,
    ) -> torch.Tensor:
        """Latents (B, C, H, W) through all `steps`.

        Args:
            latents: a sample at the first step.
            steps: of which some at the beginning may be left out, see `SamplingSteps.start_at`.
            conditions: what the denoiser is given beside latents and timestep, by the names of its arguments.
            call: arguments of `__call__`, of which guidance and callback are read.
            put_back: called with the sample after step i and i; what it returns goes on.
            null_conditions: of the conditions those that differ in passes without a label, beside the label.
            notice: called with what the denoiser returned, of twice the batch where a step is guided.
        """
        total = steps.skipped + len(steps.timesteps)
        self._num_timesteps = len(steps.timesteps)
        callback = call["callback_on_step_end"]

        @cache
        def conditions_of(guided: bool) -> dict[str, Any]:
            return self._guided(conditions, null_conditions or {}) if guided else conditions

        conditions_of(self.do_classifier_free_guidance)  # now, so that no step has to wait for it
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(steps.timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                progress = (steps.skipped + i) / total
                scale = self._guidance_at(progress, call["guidance_interval"], call["guidance_power"])
                model_input, timestep = steps.model_input(latents, t)
                prediction = self._predict(model_input, timestep, conditions_of, scale, notice)  # (B, O, H, W)
                latents = steps.step(prediction.to(latents.dtype), t, latents)
                if put_back is not None:
                    latents = put_back(latents, i)
                if callback is not None:
                    tensors = {name: latents for name in self._tensor_inputs}
                    latents = steps.tie(changed_by(callback(self, i, t, tensors), latents))
                progress_bar.update()
        return latents

    def _guidance_at(self, progress: float, interval: tuple[float, float], power: float | None) -> float:
        """Guidance scale after a share `progress` of the steps: 1 outside the interval, where one pass is enough."""
        if self.transformer.config.num_classes is None or not interval[0] <= progress < interval[1]:
            # The last step ends at progress 1, so an interval up to 1 includes it.
            return 1.0
        if power is None:
            return self._guidance_scale
        # Power-cosine schedule of MDT (Gao et al., arXiv:2303.14389): from 1 at pure noise to the full scale.
        return 1 + (self._guidance_scale - 1) * (1 - math.cos(math.pi * progress**power)) / 2

    def _guided(self, conditions: dict[str, Any], null_conditions: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The conditions of a batch twice: for the passes with a label and those without, (2 * B, ...)."""
        null_ids = torch.full_like(conditions["class_labels"], self.transformer.config.num_classes)
        null_conditions = {"class_labels": null_ids} | null_conditions
        return conditions | {name: torch.cat([conditions[name], null]) for name, null in null_conditions.items()}

    def _predict(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        conditions_of: Callable[[bool], dict[str, Any]],
        scale: float,
        notice: Callable[[Any], None] | None,
    ) -> torch.Tensor:
        """One prediction, (B, O, H, W), guided where the scale is not 1: in one pass of twice the batch."""
        guided = scale != 1.0
        if guided != self._cached_pass:
            # What caches of diffusers hold is of the other pass, of a step long past, or of a failed call
            self.transformer._reset_stateful_cache()
            self._cached_pass = guided
        if guided:
            model_input = torch.cat([model_input, model_input])  # (2 * B, C, H, W)
        with self.transformer.cache_context("guided" if guided else "cond"):
            model_input, kwargs = model_input.to(self.transformer.dtype), {"attention_kwargs": self._attention_kwargs}
            output = self.transformer(model_input, timestep, **conditions_of(guided), **kwargs)
        if notice is not None:
            notice(output)
        prediction, channels = output.sample, self.transformer.config.in_channels
        if guided:
            prediction, null = prediction.chunk(2)
            noise, null_noise = prediction[:, :channels], null[:, :channels]
            noise = null_noise + scale * (noise - null_noise)
            prediction = torch.cat([noise, prediction[:, channels:]], dim=1)
        return prediction.clone()  # a CUDA graph writes its next output to the same place

    def output(self, output: ImagesOutput, return_dict: bool) -> ImagesOutput | tuple:
        """What a call returns; models that were loaded for it go back."""
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Scaled latents (B, C, H / f, W / f) to images of `output_type`.

        Raises:
            ValueError: the latents are not finite (the model or the scheduler has diverged), or the images are not
                (the autoencoder has, or its dtype is too small). They would be black otherwise.
        """
        if not latents.isfinite().all():
            raise ValueError("denoising ended in latents that are not finite: the model or the scheduler diverged.")
        if output_type == "latent":
            return latents
        if self.vae is None:
            raise ValueError(f"`output_type` must be 'latent' without a `vae`, got {output_type!r}.")
        pixels = LatentCodec(self.vae).decode(latents)
        if not pixels.isfinite().all():
            raise ValueError(
                f"`vae` decoded finite latents, up to {latents.abs().max().item():.4g}, to images that are not finite"
                f" in {self.vae.dtype}: its weights are damaged, or it needs another dtype."
            )
        return self.image_processor.postprocess(pixels.float(), output_type=output_type)
