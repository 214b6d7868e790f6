# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Losses against their definitions, written as plain loops."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from diffusers_d2it.grains import GrainLayout
from diffusers_d2it.losses import (
    adaptive_weight,
    adversarial_loss,
    dvae_loss,
    grain_loss,
    hinge_loss,
    multi_grained_loss,
    variance_loss,
)


def loss_case(num_grains: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, GrainLayout]:
    """Tied prediction and target (2, 3, h * R, w * R), and the layout of a map with every grain."""
    generator = torch.Generator().manual_seed(seed)
    cells = 2 ** (num_grains - 1)
    grain_map = torch.randint(num_grains, (2, 3, 5), generator=generator)
    grain_map[0, 0, :num_grains] = torch.arange(num_grains)
    shape = (2, 3, 3 * cells, 5 * cells)
    layout = GrainLayout.from_grain_map(grain_map, num_grains)
    prediction, target = (layout.tie(torch.randn(shape, generator=generator)) for _ in range(2))
    return prediction, target, layout


def layout_of(latents: torch.Tensor, grain_map: torch.Tensor) -> GrainLayout:
    return GrainLayout.from_grain_map(grain_map, (latents.shape[-1] // grain_map.shape[-1]).bit_length())


def squared_error_of_codes(prediction, target, grain_map, num_grains: int) -> list[list[float]]:
    """Mean squared error over the channels of every code, grain by grain, each code looked at once."""
    cells = 2 ** (num_grains - 1)
    errors = [[] for _ in range(num_grains)]
    for b, row, column in torch.cartesian_prod(*(torch.arange(size) for size in grain_map.shape)).tolist():
        grain = grain_map[b, row, column].item()
        side = cells >> grain
        for y in range(row * cells, (row + 1) * cells, side):
            for x in range(column * cells, (column + 1) * cells, side):
                difference = prediction[b, :, y, x].double() - target[b, :, y, x].double()
                errors[grain].append(difference.pow(2).mean().item())
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# Multi-grained noise loss, Eq. 11
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_grains", [2, 3])
def test_multi_grained_loss_counts_every_code_once(num_grains):
    prediction, target, layout = loss_case(num_grains)
    errors = squared_error_of_codes(prediction, target, layout.grain_map, num_grains)
    num_cells = target[:, 0].numel()
    losses = multi_grained_loss(prediction, target, layout)
    assert losses["loss"].item() == pytest.approx(sum(map(sum, errors)) / num_cells, rel=1e-5)
    for grain in range(num_grains):
        mean = sum(errors[grain]) / len(errors[grain])
        assert losses[f"mse_grain_{grain}"].item() == pytest.approx(mean, rel=1e-5)
    assert set(losses) == {"loss", *(f"mse_grain_{grain}" for grain in range(num_grains))}


@pytest.mark.parametrize("num_grains", [2, 3])
def test_an_all_fine_map_gives_the_plain_mean_squared_error(num_grains):
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, 4, 8, 12, generator=generator) for _ in range(2))
    cells = 2 ** (num_grains - 1)
    layout = layout_of(target, torch.full((2, 8 // cells, 12 // cells), num_grains - 1))
    losses = multi_grained_loss(prediction, target, layout)
    torch.testing.assert_close(losses["loss"], (prediction - target).pow(2).mean())
    torch.testing.assert_close(losses[f"mse_grain_{num_grains - 1}"], losses["loss"])


def test_a_code_weighs_the_same_whatever_the_rest_of_its_image():
    """One wrong code of unit error, coarse or fine, adds the same to the loss in a coarse and in a fine image."""
    added = []
    for background in (0, 1):
        for grain in (0, 1):
            grain_map = torch.full((1, 4, 4), background)
            grain_map[0, 1, 2] = grain
            target = torch.zeros(1, 2, 8, 8)
            prediction = target.clone()
            prediction[0, :, 2:3, 4:5] = 1.0
            layout = layout_of(target, grain_map)
            prediction = layout.tie(prediction)
            added.append(multi_grained_loss(prediction, target, layout)["loss"].item())
    assert added == pytest.approx([1 / 64] * 4)


def test_grain_weights_replace_those_of_eq_11():
    prediction, target, layout = loss_case(3)
    errors = squared_error_of_codes(prediction, target, layout.grain_map, 3)
    num_cells = target[:, 0].numel()
    cells_per_code = (16, 4, 1)
    for weights in ((1.0, 1.0, 1.0), (0.5, 2.0, 0.0)):
        expected = sum(w * n * sum(of_grain) for w, n, of_grain in zip(weights, cells_per_code, errors)) / num_cells
        losses = multi_grained_loss(prediction, target, layout, grain_weights=weights)
        assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        multi_grained_loss(prediction, target, layout, (1 / 16, 1 / 4, 1.0)),
        multi_grained_loss(prediction, target, layout),
    )
    alike = multi_grained_loss(prediction, target, layout, (1.0, 1.0, 1.0))["loss"]
    torch.testing.assert_close(alike, (prediction - target).pow(2).mean())


@pytest.mark.parametrize("num_grains", [2, 3])
def test_gradient_of_the_multi_grained_loss_is_its_weighted_error(num_grains):
    prediction, target, layout = loss_case(num_grains)
    prediction.requires_grad_()
    multi_grained_loss(prediction, target, layout)["loss"].backward()
    cells = 2 ** (num_grains - 1)
    grain_of_cell = layout.grain_map.repeat_interleave(cells, 1).repeat_interleave(cells, 2)[:, None]
    weight = 0.25 ** (num_grains - 1 - grain_of_cell).float()
    torch.testing.assert_close(prediction.grad, 2 * weight * (prediction.detach() - target) / target.numel())


def test_errors_of_the_grains_are_for_logging_and_carry_no_gradient():
    prediction, target, layout = loss_case(2)
    losses = multi_grained_loss(prediction.requires_grad_(), target, layout)
    assert losses["loss"].requires_grad
    assert not losses["mse_grain_0"].requires_grad and not losses["mse_grain_1"].requires_grad


def test_the_error_of_an_absent_grain_is_nan_and_the_loss_is_not():
    prediction, target, _ = loss_case(2)
    losses = multi_grained_loss(prediction, target, layout_of(target, torch.ones(2, 3, 5, dtype=torch.int64)))
    assert math.isnan(losses["mse_grain_0"].item())
    assert math.isfinite(losses["loss"].item()) and math.isfinite(losses["mse_grain_1"].item())


def test_multi_grained_loss_of_half_precision_is_computed_in_float32():
    prediction, target, layout = loss_case(2)
    prediction, target = prediction.bfloat16(), target.bfloat16()
    low = multi_grained_loss(prediction, target, layout)["loss"]
    assert low.dtype == torch.float32
    assert torch.equal(low, multi_grained_loss(prediction.float(), target.float(), layout)["loss"])


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0)])
def test_one_weight_is_needed_for_each_grain(weights):
    with pytest.raises(ValueError, match="`grain_weights`.* 2 "):
        multi_grained_loss(*loss_case(2), grain_weights=weights)


