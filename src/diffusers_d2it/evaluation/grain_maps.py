# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How good grain maps are, and what a checkpoint does with them: shares, autocorrelation, agreement, errors by grain.

Maps are int64 tensors (N, h, w), 0 the coarsest of `num_grains` grains. A ValueError names the argument that is none.

Shapes:
    N maps or images, H W sides of an image, h w sides of a map in regions, k grains
"""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from scipy.stats import wasserstein_distance

from ..grains import check_grain_map, fine_share, tie
from ..objectives import DiffusionObjective, FlowMatchingObjective
from ..pipelines.schedulers import is_flow
from ..pixels import from_uint8, to_uint8
from .reports import ENCODING, NOISE, Drawing


TIMESTEPS = (250, 500, 750, 999)


# ---------------------------------------------------------------------------------------------------------------------
# Of maps
# ---------------------------------------------------------------------------------------------------------------------


def fine_ratio_error(predicted: torch.Tensor, real: torch.Tensor, num_grains: int) -> dict[str, float]:
    """How the fine shares of predicted maps differ from those of real maps, which may be of other images and number.

    "fine_share" and "fine_share_real" are means over the images, "std" and "std_real" their standard deviations
    (population), "error" and "std_error" the first minus the second; "wasserstein" is how far, on average, shares of
    one set must be moved to become those of the other: the size of "error" where that is a shift, else more.
    """
    check_grain_map(predicted, num_grains, "predicted")
    check_grain_map(real, num_grains, "real")
    if predicted.shape[1:] != real.shape[1:]:
        sizes = " and ".join(str(tuple(maps.shape[1:])) for maps in (predicted, real))
        raise ValueError(f"`predicted` and `real` must be maps of one size, got {sizes} regions.")
    shares, real_shares = (fine_share(maps, num_grains).double().cpu() for maps in (predicted, real))
    std, real_std = (one.std(correction=0) for one in (shares, real_shares))
    found = {
        "fine_share": shares.mean(),
        "fine_share_real": real_shares.mean(),
        "error": shares.mean() - real_shares.mean(),
        "std": std,
        "std_real": real_std,
        "std_error": std - real_std,
        "wasserstein": wasserstein_distance(shares.numpy(), real_shares.numpy()),
    }
    return {name: float(value) for name, value in found.items()}


def map_accuracy(predicted: torch.Tensor, true: torch.Tensor, num_grains: int) -> dict[str, float]:
    """Share of regions that have the same grain in both maps of a pair, beside that of chance.

    Returns:
        "accuracy"; "chance", that of independent regions with the same shares of grains: the sum over the grains of
        the share in one set times that in the other; "above_chance", (accuracy - chance) / (1 - chance), 0 for chance
        and 1 for equal maps (Cohen's kappa): NaN if both sets hold one and the same grain.

    Raises:
        ValueError: the maps are of two shapes.
    """
    check_grain_map(predicted, num_grains, "predicted")
    check_grain_map(true, num_grains, "true")
    if predicted.shape != true.shape:
        shapes = " and ".join(str(tuple(maps.shape)) for maps in (predicted, true))
        raise ValueError(f"`predicted` and `true` must have one shape, got {shapes}.")
    accuracy = (predicted == true.to(predicted.device)).double().mean().item()
    counts = (torch.bincount(maps.flatten(), minlength=num_grains).double().cpu() for maps in (predicted, true))
    shares, true_shares = (count / predicted.numel() for count in counts)
    chance = (shares * true_shares).sum().item()
    return {"accuracy": accuracy, "chance": chance, "above_chance": _above(accuracy, chance)}


def spatial_autocorrelation(maps: torch.Tensor, num_grains: int) -> dict[str, float]:
    """How often neighbouring regions have the same grain, beside chance.

    Chance is the same map with its regions in a random order: only where regions stand counts, and not how many of
    them are fine, which `fine_ratio_error` is about.

    Returns:
        "agreement", the share of pairs of neighbours, to the right and below, with one grain; "chance", the same for
        two regions of a map drawn without replacement, n_g (n_g - 1) / (n (n - 1)) summed over the grains, mean over
        the maps; "autocorrelation", (agreement - chance) / (1 - chance): 0 for independent regions, near 1 for few
        large patches, negative where equal grains avoid one another. Constant maps weigh nothing; if all are constant,
        the autocorrelation is 1 by convention.

    Raises:
        ValueError: the maps are of a single region.
    """
    check_grain_map(maps, num_grains, "maps")
    num_regions = maps.shape[1] * maps.shape[2]
    if num_regions < 2:
        raise ValueError("`maps` must have two regions at least, to have neighbours, got one.")
    right = (maps[:, :, 1:] == maps[:, :, :-1]).flatten()
    below = (maps[:, 1:] == maps[:, :-1]).flatten()
    agreement = torch.cat([right, below]).double().mean().item()
    counts = torch.stack([(maps == grain).sum(dim=(1, 2)) for grain in range(num_grains)]).double()  # (k, N)
    chance = (counts * (counts - 1)).sum(dim=0).mean().item() / (num_regions * (num_regions - 1))
    autocorrelation = _above(agreement, chance)
    return {
        "agreement": agreement,
        "chance": chance,
        "autocorrelation": 1.0 if math.isnan(autocorrelation) else autocorrelation,
    }


def _above(value: float, chance: float) -> float:
    """0 at chance, 1 at 1; NaN where chance is 1."""
    return (value - chance) / (1 - chance) if chance < 1 else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# Of a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def grain_diagnostics(
    drawing: Drawing, images: torch.Tensor, maps: dict[str, torch.Tensor], timesteps: Sequence[int] = TIMESTEPS
) -> dict:
    """Where the maps and the errors of a checkpoint come from.

    Args:
        drawing: the checkpoint, labels, seed, batch size.
        images: real ones (N, 3, H, W) uint8.
        maps: the "true" maps of the images and "predicted" ones, of `Drawing.maps`.
        timesteps: at which the models see noised maps and latents, 0 ... 999.

    Returns:
        What the functions of these names return: "fine_ratio_error" of predicted against true maps; "map_accuracy" of
        each predicted map against the true one of its class at its place; "autocorrelation" of both;
        "grain_model_accuracy"; "error_by_grain": "denoising" and "reconstruction_psnr_db".

    Raises:
        ValueError: there are other than N labels, or the pipeline has no grain model.
    """
    num_grains = drawing.pipe.transformer.config.num_grains
    return {
        "fine_ratio_error": fine_ratio_error(maps["predicted"], maps["true"], num_grains),
        "map_accuracy": map_accuracy(maps["predicted"], maps["true"], num_grains),
        "autocorrelation": {name: spatial_autocorrelation(maps[name], num_grains) for name in ("predicted", "true")},
        "grain_model_accuracy": grain_model_accuracy(drawing, maps["true"], timesteps),
        "error_by_grain": {
            "denoising": denoising_error_by_grain(drawing, images, maps["true"], timesteps),
            "reconstruction_psnr_db": reconstruction_psnr_by_grain(drawing, images, maps["true"]),
        },
    }


def grain_model_accuracy(
    drawing: Drawing, true_maps: torch.Tensor, timesteps: Sequence[int] = TIMESTEPS
) -> dict[str, dict[str, float]]:
    """How many regions of a noised real map (N, h, w) the grain model gets right: `map_accuracy` by timestep.

    Near t = 999 nothing is left of the map, and only the class tells; near t = 0 it is all there.
    """
    model, device = drawing.pipe.grain_model, drawing.pipe._execution_device
    if model is None:
        raise ValueError("`pipe` has no grain model whose accuracy could be measured.")
    scheduler = DDPMScheduler.from_config(drawing.pipe.grain_scheduler.config)  # any scheduler's, as in training
    num_grains = model.config.num_grains

    @torch.no_grad()
    def predict(numbers: slice) -> torch.Tensor:
        state, found = model.state_from_grain_map(true_maps[numbers], num_grains), []
        noise = randn_tensor(state.shape, generator=drawing.generators(NOISE, numbers))
        for timestep in timesteps:
            t = torch.full((len(state),), timestep)
            noised = scheduler.add_noise(state, noise, t).to(device, model.dtype)
            found.append(model(noised, t.to(device), drawing.class_ids(numbers)).logits.argmax(dim=1))
        return torch.stack(found, dim=1)

    found = drawing.over_images(predict, torch.stack([torch.zeros_like(true_maps)] * len(timesteps), dim=1))
    return {str(t): map_accuracy(maps, true_maps, num_grains) for t, maps in zip(timesteps, found.unbind(1))}


def denoising_error_by_grain(
    drawing: Drawing, images: torch.Tensor, grain_maps: torch.Tensor, timesteps: Sequence[int] = TIMESTEPS
) -> dict[str, list[float]]:
    """Mean squared error of what the content model predicts, noise for instance, on the cells of each grain.

    Without the weights of Eq. 11: what training logs as "mse_grain_<i>", of given timesteps.

    Args:
        drawing, images, timesteps: of `grain_diagnostics`.
        grain_maps: the maps that the images are encoded with.

    Returns:
        By timestep an error for each grain, coarsest first: NaN where no region has it.

    Raises:
        ValueError: there are other than N labels, or the scheduler predicts what no objective trains.
    """
    pipe, device = drawing.pipe, drawing.pipe._execution_device
    channels, objective = pipe.transformer.config.in_channels, _objective_of(pipe.scheduler)

    def errors(numbers: slice) -> torch.Tensor:
        grain_map, found = grain_maps[numbers].to(device), []
        posterior = pipe.vae.encode(_to_pixels(pipe, images[numbers]), grain_map).latent_dist
        latents = pipe.vae.scale_latents(posterior.sample(drawing.generators(ENCODING, numbers)).float())
        generators = drawing.generators(NOISE, numbers)
        noise = tie(randn_tensor(latents.shape, generator=generators, device=device), grain_map)
        for timestep in timesteps:
            t = torch.full((len(latents),), timestep, device=device)
            noised = objective.add_noise(latents, noise, t).to(pipe.transformer.dtype)
            prediction = pipe.transformer(noised, t, grain_map, drawing.class_ids(numbers)).sample[:, :channels]
            found.append(prediction.float() - objective.target(latents, noise, t))
        return torch.stack(found, dim=1)

    means = _squares_by_grain(drawing, errors, grain_maps, pipe.transformer.config.num_grains, len(timesteps))
    return dict(zip(map(str, timesteps), means))


def reconstruction_psnr_by_grain(drawing: Drawing, images: torch.Tensor, grain_maps: torch.Tensor) -> list[float]:
    """Peak signal-to-noise ratio of the regions of each grain: of their mean squared error, not a mean of ratios.

    Reconstructions are those of the mode of the posterior, in 8 bits. dB for each grain, coarsest first: NaN where no
    region has it, infinity for regions without an error.
    """
    pipe = drawing.pipe

    def errors(numbers: slice) -> torch.Tensor:
        pixels, grain_map = _to_pixels(pipe, images[numbers]), grain_maps[numbers].to(pipe._execution_device)
        decoded = to_uint8(pipe.vae.decode(pipe.vae.encode(pixels, grain_map).latent_dist.mode()).sample)
        return (from_uint8(decoded) - pixels.float())[:, None]

    [means] = _squares_by_grain(drawing, errors, grain_maps, pipe.vae.num_grains, 1)
    return [10 * math.log10(4 / error) if error else math.inf for error in means]


def _squares_by_grain(
    drawing: Drawing,
    errors: Callable[[slice], torch.Tensor],
    grain_maps: torch.Tensor,
    num_grains: int,
    num_kinds: int,
) -> list[list[float]]:
    """For each kind the mean square of errors (B, kinds, C, H, W) in the regions of a grain, of whichever image."""
    rows, columns = grain_maps.shape[1:]

    @torch.no_grad()
    def of_regions(numbers: slice) -> torch.Tensor:
        squares = errors(numbers).square().double()
        return squares.unflatten(4, (columns, -1)).unflatten(3, (rows, -1)).mean(dim=(2, 4, 6))

    out = torch.zeros(len(grain_maps), num_kinds, rows, columns, dtype=torch.float64)
    kinds = drawing.over_images(of_regions, out).unbind(1)
    return [[means[grain_maps == grain].mean().item() for grain in range(num_grains)] for means in kinds]


def _to_pixels(pipe, images: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, 3, H, W) as the autoencoder reads them, where it is."""
    return from_uint8(images.to(pipe._execution_device)).to(pipe.vae.dtype)


def _objective_of(scheduler) -> DiffusionObjective | FlowMatchingObjective:
    """The objective that a content model was trained with, from the scheduler it is sampled with."""
    prediction_type = scheduler.config.get("prediction_type")
    if is_flow(scheduler):
        return FlowMatchingObjective()
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"`pipe.scheduler` must predict 'epsilon', 'v_prediction' or a flow, got {prediction_type!r}: what the"
            " content model was trained to predict is not known."
        )
    objective = DiffusionObjective(prediction_type)
    objective.scheduler = DDPMScheduler.from_config(scheduler.config, variance_type="fixed_small")  # with its betas
    return objective
