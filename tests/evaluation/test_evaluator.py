# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Metrics of small sets of crops, in the features of a small network. Several processes: examples/test_evaluate.py."""

import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from image_files import encode, photo, write_folder
from metric_inputs import crops, refused, small_network
from torch import nn

from diffusers_d2it.evaluation import (
    Evaluator,
    FeatureExtractor,
    ImageSet,
    ModuleFeatures,
    evaluate,
    open_images,
    open_reference,
    save_statistics,
)
from diffusers_d2it.evaluation.results import compare, differences
from diffusers_d2it.evaluation.scores import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")  # top1 needs another network: test_classifier.py
NAMES = ["fd_small", "sfd_small", "is_small", "precision_small", "recall_small", "kd_small"]  # in the order of METRICS


@pytest.fixture(scope="module")
def samples() -> ImageSet:
    return ImageSet.from_tensor(crops(60, seed=0), "samples")


@pytest.fixture(scope="module")
def reference() -> ImageSet:
    return ImageSet.from_tensor(crops(50, seed=1), "reference")


def scores(samples, reference, features, metrics=METRICS, **kwargs) -> dict:
    """The results by name."""
    results = evaluate(samples, reference, metrics, features, **{"kid_subset_size": 20, "batch_size": 16} | kwargs)
    return {result.metric: result for result in results}


# ---- Values ----


def test_values_are_those_of_the_functions(samples, reference, features):
    ours, theirs = (features(images[0 : len(images)]) for images in (samples, reference))

    def distance(output: str) -> float:
        sides = (side[output].double() for side in (ours, theirs))
        return frechet_distance(*(moment for side in sides for moment in (side.mean(dim=0), side.T.cov())))

    expected = {"fd_small": distance("pool"), "sfd_small": distance("spatial")}
    expected["is_small"], deviation = inception_score(ours["logits"])
    expected["precision_small"], expected["recall_small"] = precision_recall(theirs["pool"], ours["pool"])
    expected["kd_small"] = kernel_distance(ours["pool"], theirs["pool"], 20)[0]
    found = scores(samples, reference, features)
    assert list(found) == NAMES
    assert {name: result.value for name, result in found.items()} == pytest.approx(expected, rel=1e-6)
    assert found["is_small"].deviation == pytest.approx(deviation) and expected["precision_small"] < 1


def test_values_do_not_depend_on_batches_order_or_workers(samples, reference, features):
    expected = scores(samples, reference, features)
    for kwargs in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 1000}, {"num_workers": 1}):
        found = scores(samples, reference, features, **kwargs)
        for name in NAMES:
            assert found[name].value == pytest.approx(expected[name].value, rel=1e-6), (name, kwargs)
            assert compare(expected[name], found[name]) == pytest.approx(0, abs=1e-6)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = ImageSet.from_tensor(samples[0:60][order], "shuffled")
    found = scores(shuffled, reference, features)
    for name in ("fd_small", "sfd_small", "precision_small", "recall_small"):
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-6), name
    assert found["is_small"].value == pytest.approx(expected["is_small"].value, rel=0.05)  # other splits
    named = expected["fd_small"].protocol["samples"] | {"name": "shuffled"}
    assert found["fd_small"].protocol == expected["fd_small"].protocol | {"samples": named}


def test_kid_depends_on_its_seed_and_says_so(samples, reference, features):
    a, b = (scores(samples, reference, features, ["kid"], seed=seed)["kd_small"] for seed in (0, 1))
    assert a.value != b.value and differences(a, b) == {"settings.seed": (0, 1)}


def test_each_image_is_given_to_the_network_once_and_a_reference_for_many_sets(samples, reference):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.count = small_network(), 0

        def forward(self, pixels):
            self.count += len(pixels)
            return self.network(pixels)

    counting = Counting().eval()
    features = ModuleFeatures(counting, "counting")
    expected = scores(samples, reference, features)
    assert counting.count == 1 + 60 + 50  # a black one shows what features there are
    counting.count = 0
    evaluator = Evaluator(reference, METRICS, features, kid_subset_size=20, batch_size=16)
    for _ in range(2):
        assert evaluator(samples) == list(expected.values())
    assert counting.count == 2 * (1 + 60) + 50


def test_unknown_classes_are_refused_before_any_image_is_read(samples):
    class Classifier(FeatureExtractor):
        name, preprocessing, count = "classifier", "none", 0

        def extract(self, images):
            self.count += len(images)
            return {"pool": torch.zeros(len(images), 2), "imagenet": torch.zeros(len(images), 1000)}

    classifier = Classifier()
    refused("samples .*classes", scores, samples, None, classifier, ["top1"])
    assert classifier.count == 1  # the black one


