# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A folder of photographs as they come: every usable one is used, every other one is counted and named."""

import http.server
import io
import threading

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from image_files import bomb, encode, photo, truncated_jpeg, write_folder

from diffusers_d2it.data.bad_images import BadImages
from diffusers_d2it.data.images import UnusableImageError, decode_image
from diffusers_d2it.data.loaders import ImageDataset
from diffusers_d2it.data.source import load_images


def unusual() -> dict[str, bytes]:
    """Images that some programs cannot read, and that are fine."""
    sixteen_bit = photo().convert("I").point(lambda value: value * 256).convert("I;16")
    turned = photo(1)
    exif = turned.getexif()
    exif[0x0112] = 6
    animated = io.BytesIO()
    photo(2).save(animated, "GIF", save_all=True, append_images=[photo(3), photo(4)])
    return {
        "cmyk.jpg": encode(photo(0).convert("CMYK"), "JPEG"),
        "sixteen-bit.png": encode(sixteen_bit),
        "alpha.png": encode(photo(5).convert("RGBA")),
        "palette.png": encode(photo(6).convert("P")),
        "turned.jpg": encode(turned, "JPEG", exif=exif),
        "animated.gif": animated.getvalue(),
        "grey.png": encode(photo(7).convert("L")),
    }


def unusable() -> dict[str, bytes]:
    """Files with the endings of images that are none, or none that may be decoded."""
    return {
        "cut.jpg": truncated_jpeg(),
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "bomb.png": bomb(),
        "zeros.png": bytes(1000),
        "\x1b[31mred\x1b[0m.png": b"not an image",
    }


def test_what_is_usable_is_used_and_the_rest_is_named(tmp_path, fault, repeats):
    num_good = repeats(60, 2000)
    used, named = fault("usable image among damaged ones"), fault("unusable image: named, not decoded, not used")
    good = {f"{i:04d}.png": encode(photo(i)) for i in range(num_good)} | unusual()
    source = load_images(write_folder(tmp_path / "photos", good | unusable()))
    bad_images = BadImages(tmp_path / "bad_images.jsonl")
    dataset = ImageDataset(source, 32, 0, bad_images)
    before = psutil.Process().memory_full_info().uss
    pixels = [dataset[i]["pixels"] for i in range(len(dataset))]
    grown = psutil.Process().memory_full_info().uss - before
    assert grown < 200 * 2**20, "the bomb went off"
    assert all(image.isfinite().all() and image.abs().max() <= 1 for image in pixels)
    found = bad_images.found()
    for name in good:
        used.tried(name, lost=any(name in listed for listed in found))
    for name in unusable():
        named.tried(name, silent=not any(name in listed for listed in found))
    assert "\x1b" not in bad_images.summary()
    assert len(dataset) == len(good) + len(unusable()) and len(found) == len(unusable())


@pytest.mark.parametrize("num_good", [0, 1])
def test_a_folder_of_almost_nothing(num_good, tmp_path, fault):
    count = fault(f"folder with {num_good} usable images")
    files = {f"{i}.png": encode(photo(i)) for i in range(num_good)} | unusable()
    source = load_images(write_folder(tmp_path / "photos", files))
    dataset = ImageDataset(source, 32, 0, BadImages(tmp_path / "bad_images.jsonl"))
    if num_good:
        images = [dataset[i]["pixels"] for i in range(len(dataset))]
        same = all(torch.equal(image.sort().values, images[0].sort().values) for image in images)
        count.tried(silent=not same)
        return
    count.refused(lambda: dataset[0], "photos")


def test_rows_that_point_out_of_their_data_set_open_nothing(tmp_path, fault):
    """A table from somebody else names files of this machine, and addresses."""
    count = fault("row of a data set that points to a file or an address outside of it")
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode(photo()))
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/x.png"
        targets = [str(secret), "../secret.png", f"file://{secret}", address, f"zip://x.png::{address}", "/etc/passwd"]
        images = [{"bytes": None, "path": target} for target in targets]
        images.append({"bytes": encode(photo()), "path": "fine.png"})
        (tmp_path / "table").mkdir()
        column = pyarrow.array(images, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
        pyarrow.parquet.write_table(pyarrow.table({"image": column}), tmp_path / "table" / "train.parquet")
        for streaming in (False, True):
            rows = list(load_images(tmp_path / "table", streaming=streaming).rows())
            assert len(rows) == len(targets) + 1 and decode_image(rows[-1].encoded).size == (64, 64)
            for target, row in zip(targets, rows):
                with pytest.raises(UnusableImageError, match="outside|no image"):
                    decode_image(row.encoded)
                count.tried(target, silent=bool(requests))
        server.shutdown()
