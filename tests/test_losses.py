# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Losses against their definitions, written as plain loops."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from grain_maps import codes, random_latents, random_map
from torch.distributions import Normal, kl_divergence

from diffusers_d2it.grains import GrainLayout
from diffusers_d2it.losses import (
    adaptive_weight,
    adversarial_loss,
    dvae_loss,
    grain_loss,
    hinge_loss,
    mse_loss,
    multi_grained_loss,
    ratio_loss,
    variance_loss,
    weights_of_cells,
)


KINDS = pytest.mark.parametrize("num_grains", [2, 3])
SCHEDULER = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, clip_sample=False, variance_type="learned_range")


def loss_case(num_grains: int) -> tuple[torch.Tensor, torch.Tensor, GrainLayout]:
    """Tied prediction and target (2, 3, h * R, w * R), and the layout of a map with every grain."""
    layout = GrainLayout.from_grain_map(random_map(num_grains, (2, 3, 5)), num_grains)
    prediction, target = (layout.tie(random_latents(layout.grain_map, num_grains, 3, seed)) for seed in (0, 1))
    return prediction, target, layout


def errors_of_codes(prediction: torch.Tensor, target: torch.Tensor, layout: GrainLayout) -> list[list[float]]:
    """Mean squared error over the channels of every code, grain by grain, each code looked at once."""
    errors = [[] for _ in range(layout.num_grains)]
    for _, grain, *_, block in codes(prediction - target, layout.grain_map, layout.num_grains):
        errors[grain].append(block[:, 0, 0].double().pow(2).mean().item())
    return errors


# ---- Multi-grained noise loss, Eq. 11 ----


@KINDS
def test_multi_grained_loss_counts_every_code_once(num_grains):
    prediction, target, layout = loss_case(num_grains)
    prediction.requires_grad_()
    errors = errors_of_codes(prediction.detach(), target, layout)
    losses = multi_grained_loss(prediction, target, layout)
    assert losses["loss"].item() == pytest.approx(sum(map(sum, errors)) / target[:, 0].numel(), rel=1e-5)
    assert set(losses) == {"loss", *(f"mse_grain_{grain}" for grain in range(num_grains))}
    for grain, of_grain in enumerate(errors):
        mse = losses[f"mse_grain_{grain}"]
        assert mse.item() == pytest.approx(sum(of_grain) / len(of_grain), rel=1e-5)
        assert not mse.requires_grad  # it is for logging
    losses["loss"].backward()
    weight = 0.25 ** (num_grains - 1 - layout.grain_of_cell).float()[:, None]
    torch.testing.assert_close(prediction.grad, 2 * weight * (prediction.detach() - target) / target.numel())


def test_grain_weights_replace_those_of_eq_11():
    prediction, target, layout = loss_case(3)
    errors = errors_of_codes(prediction, target, layout)
    for weights in ((1 / 16, 1 / 4, 1.0), (1.0, 1.0, 1.0), (0.5, 2.0, 0.0)):
        expected = sum(w * n * sum(of_grain) for w, n, of_grain in zip(weights, (16, 4, 1), errors))
        losses = multi_grained_loss(prediction, target, layout, grain_weights=weights)
        assert losses["loss"].item() == pytest.approx(expected / target[:, 0].numel(), rel=1e-5)
    for weights in ((1.0, 1.0), (1.0,) * 4):
        with pytest.raises(ValueError, match="`grain_weights`.* 3 "):
            multi_grained_loss(prediction, target, layout, grain_weights=weights)


