# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint does with grains: Table 5 of arXiv:2504.09454, and the diagnostics that explain it.

    images, labels                    real images, uint8 (N, 3, H, W), and their classes (N,)
    maps = maps_of_sources(pipe, images, labels, sampling)
    rows = table_5(pipe, maps, labels, reference, features, sampling)
    figures = grain_diagnostics(pipe, images, labels, maps, sampling)

Shapes:
    N images, H W their sides, h w sides of a map in regions, C latent channels, R cells along a side of a region
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor

from ..grains import fine_share, tie
from ..objectives import DiffusionObjective, FlowMatchingObjective
from ..pipelines.checks import FLOW_MATCHING_SCHEDULERS
from ..pipelines.pipeline_d2it import D2iTPipeline
from ..pixels import to_uint8
from .evaluate import Evaluator
from .features import FeatureExtractor
from .grain_maps import (
    fine_ratio_error,
    map_accuracy,
    mean_by_grain,
    psnr_of_error,
    region_means,
    spatial_coherence,
)
from .images import ImageSet
from .map_sources import (
    ENCODING,
    MAP_SOURCES,
    NOISE,
    Sampling,
    check_labels,
    draw_grain_maps,
    image_generators,
    over_images,
    sample_images,
    to_pixels,
    true_grain_maps,
)
from .report_scores import score


TIMESTEPS = (250, 500, 750, 999)


def maps_of_sources(
    pipe: D2iTPipeline,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    sampling: Sampling,
    sources: Sequence[str] = MAP_SOURCES,
    accelerator: Accelerator | None = None,
) -> dict[str, torch.Tensor]:
    """The maps of Table 5: for each source a map for each image, (N, h, w) int64.

    Args:
        pipe: the pipeline.
        images: real images (N, 3, H, W) uint8, whose maps are the true ones.
        labels: their classes (N,) int64, which the others are drawn for; None for an unconditional model.
        sampling: seed, batch size, steps of the grain model.
        sources: among `MAP_SOURCES`.
        accelerator: joins the processes.

    Raises:
        ValueError: what `true_grain_maps` and `draw_grain_maps` raise.
    """
    true_maps = true_grain_maps(pipe, images, sampling.batch_size)
    return {source: draw_grain_maps(pipe, source, true_maps, labels, sampling, accelerator) for source in sources}


# ---------------------------------------------------------------------------------------------------------------------
# Table 5
# ---------------------------------------------------------------------------------------------------------------------


