# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What pages say without running it: tables are those of the results, badges those of the package."""

import re
import runpy
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def filled():
    path, modules = [*sys.path], {*sys.modules}
    yield runpy.run_path(str(ROOT / "docs/figures.py"))["filled"]
    sys.path[:] = path
    folders = {ROOT / name for name in ("examples", "reproduction", "benchmarks")}
    for name in {*sys.modules} - modules:  # scripts of several folders have modules of the same name
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent in folders:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["control", "evaluation", "performance", "reproduction"])
def test_tables_are_those_of_the_results(filled, name):
    page = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    assert filled(page) == page  # else `make figures`
    head, mark, rest = page.partition("<!-- figures: ")
    assert filled(head + mark + re.sub(r"\d(?= \|)", "@", rest, count=1)) == page


def test_badges_hold():
    said = runpy.run_path(str(ROOT / "docs/badges.py"))["badges"]()
    assert set(re.findall(r"docs/badges/(\w+)\.svg", (ROOT / "README.md").read_text())) == set(said)
    for name, words in said.items():
        assert words in (ROOT / f"docs/badges/{name}.svg").read_text()
