# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Two processes find what one does: statistics, Inception Score, and the rows of a bank."""

from pathlib import Path

import counted_together
import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from counted_together import N, features
from script_runs import TWO_PROCESSES, run


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    try:
        return counted_together.count(Accelerator(cpu=True), tmp_path_factory.mktemp("one"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    """What each of two processes has found; the folder holds nothing else."""
    folder = tmp_path_factory.mktemp("two")
    run(Path(counted_together.__file__), folder, launch=TWO_PROCESSES, ACCELERATE_USE_CPU="true")
    assert sorted(path.name for path in folder.iterdir()) == ["0.npz", "1.npz"]  # no bank is left
    return [dict(np.load(folder / f"{process}.npz")) for process in (0, 1)]


def test_there_are_two_processes_with_a_part_each(together):
    assert [found["num_processes"] for found in together] == [2, 2]
    assert [found["own"] for found in together] == [32, 29]
    assert [found["idle_own"] for found in together] == [N, 0]


@pytest.mark.parametrize("name", ["mean", "covariance", "idle_mean", "idle_covariance", "score", "idle_score"])
def test_found_together_as_alone(alone, together, name):
    first, second = (found[name] for found in together)
    assert np.array_equal(first, second)
    np.testing.assert_allclose(first, alone[name], atol=1e-12 * np.abs(alone[name]).max())


def test_images_are_counted(alone, together):
    for found in (alone, *together):
        assert found["num_images"] == found["idle_num_images"] == N


def test_a_bank_holds_the_rows_of_both(alone, together):
    for found in (alone, *together):
        assert np.array_equal(found["rows"], features().numpy())
        assert not found["file_is_there"]


def test_a_bank_names_what_is_missing_and_what_came_twice(alone, together):
    message = "each of the 2 images must be counted once, missing: 1"
    assert alone["refused"] == f"{message}."
    assert [str(found["refused"]) for found in together] == [f"{message}; counted more than once: 0."] * 2
