# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Write a latent cache: encode rows of images into shards, with many processes, and again after an interruption.

Shards do not depend on who writes them: the rows of each are encoded in batches counted from its first row.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..files import lock, on_main_process, remove_folder, save_folder, seal, sweep, verify, write_text_durably
from ..files.folders import MANIFEST, file_sha256, names_in
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..words import differences, listed
from .images import UnusableImageError, decode_image, to_pixels
from .latent_cache import BAD_IMAGES, CODES, PLAN, LatentCachePlan, read_bad_images, shard_folder, shard_metadata
from .source import ImageSource


_LOCK_SECONDS = 10  # workers of a killed run hold its lock until they notice, at most 5 seconds


@dataclass
class EncodedRows:
    """The contents of a shard, or of a batch of it.

    Args:
        tensors: by their names in a shard, see `latent_cache`.
        bad_images: those left out, {"row", "name", "reason"}.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    bad_images: list[dict] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_images(vae: DynamicAutoencoderKL, pixels: torch.Tensor, flips: bool) -> dict[str, torch.Tensor]:
    """The codes of images (B, 3, H, W) in [-1, 1] and of their mirrors, as a shard holds them, on the CPU.

    A mirrored image is encoded by itself: a convolutional encoder does not commute with mirroring.

    Raises:
        ValueError: a moment is not finite in float16.
    """
    views = [pixels, pixels.flip(-1)] if flips else [pixels]
    tensors = {}
    for grain, moments in enumerate(zip(*(vae.encode_grains(view) for view in views))):
        codes = torch.stack(moments, dim=1)  # (B, V, 2C, h, w)
        half = codes.half()
        if not half.isfinite().all():
            raise ValueError(
                f"moments of grain {grain} must be finite in float16, within +-65504, got values up to"
                f" {codes.abs().max().item():.4g}: this autoencoder cannot be cached."
            )
        tensors[f"moments.{grain}"] = half.cpu().contiguous()
    return {**tensors, "entropy": vae.region_entropy(pixels).cpu()}


def encode_shards(
    vae: DynamicAutoencoderKL,
    source: ImageSource,
    plan: LatentCachePlan,
    shards: list[int],
    batch_size: int,
    num_workers: int = 0,
    progress: bool = False,
) -> Iterator[tuple[int, EncodedRows]]:
    """Number and contents of each of some shards.

    Args:
        vae: the autoencoder, on the device where it encodes.
        source: the images.
        plan: resolution, flips and rows of the shards.
        shards: their numbers.
        batch_size: rows encoded at once; part of the result by its last bits.
        num_workers: processes that decode images.
        progress: show a bar.

    Raises:
        ValueError: a moment is not finite in float16.
    """
    batches = {
        shard: [plan.rows(shard)[i : i + batch_size] for i in range(0, len(plan.rows(shard)), batch_size)]
        for shard in shards
    }
    decoded = DataLoader(
        _DecodedRows(source, plan.resolution),
        batch_size=None,  # an item is a batch
        sampler=[rows for shard in shards for rows in batches[shard]],
        num_workers=num_workers,
    )
    decoded = iter(tqdm(decoded, desc="batches", disable=not progress))
    for shard in shards:
        encoded = [_encode_rows(vae, batch, plan.flips) for batch in islice(decoded, len(batches[shard]))]
        full = [batch.tensors for batch in encoded if batch.tensors]
        tensors = {name: torch.cat([one[name] for one in full]) for name in (full[0] if full else ())}
        yield shard, EncodedRows(tensors, [image for batch in encoded for image in batch.bad_images])


class _DecodedRows(Dataset):
    """Batches of rows of a source: numbers, labels and pixels of usable images, and the others."""

    def __init__(self, source: ImageSource, resolution: int):
        self.source = source
        self.resolution = resolution

    def __getitem__(self, rows: range) -> EncodedRows:
        used, labels, images, bad_images = [], [], [], []
        for row, (name, encoded, label) in zip(rows, self.source.rows(rows.start, rows.stop), strict=True):
            try:
                images.append(to_pixels(decode_image(encoded), self.resolution))
                used.append(row)
                labels.append(label)
            except UnusableImageError as error:
                bad_images.append({"row": row, "name": name, "reason": str(error)})
        if not images:
            return EncodedRows(bad_images=bad_images)
        numbers = {"class_labels": torch.tensor(labels), "rows": torch.tensor(used)}
        return EncodedRows({"pixels": torch.stack(images), **numbers}, bad_images)


def _encode_rows(vae: DynamicAutoencoderKL, decoded: EncodedRows, flips: bool) -> EncodedRows:
    if not decoded.tensors:
        return decoded
    numbers, rows = dict(decoded.tensors), decoded.tensors["rows"]
    try:
        codes = encode_images(vae, numbers.pop("pixels").to(vae.device), flips)
    except ValueError as error:
        raise ValueError(f"images of rows {rows[0].item()} to {rows[-1].item()}: {error}") from error
    return EncodedRows(codes | numbers, decoded.bad_images)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class LatentCacheWriter:
    """Writes the shards of a plan, and at last the manifest that makes them a cache.

        with LatentCacheWriter(folder, plan, accelerator) as writer:
            for shard, contents in encode_shards(vae, source, plan, writer.shards, batch_size=32):
                writer.write_shard(shard, contents)
            bad_images = writer.finish()

    Killed at any moment and called again with the same plan it keeps the finished shards. On entering they are
    verified, each by one process; a damaged one is reported and written again.

    Args:
        folder: new or empty, or left by an interrupted run.
        plan: what the cache holds.
        accelerator: its processes share the shards; each must see the folder.

    Attributes:
        shards: numbers of the shards that this process has to write.

    Raises:
        ValueError: on entering, the folder holds something else or another plan, or another run is writing to it.
    """

    def __init__(self, folder: str | Path, plan: LatentCachePlan, accelerator: Accelerator):
        self.folder = Path(folder)
        self.plan = plan
        self.accelerator = accelerator
        self.shards: list[int] = []
        self._plan_sha256 = ""
        self._lock = ExitStack()

    def __enter__(self) -> "LatentCacheWriter":
        on_main_process(self.accelerator, self._take_folder)
        differ = differences(LatentCachePlan.load(self.folder).to_json(), self.plan.to_json())
        if differ:
            self._lock.close()
            raise ValueError(
                f"{self.folder} holds a latent cache of another plan: {'; '.join(differ)}. Repeat the command that"
                " began it, or choose another folder."
            )
        self._plan_sha256 = file_sha256(self.folder / PLAN)

        # A share of the verification, then a share of what is missing: one process has not all the work that is left.
        shards = range(self.plan.num_shards)
        for shard in self._share(shards):
            self._drop_if_damaged(shard_folder(self.folder, shard))
        self.accelerator.wait_for_everyone()
        missing = [shard for shard in shards if not shard_folder(self.folder, shard).is_dir()]
        if missing and self.accelerator.is_main_process:
            (self.folder / MANIFEST).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self.shards = self._share(missing)
        return self

    def __exit__(self, *error) -> None:
        self._lock.close()

    def write_shard(self, shard: int, contents: EncodedRows) -> None:
        """Write a shard, whole or not at all.

        Raises:
            ValueError: the contents do not match the plan.
        """
        tensors = self._check(shard, contents)

        def save(staging: str) -> None:
            save_file(tensors, Path(staging, CODES), metadata=shard_metadata(self._plan_sha256, shard))
            text = json.dumps({"bad_images": contents.bad_images}, indent=2) + "\n"
            Path(staging, BAD_IMAGES).write_text(text, encoding="utf-8")

        save_folder(shard_folder(self.folder, shard), save)

    def finish(self) -> list[dict]:
        """Wait for all processes, seal the cache and return the images that were left out, {"row", "name", "reason"}.

        Raises:
            ValueError: a shard is missing or has another size than it should, or no image could be used.
        """
        self.accelerator.wait_for_everyone()
        return on_main_process(self.accelerator, self._seal)

    def _take_folder(self) -> None:
        """Lock the folder for this run, and see that it holds a plan."""
        is_new = not (self.folder / PLAN).is_file()
        if is_new and (found := names_in(self.folder)):
            raise ValueError(f"{self.folder} is neither empty nor a latent cache, it holds {listed(found)}.")
        self._lock = lock(self.folder, wait=_LOCK_SECONDS)
        if is_new:
            write_text_durably(self.folder / PLAN, json.dumps(self.plan.to_json(), indent=2) + "\n")

    def _seal(self) -> list[dict]:
        shards = range(self.plan.num_shards)
        bad_images = [image for shard in shards for image in read_bad_images(self.folder, shard)]
        if len(bad_images) == self.plan.num_rows:
            image = bad_images[0]
            raise ValueError(f"none of {self.plan.num_rows} images can be used, {image['name']}: {image['reason']}")
        seal(self.folder, [self.folder / PLAN, *(shard_folder(self.folder, shard) / MANIFEST for shard in shards)])
        sweep(self.folder)
        return bad_images

    def _share(self, shards: Sequence[int]) -> list[int]:
        return list(shards[self.accelerator.process_index :: self.accelerator.num_processes])

    def _drop_if_damaged(self, shard: Path) -> None:
        if not shard.is_dir():
            return
        try:
            verify(shard)
        except ValueError as error:
            warnings.warn(f"{error} The shard is written again.", stacklevel=3)
            remove_folder(shard)

    def _check(self, shard: int, contents: EncodedRows) -> dict[str, torch.Tensor]:
        """The tensors of a shard, empty ones where no image could be used."""
        plan, rows = self.plan, self.plan.rows(shard)
        views = 2 if plan.flips else 1
        side = plan.resolution // plan.downsample_factors[-1]
        expected = {
            f"moments.{grain}": (torch.float16, (views, 2 * plan.latent_channels, side << grain, side << grain))
            for grain in range(len(plan.downsample_factors))
        }
        expected["entropy"] = (torch.float32, (side, side))
        expected["class_labels"] = expected["rows"] = (torch.int64, ())
        num_images = len(rows) - len(contents.bad_images)
        tensors = contents.tensors
        if not num_images:
            return {name: torch.empty(0, *shape, dtype=dtype) for name, (dtype, shape) in expected.items()}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        expected = {name: (dtype, (num_images, *shape)) for name, (dtype, shape) in expected.items()}
        if found != expected:
            raise ValueError(f"shard {shard} must hold {expected}, got {found}.")
        good_and_bad = {*tensors["rows"].tolist(), *(image["row"] for image in contents.bad_images)}
        if good_and_bad != set(rows):
            raise ValueError(f"shard {shard} must hold or name each of the rows {rows.start} to {rows.stop - 1}.")
        return tensors
