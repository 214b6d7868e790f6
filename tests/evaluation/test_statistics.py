# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Mean and covariance in one pass: exact, whatever the batches; their files, ours and those of others."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_inputs import refused

from diffusers_d2it.evaluation.results import read_statistics, write_statistics
from diffusers_d2it.evaluation.scores import FeatureStatistics, frechet_distance


N, D = 301, 12
PROTOCOL = {"features": {"name": "linear", "digest": "ab"}, "images": {"name": "noise ✓", "num_images": N}}


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
    for left, right in zip(a.moments, b.moments):
        assert (left - right).abs().max() <= rounding * right.abs().max()


def save(path: Path, features: torch.Tensor, protocol: dict = PROTOCOL, spatial: torch.Tensor | None = None) -> dict:
    """Write the statistics of features; what was written."""
    moments = {"pool": count(features).moments} | ({} if spatial is None else {"spatial": count(spatial).moments})
    write_statistics(path, moments, len(features), protocol)
    return moments


def test_moments_are_those_of_numpy():
    features = draw()
    statistics = count(features, 32)
    mean, covariance = statistics.moments
    exact = features.double().numpy()
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-14)
    expected = np.cov(exact, rowvar=False)
    np.testing.assert_allclose(covariance, expected, atol=1e-12 * expected.max())
    assert torch.equal(covariance, covariance.T) and statistics.num_images == N


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
    covariance = count(moved, 10).moments[1]
    expected = count(moved - 1e8).moments[1]
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
    left.merge(left)
    assert_same(left, count(torch.cat([draw(), draw()])))


def test_empty_batches_add_nothing_and_what_was_handed_out_stays():
    statistics = count(draw())
    statistics.update(torch.empty(0, D))
    assert_same(statistics, count(draw()), 0)
    handed_out, kept = statistics.moments, count(draw()).moments
    statistics.update(draw(seed=1))
    assert all(map(torch.equal, handed_out, kept))


@pytest.mark.parametrize(
    "features, said",
    [
        (torch.zeros(4, D + 1), r"\(B, 12\).*\(4, 13\)"),
        (torch.zeros(D), r"\(B, 12\).*\(12,\)"),
        (torch.zeros(4, D).half(), "float32 or float64.*torch.float16"),
        (torch.zeros(4, D, dtype=torch.int64), "float32 or float64.*torch.int64"),
        (torch.tensor([0, 1, torch.nan, torch.inf])[:, None].repeat(1, D), "finite.*images 5, 3 "),
    ],
)
def test_refuses(features, said):
    statistics = count(draw())
    refused(said, statistics.update, features, torch.tensor([9, 7, 5, 3]))
    assert_same(statistics, count(draw()), 0)


def test_a_covariance_needs_images():
    statistics = FeatureStatistics(D)
    statistics.update(draw(1))
    with pytest.raises(ValueError, match="at least 2.*got 1"):
        statistics.moments  # noqa: B018


# ---- Files ----


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "new" / "statistics.npz"
    moments = save(path, draw(), spatial=draw()[:, :5])
    loaded = read_statistics(path)
    assert (
        list(loaded.moments) == ["pool", "spatial"]
        and {"features": loaded.features, "images": loaded.images} == PROTOCOL
    )
    assert all(torch.equal(a, b) for output in moments for a, b in zip(moments[output], loaded.moments[output]))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with np.load(path) as archive:  # as other scripts read it
        assert {*archive.files} == {"mu", "sigma", "mu_s", "sigma_s", "num_images", "protocol"}
        assert archive["sigma"].dtype == np.float64 and json.loads(str(archive["protocol"])) == PROTOCOL
    content = path.read_bytes()
    save(path, draw(), spatial=draw()[:, :5])
    assert path.read_bytes() == content  # so that its hash tells what it is


