# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Diagnostics of grain maps: answers known by hand, and what must hold for any map."""

import math

import pytest
import torch
from metric_inputs import refused

from diffusers_d2it.evaluation.grain_maps import fine_ratio_error, map_accuracy, spatial_coherence
from diffusers_d2it.pipelines.grain_maps import random_grain_map


COARSE, FINE = [[0, 0], [0, 0]], [[1, 1], [1, 1]]
HALF, CHEQUERED = [[1, 1], [0, 0]], [[1, 0], [0, 1]]


def maps(*rows: list) -> torch.Tensor:
    return torch.tensor(rows)


def random_maps(shape: tuple[int, int, int], num_grains: int = 2, fine_ratio: float = 0.5) -> torch.Tensor:
    return random_grain_map(shape, num_grains, fine_ratio, torch.Generator().manual_seed(0), torch.device("cpu"))


def test_share_error_by_hand():
    found = fine_ratio_error(maps(FINE, COARSE), maps(HALF, HALF, HALF), 2)
    # Means are equal; shares 1 and 0 have to be moved by one half each to become one half
    assert found == {
        "fine_share": 0.5,
        "fine_share_real": 0.5,
        "error": 0.0,
        "std": 0.5,
        "std_real": 0.0,
        "std_error": 0.5,
        "wasserstein": 0.5,
    }


def test_share_error_has_a_sign_and_equals_the_distance_of_a_shift():
    found = fine_ratio_error(maps(HALF, COARSE), maps(FINE, HALF), 2)  # 1/2, 0 against 1, 1/2
    assert found["error"] == -0.5 and found["wasserstein"] == 0.5 and found["std_error"] == 0


def test_only_the_finest_of_three_grains_is_fine():
    middle, finest = maps([[1, 1], [1, 1]]), maps([[2, 2], [2, 0]])
    found = fine_ratio_error(middle, finest, 3)
    assert (found["fine_share"], found["fine_share_real"]) == (0, 0.75)


def test_order_of_the_images_does_not_matter():
    many = random_maps((20, 4, 4), fine_ratio=0.3)
    found = fine_ratio_error(many, many.flip(0), 2)
    assert found["error"] == 0 and found["wasserstein"] == pytest.approx(0, abs=1e-12)


def test_accuracy_by_hand():
    # 3 of 4 equal; fine shares 1/4 and 1/2, so chance is 1/4 * 1/2 + 3/4 * 1/2
    found = map_accuracy(maps([[1, 0], [0, 0]]), maps([[1, 1], [0, 0]]), 2)
    assert found == {"accuracy": 0.75, "chance": 0.5, "above_chance": 0.5}


@pytest.mark.parametrize("num_grains", [2, 3, 4])
def test_equal_maps_are_one_and_independent_ones_are_chance(num_grains):
    many = random_maps((500, 8, 8), num_grains, 0.4)
    assert map_accuracy(many, many.clone(), num_grains)["accuracy"] == 1
    assert map_accuracy(many, many.clone(), num_grains)["above_chance"] == 1
    found = map_accuracy(many[:250], many[250:], num_grains)
    shares = torch.tensor([0.6 / (num_grains - 1)] * (num_grains - 1) + [0.4])
    assert found["chance"] == pytest.approx(shares.square().sum().item(), abs=0.01)
    assert found["above_chance"] == pytest.approx(0, abs=0.02)


def test_a_constant_map_is_no_better_than_chance():
    found = map_accuracy(maps(FINE), maps(HALF), 2)
    assert found == {"accuracy": 0.5, "chance": 0.5, "above_chance": 0}
    assert math.isnan(map_accuracy(maps(FINE), maps(FINE), 2)["above_chance"])


def test_coherence_by_hand():
    # Pairs of HALF: both horizontal ones equal, no vertical one. Of six pairs of its regions two are equal.
    assert spatial_coherence(maps(HALF), 2) == pytest.approx({"agreement": 1 / 2, "chance": 1 / 3, "coherence": 1 / 4})
    found = spatial_coherence(maps(CHEQUERED), 2)
    assert found == pytest.approx({"agreement": 0, "chance": 1 / 3, "coherence": -1 / 2})
    wide = maps([[0, 0, 0, 1, 1, 1]])  # one row: 4 of 5 pairs
    assert spatial_coherence(wide, 2)["agreement"] == 0.8
    assert spatial_coherence(wide.transpose(1, 2), 2)["agreement"] == 0.8


def test_pairs_do_not_reach_over_the_edge():
    # 01 / 12 / 20: a flattened map would pair the end of a row with the beginning of the next, 1 = 1 and 2 = 2
    assert spatial_coherence(maps([[0, 1], [1, 2], [2, 0]]), 3)["agreement"] == 0


def test_constant_maps_weigh_nothing_beside_others_and_are_coherent_alone():
    alone, beside = spatial_coherence(maps(HALF), 2), spatial_coherence(maps(HALF, FINE, COARSE), 2)
    assert beside["coherence"] == pytest.approx(alone["coherence"]) and beside["agreement"] > alone["agreement"]
    assert spatial_coherence(maps(FINE, COARSE), 2) == {"agreement": 1, "chance": 1, "coherence": 1}


@pytest.mark.parametrize("num_grains", [2, 3, 4])
@pytest.mark.parametrize("fine_ratio", [0.1, 0.5, 0.9])
def test_independent_regions_are_not_coherent(num_grains, fine_ratio):
    found = spatial_coherence(random_maps((400, 8, 8), num_grains, fine_ratio), num_grains)
    assert found["coherence"] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("symmetry", [lambda m: m.flip(1), lambda m: m.flip(2), lambda m: m.transpose(1, 2)])
def test_coherence_has_the_symmetries_of_the_square(symmetry):
    many = random_maps((20, 6, 6), 3, 0.3).repeat_interleave(2, dim=1)[:, :6]
    assert spatial_coherence(symmetry(many), 3) == pytest.approx(spatial_coherence(many, 3), rel=1e-12)


def test_photographs_are_coherent_and_their_regions_shuffled_are_not(make_vae, load_photos):
    # Their shares differ much, from mostly coarse to all fine: that alone is no coherence
    real = make_vae().encode(load_photos(64)).grain_map
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(64, generator=generator) for _ in range(100)])
    shuffled = real.flatten(1)[:, orders].reshape(-1, 8, 8)
    real, shuffled = spatial_coherence(real, 2), spatial_coherence(shuffled, 2)
    assert shuffled["chance"] == pytest.approx(real["chance"])
    assert shuffled["coherence"] == pytest.approx(0, abs=0.02) and real["coherence"] > 0.15


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fine_ratio_error(maps(HALF), maps(HALF).float(), 2), "`real`.*int64"),
        (lambda: fine_ratio_error(maps(HALF)[0], maps(HALF), 2), r"`predicted`.*\(B, h, w\)"),
        (lambda: fine_ratio_error(maps(HALF), torch.zeros(1, 3, 2).long(), 2), r"\(2, 2\).*\(3, 2\)"),
        (lambda: map_accuracy(maps(HALF), maps(HALF, FINE), 2), r"\(1, 2, 2\) and \(2, 2, 2\)"),
        (lambda: map_accuracy(maps(HALF), 2 * maps(HALF), 2), "`true`"),
        (lambda: map_accuracy("fine", maps(HALF), 2), "`predicted`.* str"),
        (lambda: spatial_coherence(maps([[1]]), 2), "`maps`.*got one"),
        (lambda: spatial_coherence(-maps(HALF), 2), "`maps`"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    refused(message, call)
