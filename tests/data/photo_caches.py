# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Latent caches of photographs: what their tests are made of."""

import io
from pathlib import Path

import PIL.Image
import torch

from diffusers_d2it.data.images import to_pixels
from diffusers_d2it.pixels import to_uint8


SHARD = "shard-00001"  # of the fixture `cache`, its second one
CODES = f"{SHARD}/codes.safetensors"


def to_png(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(to_uint8(pixels).permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def from_png(data: bytes) -> torch.Tensor:
    return to_pixels(PIL.Image.open(io.BytesIO(data)), 32)


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


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
