# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The table of the fault suite: what was tried, how often something was lost, how often nobody was told.

    pytest tests/faults                 the short form, part of the test suite
    FAULTS=long pytest tests/faults     the long form, `make faults`

A test takes the fixture `fault`, counts with it and passes if nothing was lost and nothing was silent:

    def test_...(fault):
        count = fault("kill -9 while saving a checkpoint")
        for trial in range(repeats(20, 200)):
            ...
            count.tried(lost=..., silent=...)

    lost     what was whole before the fault is not there any more, or a run cannot go on from it
    silent   something is wrong, and it was used without an error or a warning that names it
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from measuring import attempt


LONG = os.environ.get("FAULTS") == "long"


@dataclass
class Count:
    """How often a fault was tried, and what came of it."""

    fault: str
    num_tried: int = 0
    lost: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    def tried(self, what: object = "", *, lost: bool = False, silent: bool = False) -> None:
        """Count one try; `what` describes it where it went wrong."""
        self.num_tried += 1
        if lost:
            self.lost.append(str(what))
        if silent:
            self.silent.append(str(what))

    def refused(self, call: Callable[[], object], *expected: str, what: object = "") -> None:
        """Count a call that must raise a ValueError with these words, at little cost: see `measuring.Attempt`."""
        problem = attempt(call).problem(*expected)
        self.tried(f"{what}: {problem}", silent=problem is not None)

    def named(self, call: Callable[[], object], *expected: str, what: object = "") -> None:
        """Count a call that must raise a ValueError with these words, or log a warning with them."""
        problem = attempt(call).unnamed(*expected)
        self.tried(f"{what}: {problem}", silent=problem is not None)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, make_pipeline, make_dcdit):
    """What the training scripts read."""
    from training_runs import Inputs  # here: most tests need no datasets

    return Inputs(tmp_path_factory.mktemp("inputs"), make_pipeline(num_classes=None), make_dcdit(None, seed=0))


@pytest.fixture
def repeats() -> Callable[[int, int], int]:
    """repeats(short, long): the number of tries in this form of the suite."""
    return lambda short, long: long if LONG else short


@pytest.fixture
def fault(record_property) -> Iterator[Callable[[str], Count]]:
    """fault("what is done"): a row of the table. The test fails unless it was tried, and nothing lost or silent."""
    counts = []

    def make(name: str) -> Count:
        counts.append(Count(name))
        return counts[-1]

    yield make
    for count in counts:
        record_property("fault", [count.fault, count.num_tried, len(count.lost), len(count.silent)])
    for count in counts:
        assert count.num_tried > 0, f"{count.fault}: nothing was tried"
        assert not count.lost, f"{count.fault}: lost {count.lost}"
        assert not count.silent, f"{count.fault}: silent {count.silent}"


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the table."""
    reports = (report for reports in terminalreporter.stats.values() for report in reports)
    table: dict[str, list[int]] = {}
    for report in reports:
        if getattr(report, "when", None) == "teardown":
            for name, value in report.user_properties:
                if name == "fault":
                    row, *numbers = value
                    table[row] = [sum(pair) for pair in zip(table.get(row, [0, 0, 0]), numbers, strict=True)]
    if table:
        width = max(map(len, table))
        terminalreporter.section("faults")
        terminalreporter.line(f"{'fault':{width}}  tried   lost  silent")
        for row, (tried, lost, silent) in sorted(table.items()):
            terminalreporter.line(f"{row:{width}}  {tried:5}  {lost:5}  {silent:6}")
