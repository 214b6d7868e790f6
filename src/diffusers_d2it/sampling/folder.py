# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A folder of samples that many processes fill, and that is filled on after an interruption.

    protocol.json     what the images are; written first, and again when all of them are there
    000000.png ...    the images; in each of them stand its class and what share of it got the most work
    images.npz        all of them as one file, if it is asked for: `arr_0`, uint8 (N, H, W, 3)
    manifest.json     seals the protocol and the .npz; written last. PNGs have checksums of their own

Everything is written aside and renamed, and the images that are there are checked before others are drawn.
"""

import io
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from ..data.images import UnusableImageError
from ..files import is_sealed, lock, on_main_process, place_of, seal, staging_folder, verify, write_json_durably
from ..files.folders import MANIFEST, names_in, settle
from ..pixels import unit_to_uint8
from ..words import differences, listed
from .npz import write_npz
from .sets import PROTOCOL, SamplePlan, new_protocol, read_protocol


NPZ = "images.npz"
FORMATS = ("png", "npz", "both")

_THREADS = 4  # that encode and decode PNGs, which needs no interpreter
_COMPRESSION = 1  # of zlib: a third of the time of its default for 7 % more bytes, on a photograph
_LABEL = "class_label"  # as it is called in a PNG
_END = b"\0\0\0\0IEND\xae\x42\x60\x82"  # of every PNG


class SampleFolder:
    """Keeps a set of samples: says which are missing, writes them, and completes the protocol.

        how = (output_dir, plan, sampling, (256, 256), "png", accelerator, checkpoint)
        with SampleFolder(*how, share="fine_share") as samples:
            for batch in samples.batches:
                images, fine_shares = draw(batch)
                samples.write(batch, images, fine_shares)
            protocol = samples.finish()

    All processes call it alike. What goes wrong in the folder is raised in all of them.

    Args:
        path: a new or empty folder, or one that was begun with the same protocol.
        plan: the images.
        sampling: the part of the protocol that says what they are.
        size: (height, width) of the images in pixels.
        format: "png", "npz", or "both"; with "npz" the PNGs are removed when the .npz is there.
        accelerator: its processes share the batches; each must see the folder.
        checkpoint: what the user calls it, for the protocol.
        share: what PNGs call the share that is handed over with an image, such as "fine_share" of its grain map; the
            protocol has its mean, "mean_fine_share".

    Attributes:
        batches: numbers of the images of each batch that this process has to draw. A batch of which some images are
            there is drawn whole, so that the others become what they would have been.
        num_missing: images that are to be drawn, by all processes.

    Raises:
        ValueError: the format is unknown. On entering: the folder is a file or holds something else, samples of
            another protocol (each field that differs is named), PNGs of another origin, or PNGs that an earlier run
            was to keep and this one would remove; or another run works in it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        plan: SamplePlan,
        sampling: Mapping[str, Any],
        size: tuple[int, int],
        format: str,
        accelerator: Accelerator,
        checkpoint: str,
        share: str,
    ):
        if format not in FORMATS:
            raise ValueError(f"`format` must be {', '.join(FORMATS)}, got {format!r}.")
        self.path, self.plan, self.size, self.format = Path(path), plan, tuple(size), format
        self.accelerator, self.share = accelerator, share
        self.protocol = new_protocol(sampling, accelerator.device, checkpoint)
        self.batches: list[range] = []
        self.num_missing = 0
        self._digits = max(6, len(str(plan.num_images - 1)))
        self._pending: list[Future] = []
        self._pool, self._stack = ThreadPoolExecutor(_THREADS), ExitStack()

    def image_path(self, image: int) -> Path:
        """Where an image lies."""
        return self.path / f"{image:0{self._digits}d}.png"

    def __enter__(self) -> "SampleFolder":
        with self._stack as stack:
            self.protocol, self._missing, self._npz_is_whole = on_main_process(self.accelerator, self._open)
            self.num_missing = len(self._missing)
            needed = [batch for batch in self.plan.batches() if not self._missing.isdisjoint(batch)]
            process, count = place_of(self.accelerator)
            self.batches = needed[process::count]  # shares of what is missing: none has all the work that is left
            self._staging = stack.enter_context(staging_folder(self.path / "images"))
            stack.callback(shutil.rmtree, self._staging, ignore_errors=True)
            stack.callback(self._pool.shutdown, cancel_futures=True)
            self._stack = stack.pop_all()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def write(self, batch: range, images: torch.Tensor, shares: torch.Tensor) -> None:
        """Hand over images of these numbers, (B, 3, H, W) in [0, 1], and the share of each, (B,).

        They are written while the next batch is drawn. Waits for what was handed over before.

        Raises:
            OSError: the disk is full or failed, perhaps with an image that was handed over before.
        """
        pixels = unit_to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self._wait()
        self._pending = [
            self._pool.submit(self._write_png, image, rows, share)
            for image, rows, share in zip(batch, pixels, shares.tolist(), strict=True)
            if image in self._missing
        ]

    def finish(self) -> dict[str, Any]:
        """Wait for all processes, check the images, write the .npz if there is to be one, and return the protocol.

        Raises:
            OSError: the disk is full or failed.
            ValueError: an image is missing or damaged; another run draws it again.
        """
        self._wait()
        self.accelerator.wait_for_everyone()
        return on_main_process(self.accelerator, self._complete)

    def _wait(self) -> None:
        for future in self._pending:
            future.result()

    def _write_png(self, image: int, pixels: np.ndarray, share: float) -> None:
        info = PngInfo()
        for key, value in self._texts(image, share).items():
            info.add_text(key, value)
        path = self.image_path(image)
        staged = self._staging / path.name
        Image.fromarray(pixels).save(staged, compress_level=_COMPRESSION, pnginfo=info)
        staged.replace(path)

    def _read_png(self, image: int, decode: bool) -> tuple[float, np.ndarray | None]:
        """The share and, if asked for, the pixels (H, W, 3) of an image; its checksums are checked in any case."""
        path = self.image_path(image)
        try:
            data = path.read_bytes()
            opened = Image.open(io.BytesIO(data), formats=["PNG"])
            found, mode, size = opened.info, opened.mode, (opened.height, opened.width)
            opened.verify()
            if not data.endswith(_END):  # Pillow does not read to the end
                raise ValueError("its end is missing")
            pixels = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"])) if decode else None
        except Exception as error:  # damaged files raise anything
            raise UnusableImageError(f"{path.name}: {error or type(error).__name__}") from error
        texts = {key: found[key] for key in (_LABEL, self.share) if key in found}
        expected = self._texts(image, texts.get(self.share))
        if self.share not in texts or (mode, size, texts) != ("RGB", self.size, expected):
            raise ValueError(
                f"{path} is not image {image} of these samples, and is not written over: expected"
                f" {self.size[0]}x{self.size[1]} RGB with {expected}, got {size[0]}x{size[1]} {mode} with {texts}."
            )
        return float(texts[self.share]), pixels

    def _texts(self, image: int, share: object) -> dict[str, str]:
        """What a PNG says of itself."""
        label = self.plan.label(image)
        return {self.share: str(share)} | ({} if label is None else {_LABEL: str(label)})

    def _open(self) -> tuple[dict[str, Any], set[int], bool]:
        """Take the folder; its protocol, the images that are to be drawn, and whether the .npz is whole."""
        others = names_in(self.path)
        if others and PROTOCOL not in others:
            raise ValueError(f"{self.path} holds no samples but {listed(others)}: pass another folder.")
        self._stack.enter_context(lock(self.path))

        names = set(os.listdir(self.path))
        present = [image for image in range(self.plan.num_images) if self.image_path(image).name in names]
        if PROTOCOL in names and (present or NPZ in names):
            stored, parts = read_protocol(self.path), ("sampling", "environment")
            differ = differences(*({part: protocol[part] for part in parts} for protocol in (stored, self.protocol)))
            if differ:
                raise ValueError(
                    f"{self.path} holds samples of another protocol: {'; '.join(differ)}. Repeat the command that"
                    " began it, or pass another folder."
                )
            self.protocol = stored
            if self.format == "npz" and present and stored["run"].get("format") != "npz":
                raise ValueError(f"`format` 'npz' would remove the PNGs that {self.path} keeps: pass 'both'.")
        run, npz_is_whole, missing = self.protocol["run"], False, set()
        if self.format != "png" and is_sealed(self.path):
            try:
                verify(self.path)
                npz_is_whole = NPZ in settle(self.path)["files"]
            except ValueError as error:
                warnings.warn(f"written again: {error}", stacklevel=5)
        if not (self.format == "npz" and npz_is_whole):
            missing = set(range(self.plan.num_images)) - set(present) | self._damaged(present)
        if missing or not is_sealed(self.path):
            run["format"] = self.format
            run["batch_sizes"] = sorted({*run.get("batch_sizes", []), self.plan.batch_size})
            self._write_protocol(complete=False)
        return self.protocol, missing, npz_is_whole

    def _damaged(self, present: list[int]) -> set[int]:
        """Those of the images that are there that cannot be kept."""

        def damage(image: int) -> str | None:
            try:
                self._read_png(image, decode=False)
            except UnusableImageError as error:
                return str(error)

        found = {image: words for image, words in zip(present, self._pool.map(damage, present)) if words}
        if found:
            warnings.warn(f"{self.path}: damaged, and drawn again: {listed(found.values())}.", stacklevel=5)
        return set(found)

    def _complete(self) -> dict[str, Any]:
        pack = self.format != "png" and bool(self._missing or not self._npz_is_whole)
        if pack or not is_sealed(self.path):
            shares: list[float] = []
            checked = self._check_all(shares, decode=pack)
            if pack:
                write_npz(self.path / NPZ, (self.plan.num_images, *self.size, 3), checked)
            else:
                list(checked)
            run, seconds = self.protocol["run"], time.perf_counter() - self._start
            run["format"] = self.format
            if self._missing:
                run |= {"num_processes": self.accelerator.num_processes, "num_drawn": self.num_missing}
                run |= {"seconds": round(seconds, 3), "images_per_second": round(self.num_missing / seconds, 3)}
            self.protocol[f"mean_{self.share}"] = math.fsum(shares) / len(shares)
            self._write_protocol(complete=True)
            seal(self.path, [self.path / PROTOCOL, *([self.path / NPZ] if self.format != "png" else [])])
        if self.format == "npz":
            for image in range(self.plan.num_images):
                self.image_path(image).unlink(missing_ok=True)
        return self.protocol

    def _check_all(self, shares: list[float], decode: bool) -> Iterator[np.ndarray | None]:
        """Check every image and note its share; their pixels in batches, if they are asked for."""
        for batch in tqdm(self.plan.batches(), desc="packing" if decode else "checking"):
            try:
                read = list(self._pool.map(partial(self._read_png, decode=decode), batch))
            except UnusableImageError as error:
                raise ValueError(f"{self.path}: {error}. Repeat the command: it draws this image again.") from error
            shares += [share for share, _ in read]
            yield np.stack([pixels for _, pixels in read]) if decode else None

    def _write_protocol(self, complete: bool) -> None:
        self.protocol["complete"] = complete
        (self.path / MANIFEST).unlink(missing_ok=True)  # what it seals changes
        write_json_durably(self.path / PROTOCOL, self.protocol)
