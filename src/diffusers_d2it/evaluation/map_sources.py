# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Grain maps and images of one checkpoint, drawn so that only what is compared differs.

Everything random belongs to an image: its noise is a function of the seed and of its number, whatever the map, the
batch size and the number of processes. So two rows of a table differ in their maps and in nothing else.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from ..grains import fine_share
from ..pipelines.grain_maps import random_grain_map
from ..pipelines.pipeline_d2it import D2iTPipeline


MAP_SOURCES = ("true", "predicted", "random", "coarse", "fine")

_REPORTS = 5  # keeps the seeds apart from those of other sets of samples
# What a generator is for: other numbers, other noise
_LATENTS, _MAP, _SOLVER, NOISE, ENCODING = range(5)


@dataclass(frozen=True)
class Sampling:
    """How the images of a report are drawn: the same for all that it compares.

    Args:
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 is without, as in Table 5.
        grain_num_inference_steps: steps of the grain model.
        batch_size: images in a forward pass, in measurements without sampling too.
        seed: with the number of an image it fixes all that is random.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    grain_num_inference_steps: int = 10
    batch_size: int = 32
    seed: int = 0

    def describe(self) -> dict[str, int | float]:
        """The part of a protocol that this decides: all but the batch size."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


def image_generators(seed: int, purpose: int, images: slice) -> list[torch.Generator]:
    """A generator for each image, on the CPU, so that every device draws the same; no two images have the same one."""
    first = int(np.random.SeedSequence(seed, spawn_key=(_REPORTS, purpose)).generate_state(1)[0])
    # A generator reads no more than 32 bits of a seed
    seeds = ((first + image) % 2**32 for image in range(images.start, images.stop))
    return [torch.Generator().manual_seed(one) for one in seeds]


def over_images(
    function: Callable[[slice], torch.Tensor],
    out: torch.Tensor,
    batch_size: int,
    accelerator: Accelerator | None = None,
    description: str | None = None,
) -> torch.Tensor:
    """Compute something for every image, in batches that the processes share; all processes get all of it.

    Args:
        function: from the numbers of a batch of images to its part of `out`.
        out: zeros (N, ...), on the CPU; filled here.
        batch_size: images of a call, fewer in the last one. The batches do not depend on the number of processes.
        accelerator: joins the processes; None without others.
        description: of the progress bar; None without one.
    """
    batches = [slice(start, min(start + batch_size, len(out))) for start in range(0, len(out), batch_size)]
    share = batches if accelerator is None else batches[accelerator.process_index :: accelerator.num_processes]
    hidden = description is None or (accelerator is not None and not accelerator.is_main_process)
    for images in tqdm(share, desc=description, disable=hidden):
        out[images] = function(images).to(out.device, out.dtype)
    if accelerator is not None and accelerator.num_processes > 1:
        for part in out.split(256):  # each image is zero on all processes but one
            part.copy_(accelerator.reduce(part.to(accelerator.device), "sum"))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------------------------