def test_a_map_that_does_not_fit_the_latents_is_refused():
    prediction, target, layout = loss_case(2)
    with pytest.raises(ValueError, match="`grain_map`"):
        multi_grained_loss(prediction[:, :, 1:], target[:, :, 1:], layout)


# ---------------------------------------------------------------------------------------------------------------------
# Grain loss, Eq. 5
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_grains", [2, 3])
def test_grain_loss_is_minus_the_log_probability_of_the_map(num_grains):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_grains, 3, 5, generator=generator)
    grain_map = torch.randint(num_grains, (2, 3, 5), generator=generator)
    log_p, hits = [], []
    for b, row, column in torch.cartesian_prod(*(torch.arange(size) for size in grain_map.shape)).tolist():
        scores = logits[b, :, row, column].double()
        true = grain_map[b, row, column].item()
        log_p.append(math.log(scores.exp()[true] / scores.exp().sum()))
        hits.append(scores.argmax().item() == true)
    losses = grain_loss(logits, grain_map)
    assert losses["loss"].item() == pytest.approx(-sum(log_p) / len(log_p), rel=1e-5)
    assert losses["accuracy"].item() == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("num_grains", [2, 3])
def test_grain_loss_of_a_guess_is_the_log_of_the_number_of_grains_and_of_certainty_zero(num_grains):
    grain_map = torch.arange(12).view(1, 3, 4) % num_grains
    guess = torch.zeros(1, num_grains, 3, 4)
    certain = torch.nn.functional.one_hot(grain_map, num_grains).permute(0, 3, 1, 2) * 100.0
    assert grain_loss(guess, grain_map)["loss"].item() == pytest.approx(math.log(num_grains))
    assert grain_loss(certain, grain_map)["loss"].item() == pytest.approx(0, abs=1e-6)
    assert grain_loss(certain, grain_map)["accuracy"].item() == 1


