# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A saved pipeline, and a Hub to push it to.

saved   folder of a tiny pipeline
hub     a Hub on the loop-back interface without repositories; hub.run(code) runs a process that sees no other
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from loopback_hub import Uploads, run_with_hub, serve_hub


@pytest.fixture
def saved(make_pipeline, tmp_path) -> Path:
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@dataclass
class Hub:
    """A Hub without repositories that accepts what is pushed; run(code): what a process prints that sees no other."""

    endpoint: str
    uploads: Uploads
    repositories: dict[str, Path]
    run: Callable[[str], str]


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    uploads, repositories = Uploads(tmp_path / "hub"), {}
    with serve_hub(repositories, uploads) as endpoint:
        yield Hub(endpoint, uploads, repositories, partial(run_with_hub, endpoint=endpoint, home=tmp_path / "hf"))
