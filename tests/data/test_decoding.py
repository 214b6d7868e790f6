# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every kind of image file is decoded right, or refused with the reason, before it costs time or memory."""

import io
import warnings

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pytest
import torch
from image_files import bomb, encode, photo, truncated_jpeg

from diffusers_d2it.data.images import (
    MAX_IMAGE_PIXELS,
    UnusableImageError,
    check_size,
    decode_image,
    image_endings,
    to_pixels,
)


def decode(data: bytes) -> np.ndarray:
    image = decode_image({"bytes": data, "path": None})
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refuse(data: bytes | None, path: str | None = None) -> str:
    with pytest.raises(UnusableImageError) as error:
        decode_image({"bytes": data, "path": path})
    return str(error.value)


def close(a: np.ndarray, b: np.ndarray, tolerance: int) -> bool:
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance


def laid_on_white(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return (image * share + 255 * (1 - share)).repeat(3 // image.shape[-1], -1)


@pytest.fixture
def rgb() -> np.ndarray:
    return np.asarray(photo()).astype(int)


def test_plain_rgb_is_unchanged(rgb):
    for format in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(decode(encode(photo(), format)), rgb)
    assert np.array_equal(decode(encode(photo(), "WEBP", lossless=True)), rgb)
    assert close(decode(encode(photo(), "JPEG", quality=100, subsampling=0)), rgb, 12)


def test_grey_palette_and_cmyk(rgb):
    palette = photo().convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    for image in (photo().convert("L"), photo().convert("1"), palette):
        assert np.array_equal(decode(encode(image)), np.asarray(image.convert("RGB")))
    cmyk = encode(photo().convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert PIL.Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    assert close(decode(cmyk), rgb, 16)
    assert close(decode(encode(photo().convert("YCbCr"), "TIFF", compression="tiff_lzw")), rgb, 4)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    values = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    decoded = decode(encode(PIL.Image.fromarray(values), format))
    assert np.array_equal(decoded, np.stack([np.round(values / 257).astype(int)] * 3, -1))
    assert len(np.unique(decoded)) == 256


def test_transparency_lies_on_white(rgb):
    alpha = np.zeros((64, 64), np.uint8)  # clear on the right
    alpha[:, :24], alpha[:, 24:40] = 255, 128
    rgba, grey = photo(), photo().convert("LA")
    luma = np.asarray(photo().convert("L")).astype(int)[..., None]
    for image in (rgba, grey):
        image.putalpha(PIL.Image.fromarray(alpha))
    for data in (encode(rgba), encode(rgba, "WEBP", lossless=True, exact=True)):
        assert close(decode(data), laid_on_white(rgb, alpha), 1)
    assert close(decode(encode(grey)), laid_on_white(luma, alpha), 1)


def test_a_transparent_value_becomes_white():
    palette = photo().convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    clear = np.asarray(palette) == np.asarray(palette)[0, 0]
    decoded = decode(encode(palette, transparency=int(np.asarray(palette)[0, 0])))
    assert (decoded[clear] == 255).all()
    assert np.array_equal(decoded[~clear], np.asarray(palette.convert("RGB"))[~clear])
    values = np.full((64, 64), 1000, np.uint16)
    values[:32] = 30000
    decoded = decode(encode(PIL.Image.fromarray(values), transparency=1000))
    assert (decoded[32:] == 255).all() and (decoded[:32] == 117).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = photo().crop((0, 0, 64, 40))
    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()
    stored = upright if orientation == 1 else upright.transpose(PIL.Image.Transpose[turns[orientation - 2]])
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encode(stored, exif=exif)), np.asarray(upright))
    jpeg = decode(encode(stored, "JPEG", quality=100, subsampling=0, exif=exif))
    assert close(jpeg, np.asarray(upright).astype(int), 12)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    options = {"lossless": True} if format == "WEBP" else {}
    frames = [photo(i) for i in range(3)]
    still = decode(encode(frames[0], format, **options))
    moving = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert len(moving) > 2 * len(encode(frames[0], format, **options))
    assert close(decode(moving), still, 40 if format == "GIF" else 0)  # GIF: another palette


HALVED = ("PNG", "GIF", "BMP", "TIFF", "WEBP")
NUMBERS = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)
REFUSED = {  # what is not decoded, and what its reason says
    "empty": (b"", "empty"),
    "a page": (b"<!DOCTYPE html><html><body>404</body></html>", "AVIF, BMP"),
    "EPS, for which Pillow would start Ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "PNG"),
    "half of a JPEG": (truncated_jpeg(), "truncated"),
    "float": (encode(PIL.Image.fromarray(NUMBERS), "TIFF"), "'F'"),
    "32 bits": (encode(PIL.Image.fromarray((NUMBERS * 1e6).astype(np.int32)), "TIFF"), "'I'"),
    **{f"half of a {name}": (encode(photo(), name)[: len(encode(photo(), name)) // 2], "") for name in HALVED},
}


@pytest.mark.parametrize("file", REFUSED)
def test_what_is_no_whole_image_is_refused_with_the_reason(file):
    data, reason = REFUSED[file]
    assert reason in refuse(data)


def test_a_row_without_an_image_is_refused():
    assert refuse(None) != refuse(None, "/no/where.png")


# A comment may hold what ends an image; it lies before the scan
@pytest.mark.parametrize("options", [{}, {"quality": 98}, {"subsampling": 0}, {"comment": b"\xff\xda \xff\xd9"}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_damaged_jpegs_never_become_grey(mode, options):
    data = encode(photo().convert(mode), "JPEG", **options)
    half = data[: len(data) // 2 + 200]
    assert decode(data).std() > 10
    assert refuse(half + bytes(len(data) - len(half))) and refuse(half + b"\xff\xd9")


def test_grey_corners_are_no_damage():
    for box in ((0, 56, 64, 64), (56, 56, 64, 64), (0, 0, 64, 64)):
        image = photo()
        image.paste((128, 128, 128), box)
        for options in ({}, {"progressive": True}, {"quality": 100}):
            decode(encode(image, "JPEG", **options))
    decode(encode(photo(), "JPEG") + b"trailing bytes \xff\xda\xff\xd8")
    for comment in (b"\xff\xda", b"\xff\xd9"):  # as in a thumbnail
        decode(encode(photo(), "JPEG", comment=comment))


def test_a_damaged_png_is_found_by_its_checksums():
    data = encode(photo(0, 128))
    copy = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    PIL.Image.open(io.BytesIO(copy)).load()  # no error of Pillow's
    assert "broken" in refuse(copy)


@pytest.mark.parametrize("size", [(20_000, 20_000), (13_000, 13_000), (9_800, 10_300), (1, 100_000_001)])
def test_oversized_images_are_refused_from_their_header(size, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(*size)[:2000])  # nothing can be decoded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(MAX_IMAGE_PIXELS) in refuse(None, str(path))


def test_large_images_below_the_limit_cause_no_warning(rgb, monkeypatch):
    assert PIL.Image.MAX_IMAGE_PIXELS < MAX_IMAGE_PIXELS
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", rgb[..., 0].size - 1)  # Pillow's own, for a warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode(encode(photo())), rgb)


def test_users_settings_of_pillow(monkeypatch):
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES") as error:
        decode(encode(photo()))
    assert not isinstance(error.value, UnusableImageError)


def test_paths_and_addresses(tmp_path, rgb):
    path = tmp_path / "a.png"
    path.write_bytes(encode(photo()))
    for address in (str(path), f"file://{path}"):
        assert np.array_equal(np.asarray(decode_image({"bytes": None, "path": address})), rgb)


def test_pixels_are_those_of_fit_and_mirror(rgb):
    image = photo(1, 96).crop((0, 0, 96, 70))
    fitted = PIL.ImageOps.fit(image, (48, 48), PIL.Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    assert torch.equal(to_pixels(image, 48), expected)
    assert torch.equal(to_pixels(image, 48, flip=True), expected.flip(2))
    assert torch.equal(to_pixels(photo(), 64), torch.from_numpy(np.float32(rgb) / 127.5 - 1).permute(2, 0, 1))


def test_tiny_images():
    check_size((32, 500), (64, 64))
    for size in ((31, 500), (1, 1)):
        with pytest.raises(UnusableImageError, match=f"{size[0]}x{size[1]}.*64"):
            to_pixels(PIL.Image.new("RGB", size), 64)


def test_endings_are_those_of_photographs():
    endings = image_endings()
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= endings
    assert not endings & {".eps", ".pdf", ".heic", ".txt", ".mpg", ".h5"}
