# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From a class label to an image by DC-DiT (arXiv:2603.06351), within a budget of tokens.

Shapes:
    B images, C latent channels, N steps, f pixels along a side of a cell, H W image sides in pixels
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers

from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.transformer_dcdit import DCDiTModel, DCDiTOutput
from ..visualization import visualize_boundary_map
from .calls import one_call
from .class_conditional import ClassConditionalPipeline
from .outputs import DCDiTPipelineOutput
from .sampling_steps import SamplingSteps


class DCDiTPipeline(ClassConditionalPipeline):
    r"""Class-conditional (or unconditional) generation with DC-DiT.

        pipe = DCDiTPipeline.from_pretrained("user/dcdit")
        output = pipe(class_labels=[207], budget=0.5, null_budget=0.1)
        output.images[0], output.token_counts.float().mean()
        visualize_boundary_map(output.images[0], output.boundary_maps[0])

    The network decides in every step which cells of the latents are worth a token; a budget lets it keep a share of
    them. Nothing is drawn beforehand: the map of tokens is a result.

    Args:
        vae: any `AutoencoderKL`, or a `DynamicAutoencoderKL`, of which the finest grain is used; None if latents are
            all that is wanted.
        transformer: the network; None if latents are only decoded.
        scheduler: any of `KarrasDiffusionSchedulers`, or of flow matching for a model trained with it.
        id2label: names of the classes by id, several names separated by commas. Only these ids can be asked for; None
            allows every id of the model.

    Raises:
        ValueError: the components do not fit one another.
    """

    vae: AutoencoderKL | DynamicAutoencoderKL
    transformer: DCDiTModel
    scheduler: SchedulerMixin

    model_cpu_offload_seq = "transformer->vae"
    _models = {"vae": (AutoencoderKL, DynamicAutoencoderKL), "transformer": (DCDiTModel,)}
    _optional_components = ["vae", "transformer"]
    _limits = ClassConditionalPipeline._limits | {
        "budget": (DCDiTModel.budget_argument.smallest, 1),
        "null_budget": (DCDiTModel.budget_argument.smallest, 1),
    }

    def __init__(
        self,
        vae: AutoencoderKL | DynamicAutoencoderKL | None,
        transformer: DCDiTModel | None,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self._prepare(id2label)

    visualize_boundary_map = staticmethod(visualize_boundary_map)

    @one_call
    def __call__(
        self,
        class_labels: int | str | list[int | str] | np.ndarray | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.3, 1.0),
        budget: float | list[float] = 1.0,
        null_budget: float | list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DCDiTPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[Literal["latents"]] = ["latents"],
        height: int | None = None,
        width: int | None = None,
        guidance_power: float | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float | None = None,
        attention_kwargs: dict | None = None,
        return_boundary_maps: Literal["last", "all"] = "last",
    ) -> DCDiTPipelineOutput | tuple:
        """Generate images, and tell which cells were tokens.

        Args:
            class_labels: an id, a name, or a list of either, one image each; None for an unconditional model.
            num_images_per_prompt: images for each label.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance w, eps = eps_null + w (eps_class - eps_null), on all channels of
                the latents; 1 is without, and an unconditional model has none.
            guidance_interval: first and last share of the steps that are guided, 0 = first step (noise), 1 = last.
                Steps outside take one pass instead of two.
            budget: share of the cells that the router would keep, in [0.01, 1], of all images or of each; several for
                a single image give one each, of the same noise. 1 is all of them.
            null_budget: that of the passes without a label (Lite-CFG of the paper, which takes 0.1), of all or of each
                image; None for that of the pass with one.
            generator: a torch generator, or one for each image, which then does not depend on the rest of the batch.
            latents: noise to start from, (B, C, H / f, W / f), standard normal; (1, ...) where several budgets share
                it.
            output_type: "pil", "np", "pt" or "latent" (scaled latents).
            return_dict: False returns the tuple (images, boundary_maps, token_counts).
            callback_on_step_end: called as callback(pipe, step, timestep, {"latents": ...}) after every step; what it
                returns under "latents" replaces them.
            callback_on_step_end_tensor_inputs: which tensors the callback receives.
            height, width: sides of the image in pixels, multiples of f; default: the size of training.
            guidance_power: exponent of MDT's power-cosine schedule of the scale; None keeps the scale constant.
            timesteps, sigmas: steps of one's own, descending, in the place of `num_inference_steps`, for schedulers
                that take them.
            eta: share of fresh noise in a step, in [0, 1], for DDIM.
            attention_kwargs: {"scale": ...} weighs adapters (LoRA) in this call.
            return_boundary_maps: "last" for the tokens of the last step, "all" for those of every step.

        Raises:
            ValueError: an argument is out of range, unknown, or contradicts another or the model.
        """
        # 1. Arguments
        call = locals()
        batch, ids, size = self.begin(call)
        device = self._execution_device

        # 2. Noise
        noise = self.prepare_latents(latents, batch.size, size, batch.generator)
        own = {"timesteps": timesteps, "sigmas": sigmas, "eta": eta}
        steps = SamplingSteps(self.scheduler, num_inference_steps, device, batch.generator, **own)

        # 3. Denoise
        budgets, null_budgets = (torch.tensor(batch.each[name], device=device) for name in ("budget", "null_budget"))
        tokens = _Tokens(batch.size, keeps_all=return_boundary_maps == "all")
        latents = self.denoise(
            steps.prior(noise),
            steps,
            {"class_labels": ids, "budget": budgets},
            call,
            null_conditions={"budget": null_budgets},
            notice=tokens.note,
        )  # (B, C, H / f, W / f)

        # 4. Decode
        images = self.decode_latents(latents, output_type)
        return self.output(DCDiTPipelineOutput(images, tokens.maps(), tokens.counts()), return_dict)

    def _each(self, call: dict[str, Any], ids: list[int] | None) -> dict[str, list]:
        if ids is None and call["null_budget"] is not None:
            raise ValueError(f"`null_budget` must be None for an unconditional model, got {call['null_budget']}.")
        each = {"budget": call["budget"], "null_budget": call["null_budget"]}
        if each["null_budget"] is None:
            each["null_budget"] = each["budget"]
        return {name: one if isinstance(one, list) else [one] for name, one in each.items()}


class _Tokens:
    """Which cells were tokens in the passes with a label, step by step."""

    def __init__(self, num_images: int, keeps_all: bool):
        self.num_images, self.keeps_all = num_images, keeps_all
        self._maps: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []

    def note(self, output: DCDiTOutput) -> None:
        kept = output.kept[: self.num_images].clone()  # a CUDA graph writes its next output to the same place
        self._maps = [*self._maps, kept] if self.keeps_all else [kept]
        self._counts.append(kept.flatten(1).sum(dim=1))

    def maps(self) -> torch.Tensor:
        return torch.stack(self._maps, dim=1) if self.keeps_all else self._maps[0]

    def counts(self) -> torch.Tensor:
        return torch.stack(self._counts, dim=1)