def true_grain_maps(pipe: D2iTPipeline, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """The maps of images by their entropy, at the ratio of the autoencoder: (N, 3, H, W) uint8 -> (N, h, w) int64.

    Raises:
        ValueError: the images are not uint8 (N, 3, H, W) with sides that are multiples of a region, or the autoencoder
            has not been calibrated.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"`images` must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}.")
    return torch.cat([pipe.grain_map_from_image(batch / 255).cpu() for batch in images.split(batch_size)])


def draw_grain_maps(
    pipe: D2iTPipeline,
    source: str,
    true_maps: torch.Tensor,
    labels: torch.Tensor | None,
    sampling: Sampling,
    accelerator: Accelerator | None = None,
    fine_ratio: float | None = None,
) -> torch.Tensor:
    """A map for every label, from one of `MAP_SOURCES`.

    Args:
        pipe: the pipeline.
        source: "true" gives `true_maps` back; "predicted" asks the grain model for maps of the labels; "random" draws
            independent regions, fine with a probability that is the mean fine share of the true maps; "coarse" and
            "fine" are uniform.
        true_maps: (N, h, w) int64, of real images with these labels.
        labels: (N,) int64, or None for an unconditional model.
        sampling: seed, batch size, steps of the grain model.
        accelerator: joins the processes.
        fine_ratio: for "predicted", the share of fine regions of every map; None leaves it to the model.

    Returns:
        (N, h, w) int64.

    Raises:
        ValueError: the source is unknown, there is no grain model, or labels are missing, superfluous or not as many
            as maps.
    """
    check_labels(pipe, labels, len(true_maps))
    num_grains = pipe.transformer.config.num_grains
    if source == "true":
        return true_maps
    if source in ("coarse", "fine"):
        return torch.full_like(true_maps, 0 if source == "coarse" else num_grains - 1)
    if source == "random":
        ratio = fine_share(true_maps, num_grains).mean().item()
        generators = image_generators(sampling.seed, _MAP, slice(0, len(true_maps)))
        return random_grain_map(true_maps.shape, num_grains, ratio, generators, torch.device("cpu"))
    if source != "predicted":
        raise ValueError(f"`source` must be one of {', '.join(MAP_SOURCES)}, got {source!r}.")
    if pipe.grain_model is None:
        raise ValueError("`pipe` has no grain model: maps can be true, random, coarse or fine, not predicted.")

    def predict(images: slice) -> torch.Tensor:
        ids = None if labels is None else labels[images].to(pipe._execution_device)
        return pipe.prepare_grain_map(
            None,
            fine_ratio,
            ids,
            images.stop - images.start,
            tuple(true_maps.shape[1:]),
            sampling.grain_num_inference_steps,
            1.0,
            image_generators(sampling.seed, _MAP, images),
        )

    return over_images(predict, torch.zeros_like(true_maps), sampling.batch_size, accelerator)


def check_labels(pipe: D2iTPipeline, labels: torch.Tensor | None, num_images: int) -> None:
    """Raise a ValueError unless there is a label for each image, and none for an unconditional model."""
    if (labels is None) != (pipe.transformer.config.num_classes is None):
        asked = "has classes and needs `labels`" if labels is None else "is unconditional: `labels` must be None"
        raise ValueError(f"the model {asked}.")
    if labels is not None and labels.shape != (num_images,):
        raise ValueError(f"`labels` must be one for each of {num_images} images, got {tuple(labels.shape)}.")


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def sample_images(
    pipe: D2iTPipeline,
    maps: torch.Tensor,
    labels: torch.Tensor | None,
    sampling: Sampling,
    accelerator: Accelerator | None = None,
    description: str | None = None,
) -> torch.Tensor:
    """An image for every map and label, (N, 3, H, W) uint8: the same noise for any maps.

    Args:
        pipe: the pipeline.
        maps: (N, h, w) int64.
        labels: (N,) int64, or None for an unconditional model.
        sampling: how.
        accelerator: joins the processes.
        description: of the progress bar; None without one.

    Raises:
        ValueError: labels are missing, superfluous or not as many as maps, or what the pipeline raises.
    """
    check_labels(pipe, labels, len(maps))
    sides = [side * pipe.vae.region_size for side in maps.shape[1:]]
    out = torch.zeros(len(maps), 3, *sides, dtype=torch.uint8)

    def sample(images: slice) -> torch.Tensor:
        return sample_batch(pipe, images, maps.shape[1:], labels, sampling, grain_map=maps[images])[0]

    return over_images(sample, out, sampling.batch_size, accelerator, description)


def sample_batch(
    pipe: D2iTPipeline,
    images: slice,
    size: tuple[int, int],
    labels: torch.Tensor | None,
    sampling: Sampling,
    **arguments,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some of the images of a set, in one call of the pipeline.

    Args:
        pipe: the pipeline.
        images: their numbers.
        size: (h, w), sides of their maps.
        labels: (N,) int64 of the whole set, or None.
        sampling: how.
        **arguments: what else the pipeline is given, such as `grain_map` or `fine_ratio`.

    Returns:
        The images (B, 3, H, W) uint8, and their maps (B, h, w).
    """
    num_images, cells = images.stop - images.start, pipe.transformer.patch_size
    shape = (num_images, pipe.transformer.config.in_channels, size[0] * cells, size[1] * cells)
    output = pipe(
        None if labels is None else labels[images].tolist(),
        num_images_per_prompt=num_images if labels is None else 1,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        grain_num_inference_steps=sampling.grain_num_inference_steps,
        generator=image_generators(sampling.seed, _SOLVER, images),
        latents=randn_tensor(shape, generator=image_generators(sampling.seed, _LATENTS, images)),
        output_type="pt",
        **arguments,
    )
    return (output.images * 255).round().to(torch.uint8), output.grain_maps


def to_pixels(pipe: D2iTPipeline, images: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, 3, H, W) as the autoencoder reads them, where it is."""
    return (images.to(pipe._execution_device) / 127.5 - 1).to(pipe.vae.dtype)
