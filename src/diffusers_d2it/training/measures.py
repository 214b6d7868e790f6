# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What is measured: over a data set the entropy of its regions and the scale of its latents, in a batch its grains
and tokens.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.bad_images import BadImages
from ..data.images import to_pixels
from ..data.loaders import usable_images
from ..data.source import ImageSource
from ..entropy import EntropyCalibration
from ..grains import fine_share, grain_map_to_cells
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.chunking import NATURAL
from ..models.transformer_dcdit import DCDiTOutput


logger = logging.getLogger(__name__)

T = TypeVar("T")

_COUNTED_AT_ONCE = 32  # images
_PATIENCE = 300  # updates between two warnings of few tokens


def count_entropy(
    accelerator: Accelerator,
    source: ImageSource,
    resolution: int,
    region_size: int,
    bad_images: BadImages,
    max_images: int | None = None,
) -> EntropyCalibration:
    """Distribution of the region entropy of a data set, streamed or not, each process counting its share.

    Args:
        accelerator: joins the counts of its processes.
        source: the images.
        resolution: side of the images in pixels.
        region_size: S in pixels.
        bad_images: notes what cannot be used.
        max_images: stop after so many usable images over all processes; None for all.

    Raises:
        ValueError: no image can be used; from `ImageSource.share`; from `usable_images` if very many cannot be used.
    """
    calibration = EntropyCalibration(region_size)
    share = source.share(accelerator.process_index, accelerator.num_processes)
    images = usable_images(share, resolution, bad_images)
    if max_images is not None:
        images = islice(images, max(0, -(-(max_images - accelerator.process_index) // accelerator.num_processes)))
    known = [number for number in (max_images, source.num_rows) if number is not None]
    length = -(-min(known) // accelerator.num_processes) if known else None
    progress = bar_of(images, "entropy", length, disable=not accelerator.is_main_process)
    pixels = (to_pixels(image, resolution) for _, image in progress)
    with logging_redirect_tqdm():  # images that cannot be used are named on lines of their own
        while batch := list(islice(pixels, _COUNTED_AT_ONCE)):
            calibration.update(torch.stack(batch))
    counted = torch.cat([calibration.counts, torch.tensor([calibration.num_images])]).to(accelerator.device)
    counted = accelerator.reduce(counted, "sum").cpu()
    if not counted[-1]:
        raise bad_images.none_usable(source.name)
    total = EntropyCalibration(region_size)
    total.merge(counted[:-1], int(counted[-1]))
    return total


def bar_of(items: Iterable[T], description: str, most: int | None, disable: bool = False) -> Iterator[T]:
    """Items under a bar of at most so many; where some cannot be used it ends all the same."""
    with tqdm(desc=description, total=most, disable=disable) as bar:
        for item in items:
            yield item
            bar.update()
        bar.total = bar.n
        bar.refresh()


@torch.no_grad()
def measure_latents(
    vae: DynamicAutoencoderKL, batches: Iterable[torch.Tensor], generator: torch.Generator
) -> dict[str, float]:
    """Shift and scale of sampled codes at the default ratio, and the deviation of each grain.

    Every code counts once, however many cells it is copied to.

    Args:
        vae: the autoencoder.
        batches: images (B, 3, H, W) in [-1, 1].
        generator: draws the samples of the posterior.

    Returns:
        "shift_factor" (the mean), "scaling_factor" (one over the deviation), "latent_std_grain_<i>", coarsest 0: NaN
        for a grain that no region has.
    """
    moments = torch.zeros(vae.num_grains, 3, dtype=torch.float64)  # per grain: number of values, sum, sum of squares
    for pixels in batches:
        encoded = vae.encode(pixels.to(vae.device))
        latents = encoded.latent_dist.sample(generator)
        for grain, codes in enumerate(encoded.latent_dist.layout.split(latents)):
            of_grain = grain_map_to_cells(encoded.grain_map, 2**grain) == grain
            values = codes.movedim(1, -1)[of_grain].double().cpu()
            moments[grain] += torch.tensor([values.numel(), values.sum(), values.pow(2).sum()], dtype=torch.float64)
    counts, sums, squares = moments.sum(dim=0)
    mean = sums / counts
    statistics = {"shift_factor": mean.item(), "scaling_factor": (squares / counts - mean**2).rsqrt().item()}
    for grain, (count, total, square) in enumerate(moments):
        statistics[f"latent_std_grain_{grain}"] = (square / count - (total / count) ** 2).sqrt().item()
    return statistics


def token_signals(output: DCDiTOutput, timesteps: torch.Tensor, compression: float) -> dict[str, torch.Tensor]:
    """Whether the router of DC-DiT finds its share of tokens, and where.

    Args:
        output: of a batch.
        timesteps: (B,), in 0 ... 1000.
        compression: N.

    Returns:
        "natural_share", of the cells that the router wants as tokens; "natural_drift", how far that is from 1 / N;
        "kept_share", of the cells that the budget leaves; "natural_share_noisy" and "natural_share_clean", the natural
        share of the images in the noisiest and in the cleanest third of the timesteps: NaN where none is there.
    """
    natural = (output.boundary_probability.detach() > NATURAL).float().mean(dim=(1, 2))  # (B,)
    share, third = natural.mean(), 1000 / 3

    def share_where(there: torch.Tensor) -> torch.Tensor:
        return (natural * there).sum() / there.sum()  # to pick them out would wait for the device

    return {
        "natural_share": share,
        "natural_drift": share - 1 / compression,
        "kept_share": output.kept.float().mean(),
        "natural_share_noisy": share_where(timesteps >= 2 * third),
        "natural_share_clean": share_where(timesteps < third),
    }


def warn_of_few_tokens(share: float, compression: float, step: int) -> None:
    """Say every 300 updates that the share of natural cells is still under a quarter of 1 / N.

    A new router wants hardly a token, and the loss of the share pulls them up within a hundred updates or so.
    """
    if step % _PATIENCE == 0 and share < 1 / (4 * compression):
        logger.warning(
            "update %d: the router wants %.3g of the cells as tokens, less than a quarter of 1 / %g: raise"
            " `ratio_weight`, or the learning rate.",
            *(step, share, compression),
        )


def grain_signals(
    vae: DynamicAutoencoderKL,
    grain_map: torch.Tensor,
    fine_ratio: float | None = None,
    latents: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Early signs of something wrong with the grains of a batch.

    Args:
        vae: the autoencoder that the maps are of.
        grain_map: (B, h, w) int64.
        fine_ratio: what `vae.thresholds` was asked for.
        latents: (B, C, hR, wR) of this map.

    Returns:
        "fine_share" of the regions; "fine_drift", how far that is from the ratio asked for: if it stays away from 0,
        these are not the images that the thresholds were counted on. With latents "latent_std_grain_<i>", coarsest 0:
        all cells together have about 1 once the autoencoder knows its scale. NaN where no region has that grain.
    """
    if fine_ratio is None:
        fine_ratio = vae.grain_ratios[-1]
    share = fine_share(grain_map, vae.num_grains).mean()
    signals = {"fine_share": share, "fine_drift": share - fine_ratio}
    if latents is not None:
        latents = latents.detach().float()
        grain_of_cell = grain_map_to_cells(grain_map, 2 ** (vae.num_grains - 1))
        for grain in range(vae.num_grains):
            of_grain = (grain_of_cell == grain).float().unsqueeze(1)
            num_values = of_grain.sum() * latents.shape[1]
            mean = (latents * of_grain).sum() / num_values
            variance = ((latents - mean).square() * of_grain).sum() / num_values
            signals[f"latent_std_grain_{grain}"] = variance.sqrt()
    return signals