def test_sample_weights_scale_the_loss_of_their_image_alone():
    prediction, target, layout = loss_case(2)
    plain = multi_grained_loss(prediction, target, layout)
    weighted = multi_grained_loss(prediction, target, layout, sample_weights=torch.tensor([0.25, 3.0]))
    each = [
        multi_grained_loss(prediction[i], target[i], GrainLayout.from_grain_map(layout.grain_map[i], 2))["loss"]
        for i in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(weighted["loss"], (0.25 * each[0] + 3 * each[1]) / 2)
    torch.testing.assert_close(weighted["mse_grain_0"], plain["mse_grain_0"])


def test_the_error_of_an_absent_grain_is_nan_and_the_loss_is_not():
    """And an all-fine map gives the plain mean squared error."""
    prediction, target, layout = loss_case(2)
    losses = multi_grained_loss(prediction, target, GrainLayout.from_grain_map(torch.ones_like(layout.grain_map), 2))
    assert torch.equal(mse_loss(prediction, target), losses["loss"])
    assert math.isnan(losses["mse_grain_0"].item())
    torch.testing.assert_close(losses["loss"], (prediction - target).pow(2).mean())
    torch.testing.assert_close(losses["mse_grain_1"], losses["loss"])


def test_multi_grained_loss_of_half_precision_is_computed_in_float32():
    prediction, target, layout = loss_case(2)
    prediction, target = prediction.bfloat16(), target.bfloat16()
    low = multi_grained_loss(prediction, target, layout)["loss"]
    assert low.dtype == torch.float32
    assert torch.equal(low, multi_grained_loss(prediction.float(), target.float(), layout)["loss"])


def test_a_map_that_does_not_fit_the_latents_is_refused():
    prediction, target, layout = loss_case(2)
    with pytest.raises(ValueError, match="`grain_map`"):
        multi_grained_loss(prediction[:, :, 1:], target[:, :, 1:], layout)


# ---- Grain loss, Eq. 5 ----


@KINDS
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


# ---- First stage ----


def test_dvae_loss_is_the_mean_absolute_error_plus_the_weighted_rate(photos):
    reconstruction = photos.flip(-1).requires_grad_()
    kl = torch.linspace(100, 800, 8, requires_grad=True)
    losses = dvae_loss(photos, reconstruction, kl, kl_weight=1e-2)
    l1 = (photos.double() - reconstruction.double()).abs().mean().item()
    rate = 450 / (3 * 64 * 64)  # nats per value
    assert losses["l1"].item() == pytest.approx(l1, rel=1e-5)
    assert losses["kl"].item() == pytest.approx(rate, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(l1 + 1e-2 * rate, rel=1e-5)
    losses["loss"].backward()
    torch.testing.assert_close(reconstruction.grad, (reconstruction.detach() - photos).sign() / photos.numel())
    torch.testing.assert_close(kl.grad, torch.full((8,), 1e-2 / photos.numel()))


# ---- Learned variance ----


def test_variance_loss_is_the_divergence_of_ddpm_steps():
    # Against torch's KL of two Gaussians: the posterior of the true z_0 and the step that DDPMScheduler takes
    scheduler = SCHEDULER
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
    found = variance_loss(variance, predicted, latents, timesteps, scheduler.alphas_cumprod)
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-2, atol=1e-3)


def test_variance_loss_is_least_at_the_variance_of_the_posterior_and_trains_nothing_else():
    latents, _, layout = loss_case(2)

    def loss(variance: float, predicted: torch.Tensor) -> torch.Tensor:
        predicted_variance = torch.full_like(latents, variance)
        return variance_loss(
            predicted_variance,
            predicted,
            latents,
            torch.tensor([0, 500]),
            SCHEDULER.alphas_cumprod,
            weights_of_cells(layout),
        )

    assert loss(-1.0, latents).item() == pytest.approx(0, abs=1e-6)
    assert loss(1.0, latents) > loss(0.0, latents) > 0
    assert loss(0.0, latents + 1) > loss(0.0, latents)
    assert not loss(0.5, latents.clone().requires_grad_()).requires_grad


def test_variance_loss_counts_every_code_once():
    latents, timesteps = torch.zeros(1, 4, 2, 2), torch.tensor([500])
    coarse, fine, weighted = (
        variance_loss(
            torch.ones_like(latents),
            latents,
            latents,
            timesteps,
            SCHEDULER.alphas_cumprod,
            weights_of_cells(GrainLayout.from_grain_map(torch.full((1, 1, 1), grain), 2), weights),
        )
        for grain, weights in ((0, None), (1, None), (0, (3.0, 1.0)))
    )
    torch.testing.assert_close(coarse, fine / 4)
    torch.testing.assert_close(weighted, fine * 3)


# ---- Adversarial terms of the first stage ----


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


# ---- DC-DiT ----


@pytest.mark.parametrize("compression", [4, 16])
def test_ratio_loss_is_1_at_its_ratio_and_pulls_towards_it(compression):
    def loss_of(natural: int, p: float) -> tuple[float, float]:
        probability = torch.full((2, 8, 8), p)
        kept = torch.zeros(128, dtype=torch.bool)
        kept[:natural] = True
        probability = torch.where(
            kept.view(2, 8, 8), 0.75, (128 * p - 0.75 * natural) / (128 - natural)
        ).requires_grad_()
        loss = ratio_loss(probability, compression)
        loss.backward()
        return loss.item(), probability.grad.sum().item()

    number = 128 // compression
    assert loss_of(number, 1 / compression)[0] == pytest.approx(1)
    assert loss_of(number // 2, 1 / compression)[1] < 0 < loss_of(2 * number, 1.9 / compression)[1]


def test_ratio_loss_over_groups_by_hand():
    probability = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(0))
    parts = [ratio_loss(part, 4) for part in probability.split(2)]
    assert ratio_loss(probability, 4, group_size=2).item() == pytest.approx(sum(parts).item() / 3)
    r, p = (probability[:2] > 0.5).float().mean().item(), probability[:2].mean().item()
    assert parts[0].item() == pytest.approx(4 / 3 * ((1 - r) * (1 - p) + 3 * r * p))


@pytest.mark.parametrize(
    "arguments, name", [((1, None), "compression"), ((4, 4), "group_size"), ((4, 0), "group_size")]
)
def test_ratio_loss_refuses(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        ratio_loss(torch.rand(6, 4, 4), *arguments)