# ---------------------------------------------------------------------------------------------------------------------
# First stage
# ---------------------------------------------------------------------------------------------------------------------


def test_dvae_loss_is_the_mean_absolute_error_plus_the_weighted_rate(photos):
    reconstruction = photos.flip(-1)
    kl = torch.linspace(100, 800, 8)
    losses = dvae_loss(photos, reconstruction, kl, kl_weight=1e-2)
    l1 = (photos.double() - reconstruction.double()).abs().mean().item()
    rate = 450 / (3 * 64 * 64)  # nats per value
    assert losses["l1"].item() == pytest.approx(l1, rel=1e-5)
    assert losses["kl"].item() == pytest.approx(rate, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(l1 + 1e-2 * rate, rel=1e-5)


def test_dvae_loss_of_a_perfect_reconstruction_is_its_rate(photos):
    losses = dvae_loss(photos, photos, torch.full((8,), 123.0), kl_weight=1.0)
    assert losses["l1"] == 0
    assert losses["loss"].item() == pytest.approx(123 / (3 * 64 * 64), rel=1e-5)


def test_dvae_loss_reaches_both_the_reconstruction_and_the_rate(photos):
    reconstruction = torch.zeros_like(photos).requires_grad_()
    kl = torch.ones(8, requires_grad=True)
    dvae_loss(photos, reconstruction, kl, kl_weight=0.5)["loss"].backward()
    torch.testing.assert_close(reconstruction.grad, -photos.sign() / photos.numel())
    torch.testing.assert_close(kl.grad, torch.full((8,), 0.5 / photos.numel()))


# ---------------------------------------------------------------------------------------------------------------------
# Learned variance
# ---------------------------------------------------------------------------------------------------------------------


def test_sample_weights_scale_the_loss_of_their_image_alone():
    prediction, target, layout = loss_case(2)
    weights = torch.tensor([0.25, 3.0])
    images = [slice(i, i + 1) for i in (0, 1)]
    layouts = [layout_of(target, layout.grain_map[image]) for image in images]
    each = [multi_grained_loss(prediction[i], target[i], of_image)["loss"] for i, of_image in zip(images, layouts)]
    weighted = multi_grained_loss(prediction, target, layout, sample_weights=weights)
    torch.testing.assert_close(weighted["loss"], (0.25 * each[0] + 3 * each[1]) / 2)
    torch.testing.assert_close(weighted["mse_grain_0"], multi_grained_loss(prediction, target, layout)["mse_grain_0"])


def test_variance_loss_is_the_divergence_of_ddpm_steps():
    # Against torch's KL of two Gaussians: the posterior of the true z_0 and the step that DDPMScheduler takes
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False, variance_type="learned_range")
    generator = torch.Generator().manual_seed(0)
    latents, noise, predicted_noise = (torch.randn(3, 4, 4, 4, generator=generator) for _ in range(3))
    variance = torch.rand(3, 4, 4, 4, generator=generator) * 2 - 1
    timesteps = torch.tensor([1, 300, 999])
    noised = scheduler.add_noise(latents, noise, timesteps)
    alpha = scheduler.alphas_cumprod[timesteps].view(3, 1, 1, 1)
    predicted = (noised - (1 - alpha).sqrt() * predicted_noise) / alpha.sqrt()
    expected = []
    for i, t in enumerate(timesteps.tolist()):
        step = {"timestep": t, "sample": noised[i : i + 1]}
        model_output = torch.cat([predicted_noise[i : i + 1], variance[i : i + 1]], dim=1)
        # The scheduler adds the noise of its generator: two draws of opposite sign would cancel, so it is subtracted
        draw = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
        sample = scheduler.step(model_output, **step, generator=torch.Generator().manual_seed(5)).prev_sample
        deviation = (0.5 * scheduler._get_variance(t, predicted_variance=variance[i : i + 1])).exp()
        model = Normal(sample - deviation * draw, deviation)
        before, now = scheduler.alphas_cumprod[t - 1].double(), scheduler.alphas_cumprod[t].double()
        beta = 1 - now / before
        mean = (before.sqrt() * beta * latents[i] + (now / before).sqrt() * (1 - before) * noised[i]) / (1 - now)
        posterior = Normal(mean.float(), ((1 - before) / (1 - now) * beta).sqrt().float().expand_as(mean))
        expected.append(kl_divergence(posterior, model).mean() / math.log(2))
    layout = layout_of(latents, torch.ones(3, 2, 2, dtype=torch.int64))
    found = variance_loss(variance, predicted, latents, timesteps, scheduler.alphas_cumprod, layout)
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-2, atol=1e-3)


