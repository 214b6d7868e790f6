# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Diagnostics of a checkpoint: against other ways to the same figures, and where they are known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from metric_inputs import refused
from photographs import load_photographs

from diffusers_d2it import D2iTPipeline, bundled_checkpoint
from diffusers_d2it.evaluation import Drawing, denoising_error_by_grain, grain_diagnostics, spatial_coherence
from diffusers_d2it.evaluation.drawing import ENCODING, NOISE
from diffusers_d2it.evaluation.grain_maps import grain_model_accuracy, reconstruction_psnr_by_grain
from diffusers_d2it.grains import GrainLayout, tie
from diffusers_d2it.losses import grain_loss, multi_grained_loss
from diffusers_d2it.objectives import make_objective
from diffusers_d2it.pixels import to_uint8


LABELS = torch.arange(8)
ALL = slice(0, 8)


def drawing_of(pipe: D2iTPipeline, labels: torch.Tensor = LABELS) -> Drawing:
    return Drawing(pipe, labels, num_inference_steps=2, grain_num_inference_steps=3, batch_size=3)


@pytest.fixture(scope="module")
def drawing(make_pipeline) -> Drawing:
    return drawing_of(make_pipeline())


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Eight photographs, uint8 (8, 3, 32, 32)."""
    return to_uint8(load_photographs(32))


@pytest.fixture(scope="module")
def true_maps(drawing, images) -> torch.Tensor:
    return drawing.true_maps(images)


def test_a_grain_model_that_knows_nothing_says_coarse_everywhere(make_pipeline, make_grain_model, true_maps):
    pipe = make_pipeline(grain_model=make_grain_model(randomize=False))  # its logits are zero
    found = grain_model_accuracy(drawing_of(pipe), true_maps, timesteps=(0, 999))
    coarse = (true_maps == 0).double().mean().item()
    expected = {"accuracy": coarse, "chance": coarse, "above_chance": 0}
    assert found == {"0": pytest.approx(expected), "999": pytest.approx(expected)}


def test_accuracy_of_the_bundled_grain_model_falls_with_noise():
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    maps = pipe.grain_map_from_image((load_photographs(64) + 1) / 2)
    labels = torch.tensor([207, 291, 967, 779, 970, 973, 963, 817])
    drawing = drawing_of(pipe, labels)
    found = grain_model_accuracy(drawing, maps)
    assert list(found) == ["250", "500", "750", "999"]
    accuracies = [one["accuracy"] for one in found.values()]
    assert accuracies[0] > 0.9 > accuracies[1] > accuracies[2]
    # One timestep by hand, in another batch size
    state = pipe.grain_model.state_from_grain_map(maps, 2)
    noise = randn_tensor(state.shape, generator=drawing.generators(NOISE, ALL))
    noised = pipe.grain_scheduler.add_noise(state, noise, torch.full((8,), 500))
    with torch.no_grad():
        logits = pipe.grain_model(noised, 500, labels).logits
    assert accuracies[1] == pytest.approx(grain_loss(logits, maps)["accuracy"].item())


SCHEDULERS = {
    "epsilon": DDIMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False),
    "v_prediction": UniPCMultistepScheduler(beta_start=1e-4, beta_end=2e-2, prediction_type="v_prediction"),
    "flow_matching": FlowMatchEulerDiscreteScheduler(),
    "epsilon, other betas": DDIMScheduler(beta_start=1e-3, beta_end=1e-2, clip_sample=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_grains", [2, 3])
def test_denoising_errors_are_those_that_training_logs(make_pipeline, name, num_grains):
    pipe = make_pipeline(num_grains=num_grains, scheduler=SCHEDULERS[name])
    images, drawing = to_uint8(load_photographs(64 if num_grains == 3 else 32)), drawing_of(pipe)
    grain_maps = pipe.grain_map_from_image(images / 255, fine_ratio=0.4)
    found = denoising_error_by_grain(drawing, images, grain_maps, timesteps=(0, 400))

    objective, timesteps = make_objective(name.split(",")[0]), torch.full((8,), 400)
    if name.endswith("other betas"):
        objective.scheduler = pipe.scheduler
    with torch.no_grad():
        posterior = pipe.vae.encode(images / 127.5 - 1, grain_maps).latent_dist
        latents = pipe.vae.scale_latents(posterior.sample(drawing.generators(ENCODING, ALL)))
        noise = tie(randn_tensor(latents.shape, generator=drawing.generators(NOISE, ALL)), grain_maps)
        noised = objective.add_noise(latents, noise, timesteps)
        prediction = pipe.transformer(noised, timesteps, grain_maps, LABELS).sample
    losses = multi_grained_loss(
        prediction, objective.target(latents, noise, timesteps), GrainLayout.from_grain_map(grain_maps, num_grains)
    )
    expected = [losses[f"mse_grain_{grain}"].item() for grain in range(num_grains)]
    assert list(found) == ["0", "400"] and found["0"] != found["400"]
    assert found["400"] == pytest.approx(expected, rel=1e-4)


def test_a_model_that_predicts_nothing_errs_by_the_noise(make_pipeline, make_content_model, images):
    pipe = make_pipeline(transformer=make_content_model(randomize=False))  # its noise is zero
    fine = torch.ones(64, 4, 4, dtype=torch.int64)
    drawing = drawing_of(pipe, LABELS.repeat(8))
    found = denoising_error_by_grain(drawing, images.repeat(8, 1, 1, 1), fine, timesteps=(250,))["250"]
    assert math.isnan(found[0]) and found[1] == pytest.approx(1, abs=0.05)


def test_a_learned_variance_is_no_prediction(make_pipeline, make_content_model, images, true_maps):
    drawing = drawing_of(make_pipeline(transformer=make_content_model(out_channels=8)))
    found = denoising_error_by_grain(drawing, images, true_maps, timesteps=(250,))
    assert all(0.5 < error < 2 for error in found["250"])


def test_reconstruction_by_grain_is_that_of_the_whole_set(drawing, images, true_maps):
    vae, pixels = drawing.pipe.vae, images / 127.5 - 1
    with torch.no_grad():
        decoded = to_uint8(vae.decode(vae.encode(pixels, true_maps).latent_dist.mode()).sample) / 127.5 - 1
    fine = true_maps.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None].expand_as(pixels)
    errors = [(decoded - pixels)[fine == grain].double().square().mean().item() for grain in range(2)]
    expected = [10 * math.log10(4 / error) for error in errors]
    assert reconstruction_psnr_by_grain(drawing, images, true_maps) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_diagnostics_with_three_grains_and_in_half_precision(make_pipeline, dtype):
    images, drawing = to_uint8(load_photographs(64)), drawing_of(make_pipeline(num_grains=3).to(dtype))
    maps = {"true": drawing.true_maps(images)}
    maps["predicted"] = drawing.maps("predicted", maps["true"])
    found = grain_diagnostics(drawing, images, maps, timesteps=(250, 999))
    predicted, real = ((maps[name] == 2).double().mean().item() for name in ("predicted", "true"))
    assert found["fine_ratio_error"]["error"] == pytest.approx(predicted - real)
    assert found["coherence"]["predicted"] == spatial_coherence(maps["predicted"], 3)
    errors = found["error_by_grain"]
    assert list(errors["denoising"]) == list(found["grain_model_accuracy"]) == ["250", "999"]
    exact = drawing_of(make_pipeline(num_grains=3))
    expected = denoising_error_by_grain(exact, images, maps["true"], (250,))["250"]
    assert errors["denoising"]["250"] == pytest.approx(expected, rel=0.05)
    expected = reconstruction_psnr_by_grain(exact, images, maps["true"])
    assert errors["reconstruction_psnr_db"] == pytest.approx(expected, rel=0.05)


def test_what_is_wrong_is_named(make_pipeline, images, true_maps):
    without = make_pipeline(grain_model=None, grain_scheduler=None)
    refused("`pipe`.*grain model", grain_model_accuracy, drawing_of(without), true_maps)
    other = make_pipeline(scheduler=DDIMScheduler(prediction_type="sample", clip_sample=False))
    refused("`pipe.scheduler`.*'sample'", denoising_error_by_grain, drawing_of(other), images, true_maps)
    with pytest.raises(ValueError, match=r"`labels`.* 8 .*\(7,\)"):
        denoising_error_by_grain(drawing_of(make_pipeline(), LABELS[:7]), images, true_maps)