def test_a_covariance_is_allocated_once_for_all_batches(samples, monkeypatch):
    made = []

    class Noted(FeatureStatistics):
        def __init__(self, num_features):
            made.append(num_features)
            super().__init__(num_features)

    monkeypatch.setattr(sys.modules[Evaluator.__module__], "FeatureStatistics", Noted)
    scores(samples, samples, ModuleFeatures(small_network(), "small"), ["fid", "sfid"])
    assert sorted(made) == [8, 8, 18, 18]  # of either set


class Misdealt(ImageSet):
    """Images 3 and 4 are missing, 5 and 6 come twice."""

    def batches(self, *arguments, **options):
        for places, pixels in super().batches(*arguments, **options):
            yield torch.where((places == 3) | (places == 4), places + 2, places), pixels


def test_images_that_are_missing_or_come_twice_are_named(samples, features):
    wrong = Misdealt("misdealt", 60, samples.__getitem__, (32, 32))
    refused("60 .*misdealt.*: 3, 4", scores, wrong, None, features, ["is"])


# ---- Protocols ----


def test_protocol_tells_how_a_figure_was_measured(samples, reference, features):
    found = scores(samples, reference, features)
    protocol = found["kd_small"].protocol
    assert protocol["features"] == features.describe() and protocol["features"]["digest"] == features.digest
    assert protocol["samples"]["num_images"] == 60 and protocol["samples"]["resolution"] == [32, 32]
    assert protocol["reference"]["name"] == "reference" and len(protocol["reference"]["digest"]) == 64
    assert protocol["settings"] == {"num_subsets": 100, "subset_size": 20, "seed": 0}
    assert {"diffusers_d2it", "torch"} <= set(protocol["versions"])
    assert "reference" not in found["is_small"].protocol
    assert scores(samples, None, features, ["is"])["is_small"] == found["is_small"]
    assert found["is_small"].deviation > 0 and found["fd_small"].deviation is None


def test_other_images_or_weights_are_another_protocol(samples, reference, features):
    a = scores(samples, reference, features, ["fid"])["fd_small"]
    others = {
        "reference.digest": (samples, ImageSet.from_tensor(crops(50, seed=2), "reference"), features),
        "features.digest": (samples, reference, ModuleFeatures(small_network(1), "small")),
        "samples.num_images": (ImageSet.from_tensor(samples[0:40], "samples"), reference, features),
    }
    for field, inputs in others.items():
        b = scores(*inputs, ["fid"])["fd_small"]
        assert list(differences(a, b)) == [field]
        refused(f"{field}: ", compare, a, b)


