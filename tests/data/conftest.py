# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Latent caches of eight photographs, and a cache of data sets for each test: nothing goes to the network.

write_cache, cache
"""

import shutil
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from accelerate import Accelerator
from image_files import encode, photo
from photo_caches import Photographs, make_plan

from diffusers_d2it.data.latent_cache_writer import encode_shards, write_latent_cache


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def write_cache():
    """write_cache(folder, vae, files=None, **plan): write a cache of eight photographs; the images left out."""

    def write(folder: Path, vae, files: list[bytes] | None = None, **plan) -> list[dict]:
        files = files or [encode(photo(i, vae.config.sample_size)) for i in range(8)]
        plan = make_plan(vae, num_rows=len(files), **plan)
        shards = partial(encode_shards, vae, Photographs(files), plan, batch_size=2)
        return write_latent_cache(folder, plan, Accelerator(cpu=True), shards)

    return write


@pytest.fixture(scope="session")
def written(make_vae, write_cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "cache"
    write_cache(folder, make_vae())
    return folder


@pytest.fixture
def cache(written, tmp_path) -> Path:
    """A cache of eight photographs in three shards, two grains, 32 px."""
    return shutil.copytree(written, tmp_path / "cache")