def table_5(
    pipe: D2iTPipeline,
    maps: dict[str, torch.Tensor],
    labels: torch.Tensor | None,
    reference: ImageSet | str | Path,
    features: FeatureExtractor,
    sampling: Sampling,
    metrics: Sequence[str] = ("fid",),
    accelerator: Accelerator | None = None,
    protocol: dict | None = None,
    progress: bool = False,
) -> list[dict]:
    """How good images are by where their maps come from: the same labels and the same noise in every row.

    Args:
        pipe: the pipeline.
        maps: the maps of each row, (N, h, w) int64, by the name of the row, such as those of `maps_of_sources`.
        labels: (N,) int64, the same in every row; None for an unconditional model.
        reference: what the images are compared with. If the real images that the maps were taken from are among them,
            the true maps are at an advantage.
        features: in which they are compared.
        sampling: how the images are drawn.
        metrics: of `evaluate`.
        accelerator: joins the processes.
        protocol: what else the protocols of the results say of the samples, such as the checkpoint.
        progress: show a bar for each row.

    Returns:
        For each row: "map", its name; "results" of `score`;
        "fine_share" and "coherence" of its maps; "agreement", `map_accuracy` of the maps by entropy of the images
        that came out against the maps they were drawn with.

    Raises:
        ValueError: labels are missing, superfluous or not as many as maps; or what `evaluate` and the pipeline raise.
    """
    num_grains = pipe.transformer.config.num_grains
    rows = []
    reading = {"batch_size": sampling.batch_size, "accelerator": accelerator, "seed": sampling.seed}
    evaluator = Evaluator(reference, metrics, features, **reading)
    for source, asked in maps.items():
        description = f"{source} maps" if progress else None
        images = sample_images(pipe, asked, labels, sampling, accelerator, description)
        drawn = {"name": f"samples with {source} maps", **sampling.describe(), "grain_map": source}
        measured = true_grain_maps(pipe, images, sampling.batch_size)
        rows.append(
            {
                "map": source,
                "results": score(images, drawn | (protocol or {}), evaluator),
                "fine_share": fine_share(asked, num_grains).mean().item(),
                "coherence": spatial_coherence(asked, num_grains)["coherence"],
                "agreement": map_accuracy(measured, asked, num_grains),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics
# ---------------------------------------------------------------------------------------------------------------------


def grain_diagnostics(
    pipe: D2iTPipeline,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    maps: dict[str, torch.Tensor],
    sampling: Sampling,
    timesteps: Sequence[int] = TIMESTEPS,
    accelerator: Accelerator | None = None,
) -> dict:
    """Where the maps and the errors of a checkpoint come from.

    Args:
        pipe: the pipeline.
        images: real images (N, 3, H, W) uint8.
        labels: their classes (N,) int64; None for an unconditional model.
        maps: the "true" maps of the images and "predicted" ones, of `maps_of_sources`.
        sampling: seed and batch size.
        timesteps: at which the models see noised maps and latents, 0 ... 999.
        accelerator: joins the processes.

    Returns:
        "fine_ratio_error" of predicted against true maps; "map_accuracy" of each predicted map against the true one of
        its class that stands at its place; "coherence" of both; "grain_model_accuracy" by timestep;
        "error_by_grain": the mean squared error of the content model by timestep and grain, "denoising", and
        "reconstruction_psnr_db" by grain, each with one value for a grain, coarsest first.

    Raises:
        ValueError: labels are missing, superfluous or not as many as images, or the pipeline has no grain model.
    """
    num_grains = pipe.transformer.config.num_grains
    common = (labels, sampling, timesteps, accelerator)
    return {
        "fine_ratio_error": fine_ratio_error(maps["predicted"], maps["true"], num_grains),
        "map_accuracy": map_accuracy(maps["predicted"], maps["true"], num_grains),
        "coherence": {name: spatial_coherence(maps[name], num_grains) for name in ("predicted", "true")},
        "grain_model_accuracy": grain_model_accuracy(pipe, maps["true"], *common),
        "error_by_grain": {
            "denoising": denoising_error_by_grain(pipe, images, maps["true"], *common),
            "reconstruction_psnr_db": reconstruction_psnr_by_grain(
                pipe, images, maps["true"], sampling.batch_size, accelerator
            ),
        },
    }


def grain_model_accuracy(
    pipe: D2iTPipeline,
    true_maps: torch.Tensor,
    labels: torch.Tensor | None,
    sampling: Sampling,
    timesteps: Sequence[int] = TIMESTEPS,
    accelerator: Accelerator | None = None,
) -> dict[str, dict[str, float]]:
    """How many regions of a noised real map the grain model gets right: `map_accuracy` of its logits by timestep.

    Near t = 999 nothing is left of the map, and only the class tells; near t = 0 it is all there.

    Args:
        pipe: the pipeline.
        true_maps: (N, h, w) int64.
        labels: (N,) int64; None for an unconditional model.
        sampling: seed and batch size.
        timesteps: 0 ... 999.
        accelerator: joins the processes.

    Raises:
        ValueError: there is no grain model, or labels are missing, superfluous or not as many as maps.
    """
    check_labels(pipe, labels, len(true_maps))
    if pipe.grain_model is None:
        raise ValueError("`pipe` has no grain model whose accuracy could be measured.")
    model, device = pipe.grain_model, pipe._execution_device
    scheduler = DDPMScheduler.from_config(pipe.grain_scheduler.config)  # any scheduler's, as it is in training

    @torch.no_grad()
    def predict(images: slice, timestep: int) -> torch.Tensor:
        state = model.state_from_grain_map(true_maps[images], model.config.num_grains)
        noise = randn_tensor(state.shape, generator=image_generators(sampling.seed, NOISE, images))
        t = torch.full((len(state),), timestep)
        noised = scheduler.add_noise(state, noise, t).to(device, model.dtype)
        return model(noised, t.to(device), _ids(labels, images, device)).logits.argmax(dim=1)

    result = {}
    for timestep in timesteps:
        predicted = over_images(
            lambda images, t=timestep: predict(images, t),
            torch.zeros_like(true_maps),
            sampling.batch_size,
            accelerator,
        )
        result[str(timestep)] = map_accuracy(predicted, true_maps, model.config.num_grains)
    return result


def denoising_error_by_grain(
    pipe: D2iTPipeline,
    images: torch.Tensor,
    grain_maps: torch.Tensor,
    labels: torch.Tensor | None,
    sampling: Sampling,
    timesteps: Sequence[int] = TIMESTEPS,
    accelerator: Accelerator | None = None,
) -> dict[str, list[float]]:
    """Mean squared error of what the content model predicts, noise for instance, on the cells of each grain.

    Without the weights of Eq. 11: the figures that training logs as "mse_grain_<i>", of given timesteps.

    Args:
        pipe: the pipeline.
        images: (N, 3, H, W) uint8.
        grain_maps: (N, h, w) int64, the maps that the images are encoded with.
        labels: (N,) int64; None for an unconditional model.
        sampling: seed and batch size.
        timesteps: 0 ... 999.
        accelerator: joins the processes.

    Returns:
        By timestep an error for each grain, coarsest first: NaN where no region has it.

    Raises:
        ValueError: labels are missing, superfluous or not as many as images, or the scheduler predicts what no
            objective trains.
    """
    check_labels(pipe, labels, len(images))
    device, channels = pipe._execution_device, pipe.transformer.config.in_channels
    objective = _objective_of(pipe.scheduler)

    @torch.no_grad()
    def errors(numbers: slice, timestep: int) -> torch.Tensor:
        grain_map = grain_maps[numbers].to(device)
        posterior = pipe.vae.encode(to_pixels(pipe, images[numbers]), grain_map).latent_dist
        latents = posterior.sample(image_generators(sampling.seed, ENCODING, numbers))
        latents = pipe.vae.scale_latents(latents.float())
        generators = image_generators(sampling.seed, NOISE, numbers)
        noise = tie(randn_tensor(latents.shape, generator=generators, device=device), grain_map)
        t = torch.full((len(latents),), timestep, device=device)
        noised = objective.add_noise(latents, noise, t)
        ids = _ids(labels, numbers, device)
        prediction = pipe.transformer(noised.to(pipe.transformer.dtype), t, grain_map, ids).sample[:, :channels]
        return region_means((prediction.float() - objective.target(latents, noise, t)).square(), grain_map)

    result = {}
    for timestep in timesteps:
        of_regions = over_images(
            lambda numbers, t=timestep: errors(numbers, t),
            torch.zeros(grain_maps.shape, dtype=torch.float64),
            sampling.batch_size,
            accelerator,
        )
        result[str(timestep)] = mean_by_grain(of_regions, grain_maps, pipe.transformer.config.num_grains)
    return result


def reconstruction_psnr_by_grain(
    pipe: D2iTPipeline,
    images: torch.Tensor,
    grain_maps: torch.Tensor,
    batch_size: int = 32,
    accelerator: Accelerator | None = None,
) -> list[float]:
    """`psnr_by_grain` of reconstructions from the mode of the posterior.

    Args:
        pipe: the pipeline.
        images: (N, 3, H, W) uint8.
        grain_maps: (N, h, w) int64, the maps that they are encoded with.
        batch_size: images at once.
        accelerator: joins the processes.

    Returns:
        dB for each grain, coarsest first: NaN where no region has it.
    """

    @torch.no_grad()
    def errors(numbers: slice) -> torch.Tensor:
        pixels, grain_map = to_pixels(pipe, images[numbers]), grain_maps[numbers].to(pipe._execution_device)
        decoded = to_uint8(pipe.vae.decode(pipe.vae.encode(pixels, grain_map).latent_dist.mode()).sample)
        return region_means((decoded.float() / 127.5 - 1 - pixels.float()).square(), grain_map)

    of_regions = torch.zeros(grain_maps.shape, dtype=torch.float64)
    of_regions = over_images(errors, of_regions, batch_size, accelerator)
    return [psnr_of_error(error) for error in mean_by_grain(of_regions, grain_maps, pipe.vae.num_grains)]


def _ids(labels: torch.Tensor | None, images: slice, device: torch.device) -> torch.Tensor | None:
    return None if labels is None else labels[images].to(device)


def _objective_of(scheduler) -> DiffusionObjective | FlowMatchingObjective:
    """The objective that a content model was trained with, from the scheduler it is sampled with."""
    prediction_type = scheduler.config.get("prediction_type")
    if isinstance(scheduler, FLOW_MATCHING_SCHEDULERS) or prediction_type == "flow_prediction":
        return FlowMatchingObjective()
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"`pipe.scheduler` must predict 'epsilon', 'v_prediction' or a flow, got {prediction_type!r}: what the"
            " content model was trained to predict is not known."
        )
    objective = DiffusionObjective(prediction_type)
    objective.scheduler = DDPMScheduler.from_config(scheduler.config, variance_type="fixed_small")  # with its betas
    return objective


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------


def report_text(rows: list[dict], real: list[dict], diagnostics: dict) -> str:
    """The rows of `table_5` as a Markdown table, and what `grain_diagnostics` found below it.

    Args:
        rows: of `table_5`.
        real: `score` of real images in the place of samples: no map makes them better.
        diagnostics: of `grain_diagnostics`.
    """
    lines = [["map", *(result["metric"] for result in real)]]
    lines[0] += ["fine share", "coherence", "map of the image", "by chance"]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in rows:
        agreement = row["agreement"]["accuracy"], row["agreement"]["chance"]
        figures = [f"{result['value']:.4g}" for result in row["results"]]
        figures += [f"{value:.3f}" for value in (row["fine_share"], row["coherence"], *agreement)]
        lines.append([row["map"], *figures])
    lines.append(["real images", *(f"{result['value']:.4g}" for result in real), *[""] * 4])
    text = ["| " + " | ".join(cells) + " |" for cells in lines]

    share, coherence = diagnostics["fine_ratio_error"], diagnostics["coherence"]
    text += [
        "",
        "map of the image: share of regions whose grain, by the entropy of the image, is that of the map asked for",
        f"fine share of an image: predicted {share['fine_share']:.3f} +- {share['std']:.3f}, true"
        f" {share['fine_share_real']:.3f} +- {share['std_real']:.3f}, Wasserstein distance {share['wasserstein']:.3f}",
        f"predicted maps against true ones of the same class: accuracy {diagnostics['map_accuracy']['accuracy']:.3f},"
        f" chance {diagnostics['map_accuracy']['chance']:.3f}",
        f"coherence: predicted {coherence['predicted']['coherence']:.3f}, true {coherence['true']['coherence']:.3f}",
        "accuracy of the grain model on noised true maps: "
        + ", ".join(
            f"t={t} {found['accuracy']:.3f} (chance {found['chance']:.3f})"
            for t, found in diagnostics["grain_model_accuracy"].items()
        ),
        "denoising error by grain, coarsest first: "
        + ", ".join(
            f"t={t} " + " / ".join(f"{error:.4f}" for error in errors)
            for t, errors in diagnostics["error_by_grain"]["denoising"].items()
        ),
        "PSNR of reconstructions by grain, dB: "
        + " / ".join(f"{value:.2f}" for value in diagnostics["error_by_grain"]["reconstruction_psnr_db"]),
    ]
    return "\n".join(text)
