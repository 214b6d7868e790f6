# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the pages name is there: names of the method's tables, links, files. (Their blocks run by `pages.py`.)"""

import json
import re
import shlex
from pathlib import Path

import pytest
from pages import check_command

import diffusers_d2it


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


@pytest.mark.parametrize("index", ["docs/index.md", "mkdocs.yml"])
def test_every_page_is_in_the_index_and_in_the_site(index):
    index = (ROOT / index).read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if page.name != "index.md" and page.name not in index] == []


@pytest.mark.parametrize(
    "command",
    [
        "python examples/demo.py --outptu demo.png",
        "python examples/no_script.py",
        "python reproduction/study.py --jobs many",
        "python benchmarks/refine_net.py --fine_ratoi 0.3",
        "accelerate launch --config_file examples/configs/accelerate/nine-gpus.yaml examples/demo.py",
        "accelerate launch --num_processes 2 examples/train_d2it.py --vaee v",
        "make tea",
        'pip install ".[tea]"',
        "pip install diffusers-d2it",
        "curl example.org",
    ],
)
def test_a_command_that_would_not_begin_is_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit)):
        check_command(shlex.split(command))


@pytest.mark.parametrize("notebook", ROOT.glob("docs/notebooks/*.ipynb"), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(notebook):
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def test_the_citation_in_the_readme_is_that_of_the_package():
    version = diffusers_d2it.__version__
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
