# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Images and grain maps of one checkpoint, drawn so that only what is compared differs.

Everything random belongs to an image: its noise is a function of the seed and of its number, whatever the map, the
batch size and the number of processes. So two rows of a table differ in their maps and in nothing else.

Shapes:
    N images, H W their sides in pixels, h w sides of a map in regions
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ..draws import generators_of
from ..files import place_of
from ..grains import fine_share
from ..pipelines.grain_sampling import random_grain_map, sample_grain_map
from ..pipelines.pipeline_d2it import D2iTPipeline
from ..pipelines.pipeline_dcdit import DCDiTPipeline
from ..pixels import check_uint8, unit_to_uint8


MAP_SOURCES = ("true", "predicted", "random", "coarse", "fine")

_REPORTS = 5  # keeps the seeds apart from those of other sets of samples
# What a generator is for: other numbers, other noise
_LATENTS, _MAP, _SOLVER, NOISE, ENCODING = range(5)


@dataclass(frozen=True)
class Drawing:
    """How a checkpoint draws all that is compared.

    Raises:
        ValueError: labels are missing, or superfluous.
    """

    pipe: D2iTPipeline | DCDiTPipeline
    labels: torch.Tensor | None = None  # classes (N,) int64 of the images; None for an unconditional model
    num_inference_steps: int = 20
    guidance_scale: float = 1.0  # 1 is without, as in Table 5
    grain_num_inference_steps: int = 10  # of D2iT alone
    batch_size: int = 32  # images in a forward pass, in measurements without sampling too
    seed: int = 0  # with the number of an image it fixes all that is random
    accelerator: Accelerator | None = None  # its processes share the batches
    checkpoint: Mapping[str, Any] = field(default_factory=dict)  # what protocols say of it

    def __post_init__(self):
        if (self.labels is None) != (self.pipe.transformer.config.num_classes is None):
            asked = "given, as the model has classes" if self.labels is None else "None, as the model has no classes"
            raise ValueError(f"`labels` must be {asked}.")

    def describe(self) -> dict[str, Any]:
        """The part of a protocol that this decides."""
        names = ("num_inference_steps", "guidance_scale", "seed")
        return {**self.checkpoint, **{name: getattr(self, name) for name in names}, **self._of_maps}

    @property
    def _of_maps(self) -> dict[str, int]:
        """What a pipeline that draws grain maps is told beside."""
        draws_maps = hasattr(self.pipe, "grain_model")
        return {"grain_num_inference_steps": self.grain_num_inference_steps} if draws_maps else {}

    def generators(self, purpose: int, images: slice) -> list[torch.Generator]:
        """`generators_of` these images: other noise for another purpose."""
        return generators_of(range(images.start, images.stop), self.seed, _REPORTS, purpose)

    def class_ids(self, images: slice) -> torch.Tensor | None:
        """The labels of some images, on the device of the pipeline."""
        return None if self.labels is None else self.labels[images].to(self.pipe._execution_device)

    def over_images(
        self, function: Callable[[slice], torch.Tensor], out: torch.Tensor, description: str | None = None
    ) -> torch.Tensor:
        """Compute something for every image, in batches that the processes share; all processes get all of it.

        Args:
            function: from the numbers of a batch of images to its part of `out`.
            out: zeros (N, ...), on the CPU; filled here.
            description: of the progress bar; None without one.

        Raises:
            ValueError: there are other than N labels.
        """
        self._check_number(len(out))
        process, count = place_of(self.accelerator)
        starts = range(process * self.batch_size, len(out), count * self.batch_size)
        for start in tqdm(starts, desc=description, disable=description is None or process > 0):
            images = slice(start, min(start + self.batch_size, len(out)))
            out[images] = function(images).to(out.device, out.dtype)
        if count > 1:
            for part in out.split(256):  # each image is zero on all processes but one
                part.copy_(self.accelerator.reduce(part.to(self.accelerator.device), "sum"))
        return out

    def call(self, images: slice, size: tuple[int, int], **arguments: Any) -> Any:
        """Draw images of these numbers and size (H, W) in one call; the pipeline's output, images in [0, 1].

        `arguments` are what else the pipeline gets, such as `fine_ratio`; a tensor has a part for each of N images.
        """
        mine = {name: value[images] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        num_images, factor = images.stop - images.start, self.pipe.vae_scale_factor
        shape = (num_images, self.pipe.transformer.config.in_channels, size[0] // factor, size[1] // factor)
        return self.pipe(
            None if self.labels is None else self.labels[images].tolist(),
            num_images_per_prompt=num_images if self.labels is None else 1,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            guidance_interval=(0.0, 1.0),
            generator=self.generators(_SOLVER, images),
            latents=randn_tensor(shape, generator=self.generators(_LATENTS, images)),
            **({"output_type": "pt"} | self._of_maps | mine),
        )

    def images(self, maps: torch.Tensor) -> torch.Tensor:
        """An image for every map, (N, h, w) int64 -> (N, 3, H, W) uint8: the same noise for any maps."""
        size = tuple(side * self.pipe.vae.region_size for side in maps.shape[1:])
        out = torch.zeros(len(maps), 3, *size, dtype=torch.uint8)
        return self.over_images(lambda images: unit_to_uint8(self.call(images, size, grain_map=maps).images), out)

    def true_maps(self, images: torch.Tensor) -> torch.Tensor:
        """The maps of images by their entropy, at the ratio of the autoencoder: uint8 (N, 3, H, W) -> int64 (N, h, w).

        Raises:
            ValueError: the images are not uint8 (N, 3, H, W) with sides that are multiples of a region, or the
                autoencoder has not been calibrated.
        """
        check_uint8(images)
        batches, size = images.split(self.batch_size), tuple(images.shape[-2:])
        return torch.cat([self.pipe.grain_map_from_image(batch / 255, None, *size).cpu() for batch in batches])

    def maps(self, source: str, true_maps: torch.Tensor) -> torch.Tensor:
        """A map for every image, from one of `MAP_SOURCES`.

        Args:
            source: "true" gives `true_maps` back; "predicted" asks the grain model for maps of the labels; "random"
                draws independent regions, fine with a probability that is the mean fine share of the true maps;
                "coarse" and "fine" are uniform.
            true_maps: (N, h, w) int64, of real images with these labels.

        Raises:
            ValueError: the source is unknown, there is no grain model, or there are other than N labels.
        """
        self._check_number(len(true_maps))
        num_grains = self.pipe.transformer.config.num_grains
        if source == "true":
            return true_maps
        if source in ("coarse", "fine"):
            return torch.full_like(true_maps, 0 if source == "coarse" else num_grains - 1)
        if source == "random":
            ratio = fine_share(true_maps, num_grains).mean().item()
            generators = self.generators(_MAP, slice(0, len(true_maps)))
            return random_grain_map(true_maps.shape, num_grains, ratio, generators, torch.device("cpu"))
        if source != "predicted":
            raise ValueError(f"`source` must be one of {', '.join(MAP_SOURCES)}, got {source!r}.")
        if self.pipe.grain_model is None:
            raise ValueError("`pipe` has no grain model: maps can be true, random, coarse or fine, not predicted.")

        def predict(images: slice) -> torch.Tensor:
            ids, number, size = self.class_ids(images), images.stop - images.start, tuple(true_maps.shape[1:])
            steps, generators = self.grain_num_inference_steps, self.generators(_MAP, images)
            model, scheduler, device = self.pipe.grain_model, self.pipe.grain_scheduler, self.pipe._execution_device
            return sample_grain_map(model, scheduler, size, ids, number, steps, generator=generators, device=device)

        return self.over_images(predict, torch.zeros_like(true_maps))

    def _check_number(self, num_images: int) -> None:
        if self.labels is not None and self.labels.shape != (num_images,):
            raise ValueError(f"`labels` must be one for each of {num_images} images, got {tuple(self.labels.shape)}.")
