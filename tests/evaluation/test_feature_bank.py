# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Rows of features on disk: written in any order, once each, and gone at the end."""

import gc

import numpy as np
import pytest
import torch

from diffusers_d2it.evaluation.feature_bank import FeatureBank


N, D = 20, 6


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def test_rows_come_back(features, tmp_path):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    with FeatureBank(N, D, tmp_path) as bank:
        assert bank.path.parent == tmp_path
        for indices in order.split(3):
            bank.write(features[indices], indices)
        bank.write(features[:0], order[:0])
        bank.finish()
        assert (len(bank), bank.shape) == (N, (N, D))
        assert bank.path.stat().st_size == 4 * N * D
        assert torch.equal(bank[:], features)
        for rows in (slice(5, 9), slice(18, 100), slice(7, 7), slice(9, 5), np.array([19, 0, 3, 3]), np.arange(0)):
            assert torch.equal(bank[rows], features[rows]) if not _reversed(rows) else len(bank[rows]) == 0
        block = bank[:2]
        block.zero_()  # a copy
        assert torch.equal(bank[:2], features[:2])
    assert not any(tmp_path.iterdir())


def _reversed(rows) -> bool:
    return isinstance(rows, slice) and rows.start is not None and rows.start > rows.stop


def test_gone_after_an_error_and_when_forgotten(features, tmp_path):
    with pytest.raises(KeyError), FeatureBank(N, D, tmp_path):
        raise KeyError
    assert not any(tmp_path.iterdir())
    bank = FeatureBank(N, D, tmp_path)
    bank.write(features, torch.arange(N))
    assert any(tmp_path.iterdir())
    del bank
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_each_row_once(features, tmp_path):
    with FeatureBank(N, D, tmp_path) as bank:
        bank.write(features[:10], torch.arange(10))
        with pytest.raises(ValueError, match="each image must be counted once, these came again: 9"):
            bank.write(features[:2], torch.tensor([9, 10]))
        bank.write(features[10:19], torch.arange(10, 19))
        with pytest.raises(ValueError, match="each of the 20 images must be counted once, missing: 19"):
            bank.finish()
        with pytest.raises(ValueError, match="between `finish` and `close`"):
            bank[:]


def test_refuses(features, tmp_path):
    with FeatureBank(N, D, tmp_path) as bank:
        indices = torch.arange(N)
        for wrong, message in (
            (features.double(), "a bank holds float32, got features of torch.float64"),
            (features[:, 1:], r"must be \(B, 6\), got \(20, 5\)"),
            (features.log(), "finite, those of images"),
            (features[:3], r"`indices` must be \(3,\)"),
        ):
            with pytest.raises(ValueError, match=message):
                bank.write(wrong, indices)
        with pytest.raises(ValueError, match="between `finish` and `close`"):
            bank[:]
        bank.write(features, indices)
        bank.finish()
        with pytest.raises(ValueError, match="takes no more features"):
            bank.write(features, indices)
        for rows in (slice(0, 9, 2), np.array([20]), np.array([-1]), np.array([0.5]), 3):
            with pytest.raises(ValueError, match="slices without a step|whole numbers"):
                bank[rows]
        bank.path.write_bytes(b"")
        with pytest.raises(ValueError, match=f"{bank.path.name} was cut off by someone else: row 4"):
            bank[4:6]
    with pytest.raises(ValueError, match="between `finish` and `close`"):
        bank[:]
    with pytest.raises(ValueError, match="`num_features` must be at least 1, got 0"):
        FeatureBank(N, 0)
    with pytest.raises(ValueError, match="`folder` must be a folder, there is none at .*nowhere"):
        FeatureBank(N, D, tmp_path / "nowhere")
