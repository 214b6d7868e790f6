# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Table 5 and the diagnostics of a checkpoint: against other ways to the same figures, and where they are known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from metric_inputs import small_network
from photographs import load_photographs

from diffusers_d2it import D2iTPipeline, bundled_checkpoint
from diffusers_d2it.evaluation import ModuleFeatures, evaluate
from diffusers_d2it.evaluation.grain_maps import map_accuracy, psnr_by_grain, spatial_coherence
from diffusers_d2it.evaluation.grain_report import (
    denoising_error_by_grain,
    grain_diagnostics,
    grain_model_accuracy,
    maps_of_sources,
    reconstruction_psnr_by_grain,
    report_text,
    table_5,
)
from diffusers_d2it.evaluation.images import ImageSet
from diffusers_d2it.evaluation.map_sources import ENCODING, NOISE, Sampling, image_generators, sample_images
from diffusers_d2it.evaluation.results import Result, compare, differences
from diffusers_d2it.grains import tie
from diffusers_d2it.losses import grain_loss, multi_grained_loss
from diffusers_d2it.objectives import make_objective
from diffusers_d2it.pixels import to_uint8


SAMPLING = Sampling(num_inference_steps=2, grain_num_inference_steps=3, batch_size=3)
LABELS = torch.arange(8)
ALL = slice(0, 8)

pytestmark = pytest.mark.filterwarnings("ignore:fd_conv. there are no more images")


