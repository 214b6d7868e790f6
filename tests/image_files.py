# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Photographs as files, whole and damaged, and data sets of them in every form that users have."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import PIL.Image
from photographs import load_photographs

from diffusers_d2it.pixels import to_uint8


def photo(i: int = 0, resolution: int = 64) -> PIL.Image.Image:
    """Photograph i of scikit-image, RGB."""
    return PIL.Image.fromarray(to_uint8(load_photographs(resolution)[i % 8]).permute(1, 2, 0).numpy())


def encode(image: PIL.Image.Image, format: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def truncated_jpeg() -> bytes:
    """The first half of a JPEG."""
    data = encode(photo(), "JPEG", quality=95)
    return data[: len(data) // 2]


def bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG of some hundred kB whose pixels would take more than a GB."""
    data = zlib.compressobj(9)
    line = bytes(1 + 3 * width)
    body = b"".join(data.compress(line) for _ in range(height // 100)) + data.flush()

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    """A folder of files by relative path."""
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """A WebDataset: {key: {field: bytes}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, fields in samples.items():
            for field, data in fields.items():
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
