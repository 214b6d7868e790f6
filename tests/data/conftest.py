# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Latent caches of eight photographs.

make_plan, write_cache, cache
"""

from functools import partial
from pathlib import Path

import pytest
from accelerate import Accelerator
from photo_caches import Photographs, to_png

from diffusers_d2it.data.latent_cache import LatentCachePlan, describe_vae
from diffusers_d2it.data.latent_cache_writer import encode_shards, write_latent_cache


@pytest.fixture
def make_plan():
    """make_plan(vae, num_rows=8, rows_per_shard=3, flips=True, **overrides)."""

    def make(vae, num_rows=8, rows_per_shard=3, flips=True, **overrides) -> LatentCachePlan:
        fields = {
            "resolution": vae.config.sample_size,
            "flips": flips,
            "source": "eight photographs",
            "data_fingerprint": "photographs of scikit-image",
            "num_rows": num_rows,
            "rows_per_shard": rows_per_shard,
            "num_classes": 2,
            "id2label": {0: "earth", 1: "sky"},
        }
        return LatentCachePlan(**(describe_vae(vae) | fields | overrides))

    return make


@pytest.fixture
def write_cache(load_photos, make_plan):
    """write_cache(folder, vae, files=None, **plan): write a cache of eight photographs; the images left out."""

    def write(folder: Path, vae, files: list[bytes] | None = None, **plan) -> list[dict]:
        files = files or [to_png(photo) for photo in load_photos(vae.config.sample_size)]
        plan = make_plan(vae, num_rows=len(files), **plan)
        encode = partial(encode_shards, vae, Photographs(files), plan, batch_size=2)
        return write_latent_cache(folder, plan, Accelerator(cpu=True), encode)

    return write


@pytest.fixture
def cache(make_vae, write_cache, tmp_path) -> Path:
    """A cache of eight photographs in three shards, two grains, 32 px."""
    write_cache(tmp_path / "cache", make_vae())
    return tmp_path / "cache"