def test_variance_loss_is_least_at_the_variance_of_the_posterior_and_trains_nothing_else():
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=2e-2)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    layout = layout_of(latents, torch.tensor([[[0, 1], [1, 0]]] * 2))
    latents = layout.tie(latents)

    def loss(variance: float, predicted: torch.Tensor) -> torch.Tensor:
        timesteps = torch.tensor([0, 500])
        predicted_variance = torch.full_like(latents, variance)
        return variance_loss(predicted_variance, predicted, latents, timesteps, scheduler.alphas_cumprod, layout)

    assert loss(-1.0, latents).item() == pytest.approx(0, abs=1e-6)
    assert loss(1.0, latents) > loss(0.0, latents) > 0
    assert loss(0.0, latents + 1) > loss(0.0, latents)
    predicted = latents.clone().requires_grad_()
    assert not loss(0.5, predicted).requires_grad


def test_variance_loss_counts_every_code_once():
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=2e-2)
    latents = torch.zeros(1, 4, 2, 2)
    timesteps = torch.tensor([500])
    coarse, fine = (
        variance_loss(
            torch.ones(1, 4, 2, 2),
            latents,
            latents,
            timesteps,
            scheduler.alphas_cumprod,
            layout_of(latents, torch.full((1, 1, 1), grain)),
        )
        for grain in (0, 1)
    )
    torch.testing.assert_close(coarse, fine / 4)


# ---------------------------------------------------------------------------------------------------------------------
# Adversarial terms of the first stage
# ---------------------------------------------------------------------------------------------------------------------


def test_hinge_loss_is_one_when_the_discriminator_cannot_tell_and_zero_beyond_the_margin():
    unsure = hinge_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    assert unsure["discriminator"].item() == 1
    sure = hinge_loss(torch.full((2, 1, 4, 4), 1.5), torch.full((2, 1, 4, 4), -3.0))
    assert sure["discriminator"].item() == 0
    assert (sure["logits_real"].item(), sure["logits_fake"].item()) == (1.5, -3.0)
    wrong = hinge_loss(torch.full((2,), -2.0), torch.full((2,), 1.0))
    assert wrong["discriminator"].item() == pytest.approx((3 + 2) / 2)
    assert adversarial_loss(torch.full((2,), 1.0)).item() == -1


def test_adaptive_weight_makes_both_losses_pull_the_last_layer_alike():
    layer = torch.nn.Linear(5, 3)
    output = layer(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    reconstruction, adversarial = output.pow(2).mean(), -20 * output.sin().mean()
    weight = adaptive_weight(reconstruction, adversarial, layer.weight)
    assert not weight.requires_grad
    pulls = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (
        reconstruction, weight * adversarial
    )]  # fmt: skip
    torch.testing.assert_close(*pulls, rtol=1e-4, atol=0)
    none = adaptive_weight(reconstruction, 0.0 * adversarial, layer.weight)
    assert none.item() == pytest.approx(min(1e4, pulls[0].item() / 1e-6), rel=1e-3)
