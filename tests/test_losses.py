# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Losses against their definitions, written as plain loops."""

import math

import pytest
import torch

from diffusers_d2it.grains import tie
from diffusers_d2it.losses import dvae_loss, grain_loss, multi_grained_loss


def loss_case(num_grains: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tied prediction and target (2, 3, h * R, w * R), and a map with every grain."""
    generator = torch.Generator().manual_seed(seed)
    cells = 2 ** (num_grains - 1)
    grain_map = torch.randint(num_grains, (2, 3, 5), generator=generator)
    grain_map[0, 0, :num_grains] = torch.arange(num_grains)
    shape = (2, 3, 3 * cells, 5 * cells)
    prediction, target = (tie(torch.randn(shape, generator=generator), grain_map) for _ in range(2))
    return prediction, target, grain_map


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
    prediction, target, grain_map = loss_case(num_grains)
    errors = squared_error_of_codes(prediction, target, grain_map, num_grains)
    num_cells = target[:, 0].numel()
    losses = multi_grained_loss(prediction, target, grain_map)
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
    grain_map = torch.full((2, 8 // cells, 12 // cells), num_grains - 1)
    losses = multi_grained_loss(prediction, target, grain_map)
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
            prediction = tie(prediction, grain_map)
            added.append(multi_grained_loss(prediction, target, grain_map)["loss"].item())
    assert added == pytest.approx([1 / 64] * 4)


def test_grain_weights_replace_those_of_eq_11():
    prediction, target, grain_map = loss_case(3)
    errors = squared_error_of_codes(prediction, target, grain_map, 3)
    num_cells = target[:, 0].numel()
    cells_per_code = (16, 4, 1)
    for weights in ((1.0, 1.0, 1.0), (0.5, 2.0, 0.0)):
        expected = sum(w * n * sum(of_grain) for w, n, of_grain in zip(weights, cells_per_code, errors)) / num_cells
        losses = multi_grained_loss(prediction, target, grain_map, grain_weights=weights)
        assert losses["loss"].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        multi_grained_loss(prediction, target, grain_map, (1 / 16, 1 / 4, 1.0)),
        multi_grained_loss(prediction, target, grain_map),
    )
    alike = multi_grained_loss(prediction, target, grain_map, (1.0, 1.0, 1.0))["loss"]
    torch.testing.assert_close(alike, (prediction - target).pow(2).mean())


@pytest.mark.parametrize("num_grains", [2, 3])
def test_gradient_of_the_multi_grained_loss_is_its_weighted_error(num_grains):
    prediction, target, grain_map = loss_case(num_grains)
    prediction.requires_grad_()
    multi_grained_loss(prediction, target, grain_map)["loss"].backward()
    cells = 2 ** (num_grains - 1)
    grain_of_cell = grain_map.repeat_interleave(cells, 1).repeat_interleave(cells, 2)[:, None]
    weight = 0.25 ** (num_grains - 1 - grain_of_cell).float()
    torch.testing.assert_close(prediction.grad, 2 * weight * (prediction.detach() - target) / target.numel())


def test_errors_of_the_grains_are_for_logging_and_carry_no_gradient():
    prediction, target, grain_map = loss_case(2)
    losses = multi_grained_loss(prediction.requires_grad_(), target, grain_map)
    assert losses["loss"].requires_grad
    assert not losses["mse_grain_0"].requires_grad and not losses["mse_grain_1"].requires_grad


def test_the_error_of_an_absent_grain_is_nan_and_the_loss_is_not():
    prediction, target, _ = loss_case(2)
    losses = multi_grained_loss(prediction, target, torch.ones(2, 3, 5, dtype=torch.int64))
    assert math.isnan(losses["mse_grain_0"].item())
    assert math.isfinite(losses["loss"].item()) and math.isfinite(losses["mse_grain_1"].item())


def test_multi_grained_loss_of_half_precision_is_computed_in_float32():
    prediction, target, grain_map = loss_case(2)
    prediction, target = prediction.bfloat16(), target.bfloat16()
    low = multi_grained_loss(prediction, target, grain_map)["loss"]
    assert low.dtype == torch.float32
    assert torch.equal(low, multi_grained_loss(prediction.float(), target.float(), grain_map)["loss"])


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0)])
def test_one_weight_is_needed_for_each_grain(weights):
    with pytest.raises(ValueError, match="`grain_weights` must be 2 weights"):
        multi_grained_loss(*loss_case(2), grain_weights=weights)


def test_a_map_that_does_not_fit_the_latents_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        multi_grained_loss(torch.zeros(1, 4, 9, 9), torch.zeros(1, 4, 9, 9), torch.zeros(1, 3, 3, dtype=torch.int64))


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