def test_a_covariance_without_full_rank_is_said(samples, reference, features):
    with pytest.warns(UserWarning, match="sfd_small: .* 18 features"):
        few = ImageSet.from_tensor(samples[0:18], "few")
        found = scores(few, reference, features, ["fid", "sfid"])
    assert [result.protocol["rank_deficient"] for result in found.values()] == [False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough = ImageSet.from_tensor(samples[0:19], "enough")
        assert not scores(enough, reference, features, ["sfid"])["sfd_small"].protocol["rank_deficient"]


# ---- Statistics as reference ----


@pytest.fixture(scope="module")
def statistics(reference, features, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "reference.npz"
    save_statistics(path, reference, features, batch_size=8)
    return path


def test_saved_statistics_are_as_good_as_the_images(samples, reference, features, statistics):
    assert open_reference(statistics) == statistics
    expected = scores(samples, reference, features, ["fid", "sfid"])
    found = scores(samples, statistics, features, ["fid", "sfid", "is"])
    for name in expected:
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-9)
        assert compare(expected[name], found[name]) == pytest.approx(0, abs=1e-9)  # they were measured alike


def test_statistics_of_others_with_images_serve_all_metrics(samples, reference, features, statistics, tmp_path):
    # As ADM's: mu and sigma of many images, and some images
    with np.load(statistics) as archive:
        arrays = {name: archive[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    some = reference[0:30]
    np.savez(tmp_path / "adm.npz", some.permute(0, 2, 3, 1).numpy(), **arrays)
    found = scores(samples, open_reference(tmp_path / "adm.npz"), features)
    expected = scores(samples, reference, features)
    of_some = scores(samples, ImageSet.from_tensor(some, "some"), features)
    for name in NAMES:
        source = of_some if name in ("precision_small", "recall_small", "kd_small") else expected
        assert found[name].value == pytest.approx(source[name].value, rel=1e-9), name
    described = found["fd_small"].protocol["reference"]
    assert described["num_images"] is None and len(described["statistics_sha256"]) == 64
    assert "reference.statistics_sha256" in differences(found["fd_small"], expected["fd_small"])


def test_statistics_that_do_not_fit_are_refused(samples, reference, features, statistics, tmp_path):
    refused("reference.npz.* 'precision'", scores, samples, statistics, features, ["fid", "precision"])
    other = ModuleFeatures(small_network(1), "small")
    refused("reference.npz.* digest ", scores, samples, statistics, other, ["fid"])
    larger = ImageSet.from_tensor(crops(20, seed=0, side=40), "larger")
    refused("40x40 .*larger.*32x32 .*reference.npz", scores, larger, statistics, features, ["fid"])
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(5), sigma=np.eye(5))
    refused("foreign.npz.* 5, not 8", scores, samples, tmp_path / "foreign.npz", features, ["fid"])
    refused("foreign.npz.* mu_s ", scores, samples, tmp_path / "foreign.npz", features, ["sfid"])
    np.savez(tmp_path / "images.npz", samples[0:2].permute(0, 2, 3, 1).numpy())
    assert isinstance(open_reference(tmp_path / "images.npz"), ImageSet)
    refused("images.npz.* mu ", scores, samples, tmp_path / "images.npz", features, ["fid"])


# ---- What is refused ----


@pytest.mark.parametrize("metrics", [["fid", "lpips"], ["fid", "fid"], []])
def test_metrics_are_known_and_each_once(samples, reference, features, metrics):
    refused("`metrics`.*fid, sfid, is, precision, recall, kid", scores, samples, reference, features, metrics)


@pytest.mark.parametrize(
    "metric, least", [("fid", 2), ("sfid", 2), ("is", 10), ("precision", 4), ("recall", 4), ("kid", 20)]
)
def test_too_few_images_are_refused_and_how_many_are_needed_is_said(samples, reference, features, metric, least):
    few, enough = (ImageSet.from_tensor(crops(n, seed=0), "few") for n in (least - 1, least))
    message = f"'{metric}'.* {least} images.*got {least - 1} in few"
    refused(message, scores, few, reference, features, [metric])
    if metric != "is":
        refused(message, scores, samples, few, features, [metric])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert math.isfinite(scores(enough, enough, features, [metric]).popitem()[1].value)


def test_statistics_tell_how_many_images_they_are_of(features, tmp_path):
    write_folder(tmp_path / "photos", {f"{i}.png": encode(photo(i, 64)) for i in range(4)} | {"cut.png": b"<html>"})
    images = open_images(tmp_path / "photos", 32)
    assert save_statistics(tmp_path / "real.npz", images, features) == 4
    with np.load(tmp_path / "real.npz") as found:
        assert found["num_images"] == 4 == json.loads(str(found["protocol"]))["images"]["num_images"]


def test_statistics_need_two_images_and_their_ending(features, tmp_path):
    one, two = (ImageSet.from_tensor(crops(number, 0), "few") for number in (1, 2))
    refused("2 images, got 1", save_statistics, tmp_path / "one.npz", one, features)
    refused("`path`.*npz.*statistics.pt", save_statistics, tmp_path / "statistics.pt", two, features)


def test_metrics_need_features_reference_and_sizes_that_fit(samples, reference):
    plain = ModuleFeatures(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()).eval(), "plain")
    refused("'is'.*'logits'.*'plain'.*'pool'", scores, samples, reference, plain, ["is"])
    refused("'sfid'.*'spatial'.*'plain'.*'pool'", scores, samples, reference, plain, ["sfid"])
    refused("`reference`", scores, samples, None, plain, ["fid"])
    larger = ImageSet.from_tensor(crops(20, seed=0, side=40), "larger")
    refused("32x32 .*samples.*40x40 .*larger", scores, samples, larger, plain, ["fid"])
    refused("`kid_subset_size`.*got 1", scores, samples, reference, plain, ["kid"], kid_subset_size=1)


def test_images_with_features_that_are_not_finite_are_named(samples, reference):
    class Broken(nn.Module):
        def forward(self, pixels):
            mean = pixels.mean(dim=(2, 3))
            return torch.where(mean[:, :1] > 0.3, torch.nan, mean)

    refused(r"finite.*images \d+", scores, samples, reference, ModuleFeatures(Broken().eval(), "broken"), ["fid"])
