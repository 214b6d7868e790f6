# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From an image file to the pixels that a model reads: every image is decoded right, or refused with the reason."""

import io
import os
import stat
import warnings
from functools import cache

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch

from ..pixels import UnusableImageError, from_uint8, to_rgb, upright_rgb


MAX_IMAGE_PIXELS = 100_000_000  # 300 MB as RGB; a file of a few kB can announce any number
# Pillow opens more, and some of it by starting other programs (EPS)
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_RESAMPLING = PIL.Image.Resampling.BICUBIC


ImageInput = str | os.PathLike | PIL.Image.Image | np.ndarray | torch.Tensor | list


@cache
def image_endings() -> frozenset[str]:
    """The endings of files that `decode_image` reads, as this Pillow knows them: ".jpg", ".png", ..."""
    return frozenset(ending for ending, name in PIL.Image.registered_extensions().items() if name in _FORMATS)


def decode_image(encoded: dict) -> PIL.Image.Image:
    """Decode one image to RGB, upright.

    Grey, palette, CMYK and YCbCr are converted, 16-bit grey is scaled to 8 bits, EXIF orientation is applied,
    transparency is laid on white, and of an animation the first frame is taken.

    Args:
        encoded: {"bytes", "path"} as `datasets.Image(decode=False)` yields it. The bytes of the file, or without them
            a path, local or any that fsspec opens; {"refused": reason} of an image that must not be opened.

    Raises:
        UnusableImageError: the file is missing, no image, damaged or cut off, has more than `MAX_IMAGE_PIXELS` (known
            from the header, nothing is decoded), or holds values without a defined range (32-bit, float).
        ValueError: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.
    """
    if PIL.ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: damaged images would train as grey. Unset it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is decided here: used, or refused with the reason
            return _decode(_open(encoded))
    except UnusableImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise UnusableImageError(f"Pillow cannot read it as any of {', '.join(_FORMATS)}") from None
    except PIL.Image.DecompressionBombError as error:  # comes before the size can be asked for
        raise UnusableImageError(f"it is larger than {MAX_IMAGE_PIXELS} pixels: {error}") from None
    except Exception as error:  # damaged files raise anything: struct.error, KeyError, zlib.error, ...
        raise UnusableImageError(f"{error or type(error).__name__}") from error


def check_resolution(resolution: int, unit: int) -> None:
    """Raise a ValueError unless the resolution is a multiple of the side of a region, or of the cell of one grain."""
    if resolution < 1 or resolution % unit:
        raise ValueError(f"`resolution` must be a multiple of {unit}, as the autoencoder asks for, got {resolution}.")


def check_size(found: tuple[int, int], size: tuple[int, int]) -> None:
    """Raise an UnusableImageError if a picture is less than half as large as `size`: more blur than image.

    Args:
        found: (width, height) of the picture, as Pillow has it.
        size: (height, width) that it is to have.
    """
    height, width = size
    if 2 * found[0] < width or 2 * found[1] < height:
        raise UnusableImageError(
            f"it is {found[0]}x{found[1]}, too small for {width}x{height}: half of it is the minimum"
        )


def to_pixels(image: PIL.Image.Image, resolution: int, flip: bool = False) -> torch.Tensor:
    """Resize the shorter side, crop the centre, and scale to [-1, 1]: (3, resolution, resolution), float32.

    Raises:
        UnusableImageError: from `check_size`.
    """
    image = fitted(image, (resolution, resolution))
    if flip:
        image = PIL.ImageOps.mirror(image)
    return from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1)


def fitted(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """The centre of a picture that has the form of `size`, (height, width), resized to it; RGB.

    Raises:
        UnusableImageError: it would have to be made more than twice as large.
    """
    height, width = size
    check_size(image.size, size)
    image = to_rgb(image, image.format)
    return image if image.size == (width, height) else PIL.ImageOps.fit(image, (width, height), _RESAMPLING)


def _open(encoded: dict) -> io.IOBase:
    """The file of an image, unread."""
    if encoded and "refused" in encoded:
        raise UnusableImageError(encoded["refused"])
    data, path = (encoded or {}).get("bytes"), (encoded or {}).get("path")
    if data is not None:
        return io.BytesIO(data)
    if path is None:
        raise UnusableImageError("its row holds no image in this column; a WebDataset needs one ending for all images")
    if "://" in path:
        import fsspec

        with fsspec.open(path, "rb") as file:
            return io.BytesIO(file.read())
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
            raise UnusableImageError("it is no regular file")
        return open(path, "rb")
    except FileNotFoundError:
        raise UnusableImageError("there is no such file") from None


def _decode(file: io.IOBase) -> PIL.Image.Image:
    with file:
        if file.seek(0, io.SEEK_END) == 0:
            raise UnusableImageError("the file is empty")
        PIL.Image.init()  # fills the list of formats of this Pillow
        formats = [name for name in _FORMATS if name in PIL.Image.OPEN]
        image = PIL.Image.open(file, formats=formats)
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise UnusableImageError(
                f"its header announces {image.width}x{image.height}, more than {MAX_IMAGE_PIXELS} pixels"
            )
        if image.format == "PNG":
            image.verify()  # the checksums, which decoding ignores; it uses the image up
            image = PIL.Image.open(file, formats=formats)
        image.load()
        if image.format in ("JPEG", "MPO") and _is_cut_off(file, image):
            raise UnusableImageError("image file is truncated: its end is missing")
        return upright_rgb(image)


def _is_cut_off(file: io.IOBase, image: PIL.Image.Image) -> bool:
    """Whether the scan of a decoded JPEG ends early: libjpeg then fills the rest with grey, and only warns.

    A copy that broke off can still be as long as the original (zeros at its end) or end properly (repaired by a
    tool). The first has no end marker. The second ends in grey; what stands before the marker decides what the grey
    part becomes, so other bytes there make another image.
    """
    file.seek(0)
    data = file.read()
    position = 2
    while position + 4 <= len(data) and data[position : position + 2] != b"\xff\xda":  # segments before the scan
        # Fill bytes may stand between segments
        position += 1 if data[position + 1] == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    end = data.find(b"\xff\xd9", position)  # inside a scan 0xff is always followed by 0x00 or a restart marker
    if end < 0:
        return True
    last = image.getpixel((image.width - 1, image.height - 1))
    if not set(np.atleast_1d(last).tolist()) <= {127, 128}:
        return False
    longer = PIL.Image.open(io.BytesIO(data[:end] + b"\xb5" * 4096 + data[end:]), formats=["JPEG"])
    return not np.array_equal(np.asarray(longer), np.asarray(image))
