# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Mean and covariance in one pass: exact, whatever the batches; their files, ours and those of others."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_d2it.evaluation.frechet import frechet_distance
from diffusers_d2it.evaluation.statistics import FeatureStatistics, ReferenceStatistics


N, D = 301, 12
PROTOCOL = {"features": {"name": "linear", "digest": "ab"}, "reference": {"name": "noise ✓", "num_images": N}}


def draw(num_images: int = N, seed: int = 0) -> torch.Tensor:
    """Features that lie far from zero and correlate."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_images, D, generator=generator, dtype=torch.float64)
    return (features @ torch.randn(D, D, generator=generator, dtype=torch.float64) * 0.01 + 100).float()


def count(features: torch.Tensor, batch_size: int = N) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


def assert_same(a: FeatureStatistics, b: FeatureStatistics, rounding: float = 1e-12) -> None:
    assert a.num_images == b.num_images
    for left, right in ((a.mean, b.mean), (a.covariance, b.covariance)):
        assert (left - right).abs().max() <= rounding * right.abs().max()


def test_moments_are_those_of_numpy():
    features = draw()
    statistics = count(features, 32)
    exact = features.double().numpy()
    np.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-14)
    expected = np.cov(exact, rowvar=False)
    np.testing.assert_allclose(statistics.covariance, expected, atol=1e-12 * expected.max())
    assert torch.equal(statistics.covariance, statistics.covariance.T)
    assert statistics.num_images == N


@pytest.mark.parametrize("batch_size", [1, 2, 7, 300])
def test_batches_and_their_order_do_not_count(batch_size):
    features = draw()
    shuffled = features[torch.randperm(N, generator=torch.Generator().manual_seed(1))]
    assert_same(count(shuffled, batch_size), count(features))


def test_far_from_zero_nothing_cancels():
    # The naive sum of squares, 1e16 beside a variance of one, has no digit left
    features = draw().double()
    features = (features - 100) * 100
    moved = torch.round((features + 1e8) * 2**20) / 2**20
    covariance = count(moved, 10).covariance
    expected = count(moved - 1e8).covariance
    assert (covariance - expected).abs().max() < 1e-7 * expected.max()


def test_merging_is_associative_and_has_a_zero():
    a, b, c = (count(part) for part in draw().split([100, 1, 200]))
    left, right, inner = (FeatureStatistics(D) for _ in range(3))
    for part in (a, b, c):
        left.merge(part)
    inner.merge(b)
    inner.merge(c)
    right.merge(a)
    right.merge(inner)
    right.merge(FeatureStatistics(D))
    assert_same(left, right, 1e-13)
    assert_same(left, count(draw()))
    assert (a.num_images, b.num_images, c.num_images) == (100, 1, 200)


def test_merged_with_itself():
    twice = count(draw())
    twice.merge(twice)
    assert_same(twice, count(torch.cat([draw(), draw()])))


def test_empty_batches_add_nothing():
    statistics = count(draw())
    statistics.update(torch.empty(0, D))
    assert_same(statistics, count(draw()), 0)


def test_what_was_handed_out_stays():
    statistics = count(draw())
    mean, covariance = statistics.mean, statistics.covariance
    kept = mean.clone(), covariance.clone()
    statistics.update(draw(seed=1))
    assert torch.equal(mean, kept[0]) and torch.equal(covariance, kept[1])


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.zeros(4, D + 1), r"must be \(B, 12\), got \(4, 13\)"),
        (torch.zeros(D), r"must be \(B, 12\), got \(12,\)"),
        (torch.zeros(4, D, 1, 1), r"must be \(B, 12\)"),
        (torch.zeros(4, D).half(), "must be float32 or float64, got torch.float16"),
        (torch.zeros(4, D, dtype=torch.int64), "must be float32 or float64, got torch.int64"),
        (torch.zeros(3, D), r"`indices` must be \(3,\), one for each row, got \(4,\)"),
        (torch.tensor([0, 1, torch.nan, torch.inf])[:, None].repeat(1, D), "finite, those of images 5, 3 are not"),
    ],
)
def test_refuses(features, message):
    statistics = count(draw())
    with pytest.raises(ValueError, match=message):
        statistics.update(features, torch.tensor([9, 7, 5, 3]))
    assert_same(statistics, count(draw()), 0)


def test_refuses_non_finite_features_without_indices():
    with pytest.raises(ValueError, match="finite, those of rows 1 of the batch are not"):
        count(torch.tensor([[0.0], [torch.nan]]))


def test_needs_images_and_one_width():
    statistics = FeatureStatistics(D)
    with pytest.raises(ValueError, match="a mean needs at least 1 image, got 0"):
        statistics.mean  # noqa: B018
    statistics.update(draw(1))
    with pytest.raises(ValueError, match="a covariance needs at least 2 images, got 1"):
        statistics.covariance  # noqa: B018
    with pytest.raises(ValueError, match="as many features, got 12 and 3"):
        statistics.merge(FeatureStatistics(3))
    with pytest.raises(ValueError, match="`num_features` must be at least 1, got 0"):
        FeatureStatistics(0)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    statistics, spatial = count(draw()), count(draw()[:, :5])
    path = tmp_path / "new" / "statistics.npz"
    statistics.save(path, PROTOCOL, spatial)
    loaded = ReferenceStatistics.load(path)
    assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.covariance, statistics.covariance)
    assert torch.equal(loaded.spatial_mean, spatial.mean)
    assert torch.equal(loaded.spatial_covariance, spatial.covariance)
    assert (loaded.num_images, loaded.protocol) == (N, PROTOCOL)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with np.load(path) as archive:  # as other scripts read it
        assert {*archive.files} == {"mu", "sigma", "mu_s", "sigma_s", "num_images", "protocol"}
        assert archive["sigma"].dtype == np.float64 and json.loads(str(archive["protocol"])) == PROTOCOL
    content = path.read_bytes()
    statistics.save(path, PROTOCOL, spatial)
    assert path.read_bytes() == content  # so that its hash tells what it is


def test_files_of_others(tmp_path):
    statistics = count(draw())
    arrays = {"mu": statistics.mean.float().numpy(), "sigma": statistics.covariance.numpy()}
    # As ADM's, with images and the spatial moments; what is not needed may be anything
    np.savez_compressed(tmp_path / "adm.npz", **arrays, arr_0=np.array([{}]), mu_s=np.ones(2), sigma_s=np.eye(2))
    loaded = ReferenceStatistics.load(str(tmp_path / "adm.npz"))
    assert (loaded.num_images, loaded.protocol) == (None, {})
    assert torch.equal(loaded.spatial_covariance, torch.eye(2, dtype=torch.float64))
    distance = frechet_distance(loaded.mean, loaded.covariance, statistics.mean, statistics.covariance)
    assert distance < 1e-9  # a mean in float32
    np.savez(tmp_path / "bare.npz", **arrays)
    assert ReferenceStatistics.load(tmp_path / "bare.npz").spatial_mean is None


class Planted:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def layouts(folder: Path) -> dict[str, tuple[dict, str]]:
    mu, sigma = np.zeros(3), np.eye(3)
    planted = np.array([Planted(folder / "canary")], dtype=object)
    return {
        "images only": ({"arr_0": mu}, "mu is not there: it holds arr_0"),
        "no sigma": ({"mu": mu}, "sigma is not there: it holds mu"),
        "half of the spatial moments": ({"mu": mu, "sigma": sigma, "mu_s": mu}, "sigma_s is not there"),
        "nothing": ({}, "mu is not there: it holds nothing"),
        "shapes": ({"mu": mu, "sigma": np.eye(4)}, r"sigma of .* must be \(3, 3\).* got \(4, 4\)"),
        "spatial shapes": ({"mu": mu, "sigma": sigma, "mu_s": sigma, "sigma_s": sigma}, r"mu_s of .* must be \(D,\)"),
        "variances": ({"mu": mu, "sigma": mu}, r"sigma of .* must be \(3, 3\).* got \(3,\)"),
        "whole numbers": ({"mu": mu.astype(int), "sigma": sigma}, "mu of .* must be float32 or float64, got int64"),
        "NaN": ({"mu": mu, "sigma": sigma * np.nan}, "sigma of .* must be finite"),
        "not symmetric": ({"mu": mu, "sigma": np.triu(np.ones((3, 3)))}, "sigma of .* must be symmetric"),
        "objects": ({"mu": planted, "sigma": sigma}, "must be a .npz with arrays of numbers.*Object arrays"),
        "protocol as an object": ({"mu": mu, "sigma": sigma, "protocol": planted}, "Object arrays"),
        "protocol": ({"mu": mu, "sigma": sigma, "protocol": "[1]"}, "protocol of .* the text of a JSON object, got '"),
        "protocol cut off": ({"mu": mu, "sigma": sigma, "protocol": '{"a":'}, "the text of a JSON object"),
        "number of images": ({"mu": mu, "sigma": sigma, "num_images": 1}, "num_images of .* at least 2, got 1"),
        "numbers of images": ({"mu": mu, "sigma": sigma, "num_images": [3, 3]}, "num_images of .* whole number"),
    }


@pytest.mark.parametrize("what", layouts(Path()))
def test_layouts_that_are_refused(tmp_path, what):
    arrays, message = layouts(tmp_path)[what]
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        ReferenceStatistics.load(tmp_path / "file.npz")
    assert str(tmp_path / "file.npz") in str(error.value)
    assert not (tmp_path / "canary").exists()


def test_damaged_files(tmp_path):
    path = tmp_path / "file.npz"
    with pytest.raises(ValueError, match="file.npz is missing"):
        ReferenceStatistics.load(path)
    count(draw()).save(path, PROTOCOL)
    whole = path.read_bytes()
    damaged = [whole[:400], b"", b"<html>", pickle.dumps({"mu": 1}), whole[:200] + b"\1" + whole[201:]]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file.npz"):
            ReferenceStatistics.load(path)
    np.save(tmp_path / "array.npy", np.eye(3))
    with pytest.raises(ValueError, match=r"one array of shape \(3, 3\)"):
        ReferenceStatistics.load(tmp_path / "array.npy")
    with zipfile.ZipFile(path, "w") as archive:  # a header that promises more than there is memory
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match="file.npz"):
        ReferenceStatistics.load(path)


def test_a_save_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.npz"
    count(draw()).save(path, PROTOCOL)
    content = path.read_bytes()
    other = count(draw(seed=1))
    with pytest.raises(ValueError, match="`protocol` must hold JSON values"):
        other.save(path, {"when": object()})
    with pytest.raises(ValueError, match="`spatial` must be of the same images, got 4 beside 301"):
        other.save(path, PROTOCOL, count(draw(4)))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        count(draw(1)).save(path, PROTOCOL)
    assert path.read_bytes() == content and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="saved as .npz, got file.npy"):
        other.save(path.with_suffix(".npy"), PROTOCOL)
