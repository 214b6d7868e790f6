# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Write a latent cache: encode rows of images into shards, with many processes, and again after an interruption.

Shards do not depend on who writes them: the rows of each are encoded in batches counted from its first row.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..files import lock, on_main_process, remove_folder, save_folder, seal, sweep, verify, write_json_durably
from ..files.folders import MANIFEST, file_sha256, names_in
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.latent_codec import LatentCodec
from ..words import differences, listed
from .images import UnusableImageError, decode_image, to_pixels
from .latent_cache import BAD_IMAGES, CODES, PLAN, LatentCachePlan, read_bad_images, shard_folder, shard_metadata
from .source import ImageSource


_LOCK_SECONDS = 10  # workers of a killed run hold its lock until they notice, at most 5 seconds


@dataclass
class EncodedRows:
    """A shard, or a batch of it: tensors by their names there, and images left out, {"row", "name", "reason"}."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    bad_images: list[dict] = field(default_factory=list)


@torch.no_grad()
def encode_images(
    vae: DynamicAutoencoderKL | AutoencoderKL | LatentCodec, pixels: torch.Tensor, flips: bool
) -> dict[str, torch.Tensor]:
    """The codes of images (B, 3, H, W) in [-1, 1] and of their mirrors, as a shard holds them, on the CPU.

    A mirrored image is encoded by itself: a convolutional encoder does not commute with mirroring.

    Raises:
        ValueError: a moment is not finite in float16.
    """
    codec = LatentCodec(vae)
    views = [pixels, pixels.flip(-1)] if flips else [pixels]
    tensors = {}
    for grain, moments in enumerate(zip(*map(codec.encode, views))):
        codes = torch.stack(moments, dim=1)  # (B, V, 2C, h, w)
        half = codes.half()
        if not half.isfinite().all():
            raise ValueError(
                f"moments of grain {grain} must be finite in float16, within +-65504, got values up to"
                f" {codes.abs().max().item():.4g}: this autoencoder cannot be cached."
            )
        tensors[f"moments.{grain}"] = half.cpu().contiguous()
    if codec.has_grains:
        tensors["entropy"] = codec.vae.region_entropy(pixels).cpu()
    return tensors


def encode_shards(
    vae: DynamicAutoencoderKL | AutoencoderKL | LatentCodec,
    source: ImageSource,
    plan: LatentCachePlan,
    shards: list[int],
    batch_size: int,
    num_workers: int = 0,
    progress: bool = False,
) -> Iterator[tuple[int, EncodedRows]]:
    """Number and contents of each of some shards, encoded on the device of the autoencoder.

    Args:
        vae, source, plan: the autoencoder or its codec, the images, and what the cache holds.
        shards: their numbers.
        batch_size: rows encoded at once; part of the result by its last bits.
        num_workers: processes that decode images.
        progress: show a bar.

    Raises:
        ValueError: a moment is not finite in float16.
    """
    codec, rows = LatentCodec(vae), {shard: plan.rows(shard) for shard in shards}
    batches = {shard: [all[i : i + batch_size] for i in range(0, len(all), batch_size)] for shard, all in rows.items()}
    decoded = DataLoader(
        _DecodedRows(source, plan.resolution),
        batch_size=None,  # an item is a batch
        sampler=[rows for shard in shards for rows in batches[shard]],
        num_workers=num_workers,
    )
    decoded = iter(tqdm(decoded, desc="batches", disable=not progress))
    for shard in shards:
        encoded = [_encode_rows(codec, batch, plan.flips) for batch in islice(decoded, len(batches[shard]))]
        full = [batch.tensors for batch in encoded if batch.tensors]
        tensors = {name: torch.cat([one[name] for one in full]) for name in (full[0] if full else ())}
        yield shard, EncodedRows(tensors, [image for batch in encoded for image in batch.bad_images])
    next(decoded, None)  # which ends the bar


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


def _encode_rows(codec: LatentCodec, decoded: EncodedRows, flips: bool) -> EncodedRows:
    if not decoded.tensors:
        return decoded
    numbers, rows = dict(decoded.tensors), decoded.tensors["rows"]
    try:
        codes = encode_images(codec, numbers.pop("pixels").to(codec.vae.device), flips)
    except ValueError as error:
        raise ValueError(f"images of rows {rows[0].item()} to {rows[-1].item()}: {error}") from error
    return EncodedRows(codes | numbers, decoded.bad_images)


def write_latent_cache(
    folder: str | Path,
    plan: LatentCachePlan,
    accelerator: Accelerator,
    encode: Callable[[list[int]], Iterable[tuple[int, EncodedRows]]],
) -> list[dict]:
    """Write the shards of a plan, and at last the manifest that makes them a cache.

        write_latent_cache(
            folder, plan, accelerator, lambda shards: encode_shards(vae, source, plan, shards, batch_size=32)
        )

    Killed at any moment and called again with the same plan it keeps the finished shards. They are verified first,
    each by one process; a damaged one is reported and written again.

    Args:
        folder: new or empty, or left by an interrupted run.
        plan: what the cache holds.
        accelerator: its processes share the shards; each must see the folder.
        encode: called once in each process; gives number and contents of each of the shards that it has to write.

    Returns:
        The images that were left out, {"row", "name", "reason"}.

    Raises:
        ValueError: the folder holds something else or another plan, or another run is writing to it; the contents of a
            shard do not match the plan; or no image can be used.
    """
    folder, shards = Path(folder), range(plan.num_shards)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    with ExitStack() as held:
        on_main_process(accelerator, lambda: _take_folder(folder, plan, held))
        differ = differences(LatentCachePlan.load(folder).to_json(), plan.to_json())
        if differ:
            raise ValueError(
                f"{folder} holds a latent cache of another plan: {'; '.join(differ)}. Repeat the command that began"
                " it, or choose another folder."
            )
        # A share of the verification, then a share of what is missing: one process has not all the work that is left.
        for shard in shards[mine]:
            _drop_if_damaged(shard_folder(folder, shard))
        accelerator.wait_for_everyone()
        missing = [shard for shard in shards if not shard_folder(folder, shard).is_dir()]
        if missing and accelerator.is_main_process:
            (folder / MANIFEST).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        plan_sha256 = file_sha256(folder / PLAN)
        for shard, contents in encode(missing[mine]):
            _save_shard(folder, plan, plan_sha256, shard, contents)
        accelerator.wait_for_everyone()
        return on_main_process(accelerator, lambda: _seal(folder, plan))


def _take_folder(folder: Path, plan: LatentCachePlan, held: ExitStack) -> None:
    """Lock the folder for this run, and see that it holds a plan; one of which no shard was written is replaced."""
    found = names_in(folder)
    if found and PLAN not in found:
        raise ValueError(f"{folder} is neither empty nor a latent cache, it holds {listed(found)}.")
    held.enter_context(lock(folder, wait=_LOCK_SECONDS))
    if {*names_in(folder)} <= {PLAN}:
        write_json_durably(folder / PLAN, plan.to_json())


def _drop_if_damaged(shard: Path) -> None:
    if shard.is_dir():
        try:
            verify(shard)
        except ValueError as error:
            warnings.warn(f"{error} The shard is written again.", stacklevel=3)
            remove_folder(shard)


def _save_shard(folder: Path, plan: LatentCachePlan, plan_sha256: str, shard: int, contents: EncodedRows) -> None:
    tensors = _check(plan, shard, contents)

    def save(staging: str) -> None:
        save_file(tensors, Path(staging, CODES), metadata=shard_metadata(plan_sha256, shard))
        text = json.dumps({"bad_images": contents.bad_images}, indent=2) + "\n"
        Path(staging, BAD_IMAGES).write_text(text, encoding="utf-8")

    save_folder(shard_folder(folder, shard), save)


def _seal(folder: Path, plan: LatentCachePlan) -> list[dict]:
    shards = range(plan.num_shards)
    bad_images = [image for shard in shards for image in read_bad_images(folder, shard)]
    if len(bad_images) == plan.num_rows:
        image = bad_images[0]
        for shard in shards:  # it holds nothing, and would be in the way of other images
            remove_folder(shard_folder(folder, shard))
        raise ValueError(f"none of {plan.num_rows} images can be used, {image['name']}: {image['reason']}")
    seal(folder, [folder / PLAN, *(shard_folder(folder, shard) / MANIFEST for shard in shards)])
    sweep(folder)
    return bad_images


def _check(plan: LatentCachePlan, shard: int, contents: EncodedRows) -> dict[str, torch.Tensor]:
    """The tensors of a shard, empty ones where no image could be used, if they are what the plan says."""
    rows, tensors = plan.rows(shard), contents.tensors
    views = 2 if plan.flips else 1
    side = plan.resolution // plan.downsample_factors[-1]
    expected = {
        f"moments.{grain}": (torch.float16, (views, 2 * plan.latent_channels, side << grain, side << grain))
        for grain in range(len(plan.downsample_factors))
    }
    if plan.has_entropy:
        expected["entropy"] = (torch.float32, (side, side))
    expected["class_labels"] = expected["rows"] = (torch.int64, ())
    num_images = len(rows) - len(contents.bad_images)
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