@pytest.fixture(scope="module")
def pipe(make_pipeline) -> D2iTPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Eight photographs, uint8 (8, 3, 32, 32)."""
    return to_uint8(load_photographs(32))


@pytest.fixture(scope="module")
def reference() -> ImageSet:
    """The photographs, mirrored."""
    return ImageSet.from_tensor(to_uint8(load_photographs(32)).flip(3), name="mirrored")


@pytest.fixture(scope="module")
def features():
    return ModuleFeatures(small_network(), "conv")


@pytest.fixture(scope="module")
def maps(pipe, images) -> dict[str, torch.Tensor]:
    return maps_of_sources(pipe, images, LABELS, SAMPLING)


@pytest.fixture(scope="module")
def rows(pipe, maps, reference, features) -> list[dict]:
    return table_5(pipe, maps, LABELS, reference, features, SAMPLING, protocol={"checkpoint": "tiny"})


# ---------------------------------------------------------------------------------------------------------------------
# Table 5
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_paper_and_the_uniform_ones(rows, maps):
    assert [row["map"] for row in rows] == ["true", "predicted", "random", "coarse", "fine"] == list(maps)
    assert [row["fine_share"] for row in rows][3:] == [0, 1]
    assert rows[0]["fine_share"] == pytest.approx(maps["true"].double().mean().item())
    assert rows[0]["coherence"] == spatial_coherence(maps["true"], 2)["coherence"]


def test_a_row_is_what_evaluate_finds_in_its_samples(pipe, rows, maps, reference, features):
    images = sample_images(pipe, maps["random"], LABELS, SAMPLING)
    [expected] = evaluate(ImageSet.from_tensor(images, "random"), reference, ["fid"], features)
    [found] = rows[2]["results"]
    assert found["metric"] == "fd_conv" and found["value"] == pytest.approx(expected.value, rel=1e-9)
    measured = pipe.grain_map_from_image(images / 255)
    assert rows[2]["agreement"] == map_accuracy(measured, maps["random"], 2)


def test_rows_differ_in_their_maps_and_may_be_compared(rows):
    one, other = (Result(**rows[i]["results"][0]) for i in (0, 1))
    assert set(differences(one, other)) == {"samples.grain_map"}
    assert one.protocol["samples"]["checkpoint"] == "tiny"
    assert compare(one, other, varying=["samples.grain_map"]) == pytest.approx(other.value - one.value)
    with pytest.raises(ValueError, match='samples.grain_map: "true" and "predicted"'):
        compare(one, other)


def test_equal_maps_make_equal_rows(pipe, maps, reference, features):
    twice = {"one": maps["true"], "other": maps["true"].clone()}
    one, other = table_5(pipe, twice, LABELS, reference, features, SAMPLING)
    assert one["results"][0]["value"] == other["results"][0]["value"]
    assert one["results"][0]["protocol"]["samples"]["digest"] == other["results"][0]["protocol"]["samples"]["digest"]


def test_batch_size_changes_rounding_alone(pipe, rows, maps, reference, features):
    other = Sampling(**(vars(SAMPLING) | {"batch_size": 8}))
    for row, expected in zip(table_5(pipe, maps, LABELS, reference, features, other), rows):
        assert row["results"][0]["value"] == pytest.approx(expected["results"][0]["value"], rel=1e-2)
        assert "batch_size" not in row["results"][0]["protocol"]["samples"]


def test_precision_and_recall_too(pipe, maps, reference, features):
    some = {"true": maps["true"]}
    [row] = table_5(pipe, some, LABELS, reference, features, SAMPLING, metrics=["fid", "precision", "recall"])
    assert [result["metric"] for result in row["results"]] == ["fd_conv", "precision_conv", "recall_conv"]


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics
# ---------------------------------------------------------------------------------------------------------------------


def test_a_grain_model_that_knows_nothing_says_coarse_everywhere(make_pipeline, make_grain_model, maps):
    pipe = make_pipeline(grain_model=make_grain_model(randomize=False))  # its logits are zero
    found = grain_model_accuracy(pipe, maps["true"], LABELS, SAMPLING, timesteps=(0, 999))
    coarse = (maps["true"] == 0).double().mean().item()
    expected = {"accuracy": coarse, "chance": coarse, "above_chance": 0}
    assert found == {"0": pytest.approx(expected), "999": pytest.approx(expected)}


def test_accuracy_of_the_bundled_grain_model_falls_with_noise():
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    maps = pipe.grain_map_from_image((load_photographs(64) + 1) / 2)
    labels = torch.tensor([207, 291, 967, 779, 970, 973, 963, 817])
    found = grain_model_accuracy(pipe, maps, labels, SAMPLING)
    assert list(found) == ["250", "500", "750", "999"]
    accuracies = [one["accuracy"] for one in found.values()]
    assert accuracies[0] > 0.9 > accuracies[1] > accuracies[2]
    # One timestep by hand, in another batch size
    state = pipe.grain_model.state_from_grain_map(maps, 2)
    noise = randn_tensor(state.shape, generator=image_generators(0, NOISE, ALL))
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
    images = to_uint8(load_photographs(64 if num_grains == 3 else 32))
    grain_maps = pipe.grain_map_from_image(images / 255, fine_ratio=0.4)
    found = denoising_error_by_grain(pipe, images, grain_maps, LABELS, SAMPLING, timesteps=(0, 400))

    objective, timesteps = make_objective(name.split(",")[0]), torch.full((8,), 400)
    if name.endswith("other betas"):
        objective.scheduler = pipe.scheduler
    with torch.no_grad():
        posterior = pipe.vae.encode(images / 127.5 - 1, grain_maps).latent_dist
        latents = pipe.vae.scale_latents(posterior.sample(image_generators(0, ENCODING, ALL)))
        noise = tie(randn_tensor(latents.shape, generator=image_generators(0, NOISE, ALL)), grain_maps)
        noised = objective.add_noise(latents, noise, timesteps)
        prediction = pipe.transformer(noised, timesteps, grain_maps, LABELS).sample
    losses = multi_grained_loss(prediction, objective.target(latents, noise, timesteps), grain_maps)
    expected = [losses[f"mse_grain_{grain}"].item() for grain in range(num_grains)]
    assert list(found) == ["0", "400"] and found["0"] != found["400"]
    assert found["400"] == pytest.approx(expected, rel=1e-4)


def test_a_model_that_predicts_nothing_errs_by_the_noise(make_pipeline, make_content_model, images):
    pipe = make_pipeline(transformer=make_content_model(randomize=False))  # its noise is zero
    fine = torch.ones(8, 4, 4, dtype=torch.int64)
    many = (images.repeat(8, 1, 1, 1), fine.repeat(8, 1, 1), LABELS.repeat(8))
    found = denoising_error_by_grain(pipe, *many, SAMPLING, timesteps=(250,))["250"]
    assert math.isnan(found[0]) and found[1] == pytest.approx(1, abs=0.05)


def test_a_learned_variance_is_no_prediction(make_pipeline, make_content_model, images, maps):
    pipe = make_pipeline(transformer=make_content_model(out_channels=8))
    found = denoising_error_by_grain(pipe, images, maps["true"], LABELS, SAMPLING, timesteps=(250,))
    assert all(0.5 < error < 2 for error in found["250"])


def test_reconstruction_by_grain_is_that_of_the_whole_set(pipe, images, maps):
    pixels = images / 127.5 - 1
    with torch.no_grad():
        decoded = to_uint8(pipe.vae.decode(pipe.vae.encode(pixels, maps["true"]).latent_dist.mode()).sample)
    expected = psnr_by_grain(pixels, decoded / 127.5 - 1, maps["true"], 2)
    assert reconstruction_psnr_by_grain(pipe, images, maps["true"], batch_size=3) == pytest.approx(expected, rel=1e-6)


def test_all_diagnostics_and_their_text(pipe, images, maps, rows):
    found = grain_diagnostics(pipe, images, LABELS, maps, SAMPLING, timesteps=(250, 999))
    predicted, real = (maps[name].double().mean().item() for name in ("predicted", "true"))
    assert found["fine_ratio_error"]["error"] == pytest.approx(predicted - real)
    assert found["coherence"]["predicted"] == spatial_coherence(maps["predicted"], 2)
    assert list(found["error_by_grain"]["denoising"]) == list(found["grain_model_accuracy"]) == ["250", "999"]
    text = report_text(rows, [{"metric": "fd_conv", "value": 0.125}], found)
    assert "| real images | 0.125 |" in text and "| predicted | " in text
    assert "by grain, coarsest first: t=250 " in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {7}


def test_three_grains_and_half_precision(make_pipeline, features):
    images = to_uint8(load_photographs(64))
    reference = ImageSet.from_tensor(images.flip(3), name="mirrored")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe = make_pipeline(num_grains=3).to(dtype)
        maps = maps_of_sources(pipe, images, LABELS, SAMPLING)
        some = {source: maps[source] for source in ("true", "fine")}
        rows = table_5(pipe, some, LABELS, reference, features, SAMPLING)
        found[dtype] = grain_diagnostics(pipe, images, LABELS, maps, SAMPLING, timesteps=(250,)), rows
        assert len(found[dtype][0]["error_by_grain"]["reconstruction_psnr_db"]) == 3
    (ours, rows), (expected, expected_rows) = found[torch.bfloat16], found[torch.float32]
    for name in ("denoising", "reconstruction_psnr_db"):
        errors, expected_errors = (one["error_by_grain"][name] for one in (ours, expected))
        if name == "denoising":
            errors, expected_errors = errors["250"], expected_errors["250"]
        assert errors == pytest.approx(expected_errors, rel=0.05)
    for row, expected_row in zip(rows, expected_rows):
        assert row["fine_share"] == pytest.approx(expected_row["fine_share"])
        assert row["results"][0]["value"] == pytest.approx(expected_row["results"][0]["value"], rel=0.2)


def test_what_is_wrong_is_named(make_pipeline, pipe, images, maps, reference, features):
    without = make_pipeline(grain_model=None, grain_scheduler=None)
    with pytest.raises(ValueError, match="`pipe` has no grain model"):
        grain_model_accuracy(without, maps["true"], LABELS, SAMPLING)
    with pytest.raises(ValueError, match="needs `labels`"):
        denoising_error_by_grain(pipe, images, maps["true"], None, SAMPLING)
    other = make_pipeline(scheduler=DDIMScheduler(prediction_type="sample", clip_sample=False))
    with pytest.raises(ValueError, match="must predict 'epsilon', 'v_prediction' or a flow, got 'sample'"):
        denoising_error_by_grain(other, images, maps["true"], LABELS, SAMPLING)
    with pytest.raises(ValueError, match="the metric 'is' needs at least 10 images"):
        table_5(pipe, maps, LABELS, reference, features, SAMPLING, metrics=["is"])
