# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the pages name is there: names of the method's tables, links, files."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*.md")]


def test_names_of_the_method_are_in_the_code():
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("src/**/*.json"), *ROOT.glob("examples/*.py")]
    words = {path.stem for path in files} | set(re.findall(r"\w+", "\n".join(path.read_text() for path in files)))
    tables = (ROOT / "docs" / "method.md").read_text().split("## 2. Flow")[0]
    cells = [line.split("|")[3] for line in tables.splitlines() if line.startswith("|")]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    parts = [part for name in names for part in re.findall(r"[A-Za-z_]\w+", name)]
    assert len(names) > 60
    assert [part for part in parts if part not in words] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_of_a_page_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:src|docs|examples|benchmarks|reproduction|tests)/[\w/.-]*)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    tests = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if page.name != "index.md" and page.name not in index] == []


@pytest.mark.filterwarnings("ignore")
def run_blocks(page: str) -> dict:
    """What the Python blocks of a page define, run one after another in the current folder."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
        exec(block, names)
    return names


def test_recipes_for_users_of_diffusers_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks("ecosystem.md")["image"].size == (64, 64)


def test_the_page_of_control_makes_its_own_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks("control.md")
    shown = set(re.findall(r"\]\((control-\w+\.jpg)\)", (ROOT / "docs" / "control.md").read_text()))
    made = {path.name for path in tmp_path.iterdir()}
    assert shown - made == {"control-centres.jpg"}  # of `reproduction/editing.py`, which needs photographs
    assert len(shown) == 6
