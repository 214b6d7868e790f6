# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Figures of maps and of a checkpoint by them: known by hand, found another way, and what must hold for any map."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from metric_inputs import refused
from photographs import load_photographs

from diffusers_d2it import D2iTPipeline, bundled_checkpoint
from diffusers_d2it.evaluation import Drawing, denoising_error_by_grain, grain_diagnostics, spatial_autocorrelation
from diffusers_d2it.evaluation.grain_maps import (
    fine_ratio_error,
    grain_model_accuracy,
    map_accuracy,
    reconstruction_psnr_by_grain,
)
from diffusers_d2it.evaluation.reports import ENCODING, NOISE
from diffusers_d2it.grains import GrainLayout, tie
from diffusers_d2it.losses import grain_loss, multi_grained_loss
from diffusers_d2it.objectives import make_objective
from diffusers_d2it.pipelines.grain_sampling import random_grain_map
from diffusers_d2it.pixels import to_uint8


# ---- Of maps ----

COARSE, FINE = [[0, 0], [0, 0]], [[1, 1], [1, 1]]
HALF, CHEQUERED = [[1, 1], [0, 0]], [[1, 0], [0, 1]]


def maps(*rows: list) -> torch.Tensor:
    return torch.tensor(rows)


def random_maps(shape: tuple[int, int, int], num_grains: int = 2, fine_ratio: float = 0.5) -> torch.Tensor:
    return random_grain_map(shape, num_grains, fine_ratio, torch.Generator().manual_seed(0), torch.device("cpu"))


def test_share_error_by_hand():
    found = fine_ratio_error(maps(FINE, COARSE), maps(HALF, HALF, HALF), 2)
    # Means are equal; shares 1 and 0 have to be moved by one half each to become one half
    half, zero = ("fine_share", "fine_share_real", "std", "std_error", "wasserstein"), ("error", "std_real")
    assert found == dict.fromkeys(half, 0.5) | dict.fromkeys(zero, 0)


def test_share_error_has_a_sign_and_only_the_finest_grain_is_fine():
    found = fine_ratio_error(maps(HALF, COARSE), maps(FINE, HALF), 2)  # 1/2, 0 against 1, 1/2
    assert found["error"] == -0.5 and found["wasserstein"] == 0.5 and found["std_error"] == 0
    found = fine_ratio_error(maps([[1, 1], [1, 1]]), maps([[2, 2], [2, 0]]), 3)
    assert (found["fine_share"], found["fine_share_real"]) == (0, 0.75)


def test_accuracy_by_hand():
    # 3 of 4 equal; fine shares 1/4 and 1/2, so chance is 1/4 * 1/2 + 3/4 * 1/2
    found = map_accuracy(maps([[1, 0], [0, 0]]), maps([[1, 1], [0, 0]]), 2)
    assert found == {"accuracy": 0.75, "chance": 0.5, "above_chance": 0.5}
    assert map_accuracy(maps(FINE), maps(HALF), 2) == {"accuracy": 0.5, "chance": 0.5, "above_chance": 0}
    assert math.isnan(map_accuracy(maps(FINE), maps(FINE), 2)["above_chance"])


@pytest.mark.parametrize("num_grains", [2, 3, 4])
def test_equal_maps_are_one_and_independent_ones_are_chance(num_grains):
    many = random_maps((500, 8, 8), num_grains, 0.4)
    same = map_accuracy(many, many.clone(), num_grains)
    assert same["accuracy"] == same["above_chance"] == 1
    found = map_accuracy(many[:250], many[250:], num_grains)
    shares = torch.tensor([0.6 / (num_grains - 1)] * (num_grains - 1) + [0.4])
    assert found["chance"] == pytest.approx(shares.square().sum().item(), abs=0.01)
    assert found["above_chance"] == pytest.approx(0, abs=0.02)


