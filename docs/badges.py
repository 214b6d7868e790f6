# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Badges of README, by what is installed: `make pictures`; `tests/test_docs.py` looks whether they hold."""

import re
from importlib.metadata import metadata
from pathlib import Path


FOLDER = Path(__file__).parent / "badges"


def badges() -> dict[str, str]:
    """What each badge says, by its name."""
    package = metadata("diffusers-d2it")
    versions = dict(
        re.match(r"([\w-]+)(.*)", one).groups() for one in package.get_all("Requires-Dist") if ";" not in one
    )
    said = {"python": package["Requires-Python"], "torch": versions["torch"], "diffusers": versions["diffusers"]}
    said = {name: version.replace(">=", "≥ ") for name, version in said.items()}
    licence = package["License"] or package["License-Expression"]  # by the age of what built it
    return said | {"licence": licence, "paper": "arXiv 2504.09454"}


if __name__ == "__main__":
    from anybadge import Badge

    FOLDER.mkdir(exist_ok=True)
    for name, words in badges().items():
        Badge(name, words, default_color="#3f51b5").write_badge(str(FOLDER / f"{name}.svg"), overwrite=True)
