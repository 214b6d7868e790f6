# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Write a latent cache: encode rows of images into shards, with many processes, and again after an interruption.

Shards do not depend on who writes them: the rows of each are encoded in batches counted from its first row.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..files.folders import STAGING, check_sha256, check_size, file_sha256, sweep, write_durably, write_text_durably
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from .images import UnusableImageError, decode_image, to_pixels
from .latent_cache_files import (
    INDEX,
    LOCK,
    PLAN,
    LatentCachePlan,
    ShardRecord,
    index_to_json,
    read_index,
    record_path,
    shard_metadata,
    shard_path,
)
from .source import ImageSource


_LOCK_SECONDS = 10  # workers of a killed run hold its lock until they notice, at most 5 seconds


@dataclass
class EncodedRows:
    """The contents of a shard, or of a batch of it.

    Args:
        tensors: by their names in a shard, see `latent_cache_files`.
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
        batch_sampler=[rows for shard in shards for rows in batches[shard]],
        num_workers=num_workers,
        collate_fn=_collate,
    )
    decoded = iter(tqdm(decoded, desc="batches", disable=not progress))
    for shard in shards:
        encoded = [_encode_batch(vae, *batch, plan.flips) for batch in islice(decoded, len(batches[shard]))]
        full = [batch.tensors for batch in encoded if batch.tensors]
        yield (
            shard,
            EncodedRows(
                {name: torch.cat([tensors[name] for tensors in full]) for name in (full[0] if full else ())},
                [image for batch in encoded for image in batch.bad_images],
            ),
        )


class _DecodedRows(Dataset):
    """Batches of rows of a source: (row, label, pixels) of usable images, and the others."""

    def __init__(self, source: ImageSource, resolution: int):
        self.source = source
        self.resolution = resolution

    def __getitems__(self, rows: range) -> tuple[list[tuple[int, int, torch.Tensor]], list[dict]]:
        images, bad_images = [], []
        for row, (name, encoded, label) in zip(rows, self.source.rows(rows.start, rows.stop), strict=True):
            try:
                images.append((row, label, to_pixels(decode_image(encoded), self.resolution)))
            except UnusableImageError as error:
                bad_images.append({"row": row, "name": name, "reason": str(error)})
        return images, bad_images


def _collate(batch: tuple[list, list]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[dict]]:
    images, bad_images = batch
    rows, labels = (torch.tensor([image[i] for image in images], dtype=torch.int64) for i in (0, 1))
    pixels = torch.stack([image[2] for image in images]) if images else None
    return rows, labels, pixels, bad_images


def _encode_batch(
    vae: DynamicAutoencoderKL,
    rows: torch.Tensor,
    labels: torch.Tensor,
    pixels: torch.Tensor | None,
    bad_images: list[dict],
    flips: bool,
) -> EncodedRows:
    if pixels is None:
        return EncodedRows(bad_images=bad_images)
    try:
        tensors = encode_images(vae, pixels.to(vae.device), flips)
    except ValueError as error:
        raise ValueError(f"images of rows {rows[0].item()} to {rows[-1].item()}: {error}") from error
    return EncodedRows({**tensors, "class_labels": labels, "rows": rows}, bad_images)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class LatentCacheWriter:
    """Writes the shards of a plan, and at last the index that makes them a cache.

        writer = LatentCacheWriter(folder, plan, accelerator)
        for shard, contents in encode_shards(vae, source, plan, writer.start(), batch_size=32):
            writer.write_shard(shard, contents)
        index = writer.finish()

    Killed at any moment and called again with the same plan it keeps the finished shards.

    Args:
        folder: new or empty, or left by an interrupted run.
        plan: what the cache holds.
        accelerator: its processes share the shards; each must see the folder.
    """

    def __init__(self, folder: str | Path, plan: LatentCachePlan, accelerator: Accelerator):
        self.folder = Path(folder)
        self.plan = plan
        self.accelerator = accelerator
        self._plan_sha256 = ""
        self._lock: FileLock | None = None

    def start(self) -> list[int]:
        """Prepare the folder and return the numbers of the shards that this process has to write.

        Finished shards are verified, each by one process; a damaged one is reported and written again.

        Raises:
            ValueError: the folder holds something else or another plan, or another run is writing to it.
        """
        if self.accelerator.is_main_process:
            self._prepare_folder()
        self.accelerator.wait_for_everyone()
        stored = LatentCachePlan.load(self.folder)
        differences = stored.differences(vars(self.plan))
        if differences:
            self._release()
            raise ValueError(
                f"{self.folder} holds a latent cache of another plan: {'; '.join(differences)}. Repeat the command"
                " that began it, or choose another folder."
            )
        self._plan_sha256 = file_sha256(self.folder / PLAN)

        # A share of the verification, then a share of what is missing: one process has not all the work that is left.
        for shard in self._share(range(self.plan.num_shards)):
            self._drop_if_damaged(shard)
        self.accelerator.wait_for_everyone()
        missing = [shard for shard in range(self.plan.num_shards) if not record_path(self.folder, shard).is_file()]
        if missing and self.accelerator.is_main_process:
            (self.folder / INDEX).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return self._share(missing)

    def write_shard(self, shard: int, contents: EncodedRows) -> None:
        """Write a shard and its record, each whole or not at all.

        Raises:
            ValueError: the contents do not match the plan.
        """
        tensors = self._check(shard, contents)
        path = shard_path(self.folder, shard)
        metadata = shard_metadata(self._plan_sha256, shard)
        write_durably(path, lambda staged: save_file(tensors, staged, metadata=metadata))
        record = ShardRecord(path.stat().st_size, file_sha256(path), len(tensors["rows"]), contents.bad_images)
        write_text_durably(record_path(self.folder, shard), record.to_json())

    def finish(self) -> dict:
        """Wait for all processes, write the index and return it.

        Raises:
            ValueError: a shard is missing or has another size than its record, or no image could be used.
        """
        self.accelerator.wait_for_everyone()
        records = [ShardRecord.load(self.folder, shard) for shard in range(self.plan.num_shards)]
        for shard, record in enumerate(records):
            check_size(shard_path(self.folder, shard), record.bytes)
        if not any(record.num_images for record in records):
            image = records[0].bad_images[0]
            raise ValueError(f"none of {self.plan.num_rows} images can be used, {image['name']}: {image['reason']}")
        if self.accelerator.is_main_process:
            write_text_durably(self.folder / INDEX, index_to_json(self._plan_sha256, records))
            sweep(self.folder)
        self._release()
        self.accelerator.wait_for_everyone()
        return read_index(self.folder)

    def _prepare_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / PLAN).is_file():
            names = sorted(path.name for path in self.folder.iterdir())
            found = [name for name in names if name != LOCK and not name.startswith(STAGING)]
            if found:
                raise ValueError(f"{self.folder} is neither empty nor a latent cache, it holds {found[0]}.")
        self._lock = FileLock(self.folder / LOCK)
        try:
            self._lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout:
            raise ValueError(f"another run is writing to {self.folder}.") from None
        sweep(self.folder)
        if not (self.folder / PLAN).is_file():
            write_text_durably(self.folder / PLAN, self.plan.to_json())

    def _release(self) -> None:
        if self._lock is not None:
            (self.folder / LOCK).unlink()
            self._lock.release()
            self._lock = None

    def _share(self, shards) -> list[int]:
        return list(shards)[self.accelerator.process_index :: self.accelerator.num_processes]

    def _drop_if_damaged(self, shard: int) -> None:
        if not record_path(self.folder, shard).is_file():
            return
        try:
            record = ShardRecord.load(self.folder, shard)
            check_size(shard_path(self.folder, shard), record.bytes)
            check_sha256(shard_path(self.folder, shard), record.sha256)
        except ValueError as error:
            warnings.warn(f"{error} The shard is written again.", stacklevel=3)
            record_path(self.folder, shard).unlink()

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