def test_autocorrelation_by_hand():
    # Pairs of HALF: both horizontal ones equal, no vertical one. Of six pairs of its regions two are equal.
    assert spatial_autocorrelation(maps(HALF), 2) == pytest.approx(
        {"agreement": 1 / 2, "chance": 1 / 3, "autocorrelation": 1 / 4}
    )
    found = spatial_autocorrelation(maps(CHEQUERED), 2)
    assert found == pytest.approx({"agreement": 0, "chance": 1 / 3, "autocorrelation": -1 / 2})
    wide = maps([[0, 0, 0, 1, 1, 1]])  # one row: 4 of 5 pairs
    assert [spatial_autocorrelation(one, 2)["agreement"] for one in (wide, wide.transpose(1, 2))] == [0.8, 0.8]
    # 01 / 12 / 20: a flattened map would pair the end of a row with the beginning of the next, 1 = 1 and 2 = 2
    assert spatial_autocorrelation(maps([[0, 1], [1, 2], [2, 0]]), 3)["agreement"] == 0


def test_constant_maps_weigh_nothing_beside_others_and_are_coherent_alone():
    alone, beside = spatial_autocorrelation(maps(HALF), 2), spatial_autocorrelation(maps(HALF, FINE, COARSE), 2)
    assert (
        beside["autocorrelation"] == pytest.approx(alone["autocorrelation"])
        and beside["agreement"] > alone["agreement"]
    )
    assert spatial_autocorrelation(maps(FINE, COARSE), 2) == {"agreement": 1, "chance": 1, "autocorrelation": 1}


@pytest.mark.parametrize("num_grains", [2, 3, 4])
@pytest.mark.parametrize("fine_ratio", [0.1, 0.5, 0.9])
def test_independent_regions_are_not_coherent(num_grains, fine_ratio):
    found = spatial_autocorrelation(random_maps((400, 8, 8), num_grains, fine_ratio), num_grains)
    assert found["autocorrelation"] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("symmetry", [lambda m: m.flip(1), lambda m: m.flip(2), lambda m: m.transpose(1, 2)])
def test_autocorrelation_has_the_symmetries_of_the_square(symmetry):
    many = random_maps((20, 6, 6), 3, 0.3).repeat_interleave(2, dim=1)[:, :6]
    assert spatial_autocorrelation(symmetry(many), 3) == pytest.approx(spatial_autocorrelation(many, 3), rel=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fine_ratio_error(maps(HALF), maps(HALF).float(), 2), "`real`.*int64"),
        (lambda: fine_ratio_error(maps(HALF)[0], maps(HALF), 2), r"`predicted`.*\(B, h, w\)"),
        (lambda: fine_ratio_error(maps(HALF), torch.zeros(1, 3, 2).long(), 2), r"\(2, 2\).*\(3, 2\)"),
        (lambda: map_accuracy(maps(HALF), maps(HALF, FINE), 2), r"\(1, 2, 2\) and \(2, 2, 2\)"),
        (lambda: map_accuracy(maps(HALF), 2 * maps(HALF), 2), "`true`"),
        (lambda: map_accuracy("fine", maps(HALF), 2), "`predicted`.* str"),
        (lambda: spatial_autocorrelation(maps([[1]]), 2), "`maps`.*got one"),
        (lambda: spatial_autocorrelation(-maps(HALF), 2), "`maps`"),
    ],
)
def test_maps_that_are_wrong_are_named(call, message):
    refused(message, call)


# ---- Of a checkpoint ----

LABELS = torch.arange(8)
ALL = slice(0, 8)


def drawing_of(pipe: D2iTPipeline, labels: torch.Tensor = LABELS) -> Drawing:
    return Drawing(pipe, labels, num_inference_steps=2, grain_num_inference_steps=3, batch_size=3)


@pytest.fixture(scope="module")
def drawing(make_pipeline) -> Drawing:
    return drawing_of(make_pipeline())


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
    assert found["autocorrelation"]["predicted"] == spatial_autocorrelation(maps["predicted"], 3)
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