def test_files_of_others(tmp_path):
    mean, covariance = count(draw()).moments
    arrays = {"mu": mean.float().numpy(), "sigma": covariance.numpy()}
    # As ADM's, with images and the spatial moments; what is not needed may be anything
    np.savez_compressed(tmp_path / "adm.npz", **arrays, arr_0=np.array([{}]), mu_s=np.ones(2), sigma_s=np.eye(2))
    loaded = read_statistics(str(tmp_path / "adm.npz"))
    assert loaded.features == {} and (loaded.images["name"], loaded.images["num_images"]) == ("adm.npz", None)
    assert torch.equal(loaded.moments["spatial"][1], torch.eye(2, dtype=torch.float64))
    assert frechet_distance(*loaded.moments["pool"], mean, covariance) < 1e-9  # a mean in float32
    np.savez(tmp_path / "bare.npz", **arrays)
    assert list(read_statistics(tmp_path / "bare.npz").moments) == ["pool"]


class Planted:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def layouts(folder: Path) -> dict[str, tuple[dict, str]]:
    """Arrays that are refused, and what the error names."""
    mu, sigma = np.zeros(3), np.eye(3)
    planted = np.array([Planted(folder / "canary")], dtype=object)
    return {
        "images only": ({"arr_0": mu}, "holds arr_0"),
        "no sigma": ({"mu": mu}, " sigma .*holds mu"),
        "half of the spatial moments": ({"mu": mu, "sigma": sigma, "mu_s": mu}, ", sigma_s "),
        "nothing": ({}, "holds nothing"),
        "shapes": ({"mu": mu, "sigma": np.eye(4)}, r"sigma of .*\(3, 3\).*\(4, 4\)"),
        "spatial shapes": ({"mu": mu, "sigma": sigma, "mu_s": sigma, "sigma_s": sigma}, r"mu_s of .*\(D,\)"),
        "variances": ({"mu": mu, "sigma": mu}, r"sigma of .*\(3, 3\).*\(3,\)"),
        "whole numbers": ({"mu": mu.astype(int), "sigma": sigma}, "mu of .*float32 or float64.*int64"),
        "NaN": ({"mu": mu, "sigma": sigma * np.nan}, "sigma of .*finite"),
        "not symmetric": ({"mu": mu, "sigma": np.triu(np.ones((3, 3)))}, "sigma of .*symmetric"),
        "objects": ({"mu": planted, "sigma": sigma}, "Object arrays"),
        "protocol as an object": ({"mu": mu, "sigma": sigma, "protocol": planted}, "Object arrays"),
        "protocol": ({"mu": mu, "sigma": sigma, "protocol": "[1]"}, r"protocol of .*\[1\]"),
        "protocol cut off": ({"mu": mu, "sigma": sigma, "protocol": '{"a":'}, "protocol of "),
        "number of images": ({"mu": mu, "sigma": sigma, "num_images": 1}, "num_images of .* 2, got 1"),
        "numbers of images": ({"mu": mu, "sigma": sigma, "num_images": [3, 3]}, "num_images of "),
    }


@pytest.mark.parametrize("what", layouts(Path()))
def test_layouts_that_are_refused(tmp_path, what):
    arrays, said = layouts(tmp_path)[what]
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(ValueError, match=said) as error:
        read_statistics(tmp_path / "file.npz")
    assert str(tmp_path / "file.npz") in str(error.value)
    assert not (tmp_path / "canary").exists()


def test_damaged_files(tmp_path):
    path = tmp_path / "file.npz"
    refused("file.npz", read_statistics, path)
    save(path, draw())
    whole = path.read_bytes()
    damaged = [whole[:400], b"", b"<html>", pickle.dumps({"mu": 1}), whole[:200] + b"\1" + whole[201:]]
    for content in damaged:
        path.write_bytes(content)
        refused("file.npz", read_statistics, path)
    np.save(tmp_path / "array.npy", np.eye(3))
    refused("array.npy", read_statistics, tmp_path / "array.npy")
    with zipfile.ZipFile(path, "w") as archive:  # a header that promises more than there is memory
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117) + b"\n"
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    refused("file.npz", read_statistics, path)


def test_a_save_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.npz"
    save(path, draw())
    content = path.read_bytes()
    with pytest.raises(TypeError):
        save(path, draw(seed=1), {"when": object()})
    assert path.read_bytes() == content and len(list(tmp_path.iterdir())) == 1
