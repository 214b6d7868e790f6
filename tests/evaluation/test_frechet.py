# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The Frechet distance against closed forms, matrix roots, and other libraries."""

import warnings

import numpy as np
import pytest
import torch
from metric_inputs import refused
from scipy import linalg
from scipy.stats import ortho_group
from torch import nn

from diffusers_d2it.evaluation.scores import FeatureStatistics, frechet_distance


D = 24


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def moments(num_images: int, seed: int, num_features: int = D) -> tuple[np.ndarray, np.ndarray]:
    """Of features whose deviations range from 1 to 1e-3."""
    features = draw(seed, num_images, num_features) * np.logspace(0, -3, num_features) + draw(seed + 1, num_features)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def rotation(seed: int, size: int = D) -> np.ndarray:
    return ortho_group(size, seed=seed).rvs()


def root_route(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """The formula as it is printed, by scipy's root of a matrix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a singular product
        root = linalg.sqrtm(covariance_a @ covariance_b)
    return np.square(mean_a - mean_b).sum() + np.trace(covariance_a + covariance_b - 2 * root.real)


@pytest.mark.parametrize("axes", [np.eye(D), rotation(2)], ids=["straight", "rotated"])
def test_covariances_that_commute(axes):
    a, b, mean_a, mean_b = np.exp(draw(0, D)), np.exp(draw(1, D)), draw(3, D), draw(4, D)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    covariances = [axes @ np.diag(values) @ axes.T for values in (a, b)]
    assert frechet_distance(mean_a, covariances[0], mean_b, covariances[1]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_images", [1000, D + 1, D // 2, 2])
def test_identical_sets_have_no_distance(num_images):
    mean, covariance = moments(num_images, 0)
    assert 0 <= frechet_distance(mean, covariance, mean.copy(), covariance.copy()) < 1e-12 * np.trace(covariance)


def test_scaled_covariances_over_fourteen_decades():
    # Each root is off by 1e-8 where eigenvalues of the product are taken; the whole trace is to be right to 1e-13
    axes = rotation(0, 200)
    covariance = axes @ np.diag(np.logspace(0, -14, 200)) @ axes.T
    covariance = (covariance + covariance.T) / 2
    zeros = np.zeros(200)
    for factor, share in ((1.0, 0.0), (4.0, 1.0)):
        distance = frechet_distance(zeros, covariance, zeros, factor * covariance)
        assert distance == pytest.approx(share * np.trace(covariance), abs=1e-11)


def test_low_ranks():
    zeros, a, b, nothing = np.zeros(D), draw(0, D), draw(1, D), np.zeros((D, D))
    expected = a @ a + b @ b - 2 * abs(a @ b)
    assert frechet_distance(zeros, np.outer(a, a), zeros, np.outer(b, b)) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(zeros, np.outer(a, a), zeros, nothing) == pytest.approx(a @ a, rel=1e-12)
    assert frechet_distance(a, nothing, b, nothing) == pytest.approx(np.square(a - b).sum(), rel=1e-12)
    axes = rotation(0)
    one, other = (part @ part.T for part in (axes[:, : D // 2], 3 * axes[:, D // 2 :]))  # nothing in common
    assert frechet_distance(zeros, one, zeros, other) == pytest.approx(D / 2 + 9 * D / 2, rel=1e-12)


@pytest.mark.parametrize("sizes", [(500, 400), (500, D // 2), (D // 2, D // 3)])
def test_agrees_with_the_root_of_a_matrix(sizes):
    a, b = moments(sizes[0], 0), moments(sizes[1], 10)
    distance = frechet_distance(*a, *b)
    assert distance == pytest.approx(root_route(*a, *b), rel=1e-5)
    # Arguments may change places, and axes may turn
    assert frechet_distance(*b, *a) == pytest.approx(distance, rel=1e-12)
    axes = rotation(3)
    turned = [(axes @ mean, axes @ covariance @ axes.T) for mean, covariance in (a, b)]
    turned = [(mean, (covariance + covariance.T) / 2) for mean, covariance in turned]
    assert frechet_distance(*turned[0], *turned[1]) == pytest.approx(distance, rel=1e-7)


def test_float32_and_tensors():
    a, b = moments(500, 0), moments(D // 2, 10)
    exact = frechet_distance(*a, *b)
    assert frechet_distance(*(torch.from_numpy(x) for x in (*a, *b))) == exact
    assert frechet_distance(*(x.astype(np.float32) for x in (*a, *b))) == pytest.approx(exact, rel=1e-2)
    halves = [torch.from_numpy(x).bfloat16() for x in (*a, *b)]
    refused("`mean_a`.*float32 or float64.*bfloat16", frechet_distance, *halves)


def test_agrees_with_torchmetrics():
    from torchmetrics.image import fid

    features = nn.Flatten()
    features.num_features = D
    metric = fid.FrechetInceptionDistance(features, normalize=True).set_dtype(torch.float64)
    metric.inception.to(torch.float64)
    sides = []
    for real, num_images in ((True, 400), (False, 10)):  # one of full rank, one not
        generator = torch.Generator().manual_seed(num_images)
        images = torch.rand(num_images, 3, 2, 4, generator=generator, dtype=torch.float64) ** (1 + real)
        metric.update(images, real=real)
        sides.append(FeatureStatistics(D))
        sides[-1].update(images.flatten(1))
    distance = frechet_distance(*sides[0].moments, *sides[1].moments)
    assert distance == pytest.approx(metric.compute().item(), rel=1e-6)


def faults() -> dict[str, tuple[list, str]]:
    """Arguments that are refused, and what the error says."""
    mean, covariance = moments(100, 0)
    axis = rotation(1)[:, :1]
    skew, hole = covariance.copy(), covariance.copy()
    skew[0, 1] += 1e-3
    hole[2, 2] = np.nan
    indefinite = covariance - 0.1 * np.trace(covariance) * axis * axis.T
    definite = "semi-definite.* -"
    return {
        "shape of a mean": ([mean[None], covariance, mean, covariance], "`mean_a`.*.D,."),
        "shape": ([mean, covariance, mean, covariance[:-1]], r"`covariance_b`.*\(24, 24\).*got \(23, 24\)"),
        "sizes": ([mean, covariance, mean[:3], covariance[:3, :3]], "got 24 and 3"),
        "whole numbers": ([mean, covariance.astype(int), mean, covariance], "`covariance_a`.*float64, got int64"),
        "NaN": ([mean, covariance, mean, hole], "`covariance_b`.*finite.* 1 NaN"),
        "infinite mean": ([mean, covariance, mean + np.inf, covariance], "`mean_b`.*finite"),
        "not symmetric": ([mean, skew, mean, covariance], "`covariance_a`.*symmetric.*0.001"),
        "indefinite": ([mean, covariance, mean, indefinite], f"`covariance_b`.*{definite}"),
        "negative": ([mean, -covariance, mean, covariance], f"`covariance_a`.*{definite}"),
        "too large": ([1e200 * mean, covariance, mean, covariance], "inf"),
    }


@pytest.mark.parametrize("what", faults())
def test_refuses(what):
    arguments, message = faults()[what]
    refused(message, frechet_distance, *arguments)


def test_both_halves_of_a_covariance_count():
    mean, covariance = moments(100, 0)
    skew = covariance + 1e-8 * np.triu(draw(1, D, D))
    distance = frechet_distance(mean, skew, mean, 2 * covariance)
    assert distance == frechet_distance(mean, skew.T, mean, 2 * covariance)


def test_what_rounding_leaves_is_no_fault():
    mean, covariance = moments(D // 2, 0)
    noise = 1e-9 * np.trace(covariance) / D * draw(3, D, D)
    rounded = covariance + noise + noise.T
    assert np.linalg.eigvalsh(rounded)[0] < 0
    assert frechet_distance(mean, rounded, mean, covariance) < 1e-3 * np.trace(covariance)
