# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What pages say without running it: tables are those of the results, badges those of the package."""

import re
import runpy

import pytest
from script_runs import ROOT, importing_from


@pytest.fixture(scope="module")
def filled():
    with importing_from():
        yield runpy.run_path(str(ROOT / "docs/figures.py"))["filled"]


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
