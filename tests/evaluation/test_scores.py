# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Inception Score, KID, precision and recall: closed forms, plain references, and other libraries."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from metric_inputs import refused

from diffusers_d2it.evaluation.scores import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


D = 8


def draw(num_images: int, seed: int = 0, num_features: int = D) -> torch.Tensor:
    return torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(seed))


# ---- Inception Score ----


def test_scores_in_closed_form():
    one = pytest.approx(1, rel=1e-12), pytest.approx(0, abs=1e-12)
    assert inception_score(torch.full((40, 5), 3.0)) == one
    # Of certain predictions the number of classes: the others have a probability of zero, which has no logarithm
    certain = 2000.0 * torch.eye(5)
    assert inception_score(certain.repeat(20, 1), num_splits=1) == (pytest.approx(5, rel=1e-12), 0)
    assert inception_score(certain[:3].repeat(20, 1), num_splits=1) == (pytest.approx(3, rel=1e-12), 0)


def test_splits_of_unlike_sizes_are_cut_where_torch_fidelity_cuts_them():
    logits = (3 * draw(103)).double()
    shuffled = logits[torch.from_numpy(np.random.RandomState(2020).permutation(103))]
    scores = []
    for i in range(10):
        p = shuffled[i * 103 // 10 : (i + 1) * 103 // 10].softmax(dim=1)
        scores.append((p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp().item())
    assert inception_score(logits) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # that it keeps all features, that one split has no deviation
def test_score_agrees_with_torchmetrics():
    from torchmetrics.image import inception

    logits = 3 * draw(200).double()
    metric = inception.InceptionScore(torch.nn.Flatten(), splits=1).set_dtype(torch.float64)
    metric.inception.to(torch.float64)
    metric.update(logits)
    assert inception_score(logits, num_splits=1)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-10)


def test_score_refuses():
    refused("10 splits.*at least 10.*got 9", inception_score, draw(9))
    refused("`num_splits`.*got 0", inception_score, draw(9), 0)
    logits = draw(20)
    logits[19] = -torch.inf
    refused("`logits`.*finite.*images 19 ", inception_score, logits)


# ---- Kernel distance ----


def test_kernel_distance_agrees_with_torchmetrics():
    from torchmetrics.image import kid

    a, b = draw(300).double(), draw(300, seed=1).double() * 1.2 + 0.1
    mean, std = kernel_distance(a, b, subset_size=300, num_subsets=2)
    assert mean == pytest.approx(kid.poly_mmd(a, b).item(), rel=1e-9) and std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_draws_by_its_seed():
    a, b = draw(90), draw(80, seed=1) + 0.1
    first = kernel_distance(a, b, 30, 5, seed=3)
    assert kernel_distance(a, b, 30, 5, seed=3) == first != kernel_distance(a, b, 30, 5, seed=4)


# ---- Precision and recall ----


def plain_precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int) -> tuple[float, float]:
    """By all distances at once, each from the difference of two rows."""

    def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.double()[:, None] - b.double()).square().sum(dim=-1)

    def share_inside(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = distances(centres, centres).sort(dim=1).values[:, k]  # the first is the centre itself
        return (distances(points, centres) <= radii).any(dim=1).double().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


@pytest.mark.parametrize("block_size", [16, 50, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_all_distances(k, block_size):
    real, fake = draw(120), 0.8 * draw(90, seed=1) + 0.3
    expected = plain_precision_recall(real, fake, k)
    assert 0.05 < min(expected) and max(expected) < 0.98
    assert precision_recall(real, fake, k, block_size) == expected
    assert precision_recall(real, fake.double(), k, block_size) == expected


def test_a_point_is_not_its_own_neighbour():
    # On a line with gaps of one, the ball of each reaches to the next point and not beyond, ends included
    real = torch.arange(10.0)[:, None]
    fake = torch.tensor([[-0.9], [-1.1], [9.9], [10.1]])
    assert precision_recall(real, fake, k=1)[0] == 0.5
    assert precision_recall(real, torch.tensor([[-1.0], [10.0], [0.5], [11.1]]), k=1)[0] == 0.75  # balls are closed


@pytest.mark.parametrize("block_size", [5, 32, 1000])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_copies_fill_balls_without_extent(offset, block_size):
    # Four copies of each image: the third neighbour lies at no distance, where the product of large numbers leaves
    # something above or below zero
    images = (draw(30, num_features=300) + offset).double()
    real = images.repeat(4, 1)
    assert precision_recall(real, images.repeat(4, 1).flip(0), block_size=block_size) == (1, 1)
    assert precision_recall(real, images[:13], block_size=block_size)[0] == 1
    assert precision_recall(real, images + 1e-3, block_size=block_size)[0] == 0
    assert precision_recall(images[::2].repeat(4, 1), real, block_size=block_size) == (0.5, 1)


@pytest.mark.parametrize("score", [kernel_distance, precision_recall])
def test_sets_that_are_refused(score):
    few = {kernel_distance: "1000.*got 3 in `b`", precision_recall: " 4 .*got 3 in `fake`"}
    whole = draw(1000)
    hole = whole.clone()
    hole[700, 1] = torch.nan
    refused(few[score], score, whole, draw(3))
    refused("got 8 and 5", score, whole, draw(1000, num_features=5))
    refused(r"`(b|fake)`.*\(1000, 2, 4\)", score, whole, whole.view(1000, 2, 4))
    refused("`(b|fake)`.*torch.float16", score, whole, whole.half())
    refused("`(b|fake)`.*finite.*images 700 ", score, whole, hole)
    refused("overflow", score, whole, whole.double() * 1e160)


def test_numbers_that_are_refused():
    features = draw(10)
    refused("`subset_size`.*got 1", kernel_distance, features, features, 1, 1)
    refused("`num_subsets`.*got 0", kernel_distance, features, features, 5, 0)
    refused("`k`.*got 0", precision_recall, features, features, 0)
    refused("`block_size`.*got 0", precision_recall, features, features, 3, 0)


# ---- torch-fidelity ----


@pytest.mark.skipif(not (find_spec("torch_fidelity") and find_spec("torchvision")), reason="needs the extra inception")
def test_agrees_with_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, fake = draw(400, num_features=32), 0.9 * draw(303, seed=1, num_features=32) + 0.1
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(one.double()) for one in (real, fake)), False)
    theirs |= isc_features_to_metric(fake) | kid_features_to_metric(fake, real, kid_subset_size=100, verbose=False)
    if find_spec("torch_fidelity.metric_prc"):  # from 0.4
        from torch_fidelity.metric_prc import prc_features_to_metric

        theirs |= prc_features_to_metric(fake, real, verbose=False)
    sides = [FeatureStatistics(32) for _ in range(2)]
    for side, features in zip(sides, (real, fake)):
        side.update(features)
    kernel = kernel_distance(fake, real, subset_size=100, seed=2020)
    ours = {"frechet_inception_distance": frechet_distance(*sides[0].moments, *sides[1].moments)}
    ours |= dict(zip(("inception_score_mean", "inception_score_std"), inception_score(fake)))
    ours |= dict(zip(("kernel_inception_distance_mean", "kernel_inception_distance_std"), kernel))
    ours |= dict(zip(("precision", "recall"), precision_recall(real, fake)))
    for name in ours.keys() & theirs.keys():
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
