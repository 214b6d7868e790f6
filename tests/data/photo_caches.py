# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Latent caches of photographs: what their tests are made of."""

from pathlib import Path

from diffusers_d2it.data.latent_cache import LatentCachePlan
from diffusers_d2it.models import LatentCodec


SHARD = "shard-00001"  # of the fixture `cache`, its second one
CODES = f"{SHARD}/codes.safetensors"


def make_plan(vae, num_rows: int = 8, rows_per_shard: int = 3, flips: bool = True, **overrides) -> LatentCachePlan:
    """The plan of a cache of eight photographs."""
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
    return LatentCachePlan(**(LatentCodec(vae).describe() | fields | overrides))


class Photographs:
    """An ImageSource in memory: image i is named i.png and has label i % 2."""

    def __init__(self, files: list[bytes]):
        self.files = files
        self.num_rows = len(files)

    def rows(self, start: int, stop: int):
        for row in range(start, stop):
            yield f"{row}.png", {"bytes": self.files[row], "path": f"{row}.png"}, row % 2


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file, by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
