# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Train from codes that were encoded once: a latent cache on disk, and the data set that reads it.

What is read are posteriors at every grain, not samples at one: a step still draws its own noise, flip and fine ratio.
An `AutoencoderKL` has one grain, and its caches no entropy.

    plan.json                      what is cached, of which autoencoder and which images; written first
    shard-00000/codes.safetensors  the codes of rows 0 ... rows_per_shard - 1 of the images
    shard-00000/bad_images.json    the images among them that were left out
    manifest.json                  seals the plan and the manifests of all shards; written last

Every shard is saved and sealed as any other folder: it is there whole, or not at all. The cache counts when its own
manifest is there.

Tensors of a shard of n images, V = 2 for an image and its mirror, V = 1 without flips:
    moments.<grain>  (n, V, 2C, H/f, W/f) float16, means and log-variances on the grain's own grid; 0 is the coarsest
    entropy          (n, h, w) float32, nats; of the image, that of the mirror is its mirror; with several grains
    class_labels     (n,) int64, 0 without labels
    rows             (n,) int64, numbers of the images in the data set, ascending
"""

import json
import random
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from ..files import is_sealed, read_json
from ..files import verify as verify_folder
from ..files.folders import MANIFEST, check_file, file_sha256, settle
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from ..models.latent_codec import LatentCodec
from ..words import differences
from .images import check_resolution
from .loaders import Place, place_of_item


PLAN = "plan.json"
CODES = "codes.safetensors"
BAD_IMAGES = "bad_images.json"

_FORMAT = "latent cache of diffusers-d2it"
_VERSION = 3  # 2 did not say of which autoencoder, 1 had indices of its own in the place of manifests


@dataclass(frozen=True)
class LatentCachePlan:
    """What a cache holds, decided before the first image is encoded."""

    autoencoder: str  # name of its class; this and the next seven are those of `LatentCodec.describe`
    vae_fingerprint: str
    scaling_factor: float  # of the autoencoder; the stored moments are not scaled
    shift_factor: float  # 0.0 for none
    latents_mean: list[float] | None  # by channel
    latents_std: list[float] | None
    downsample_factors: list[int]  # finest first
    latent_channels: int  # C
    resolution: int  # side of the images in pixels
    flips: bool  # whether the mirrored images are stored too
    source: str  # the images in words
    data_fingerprint: str  # changes when the images do
    num_rows: int  # number of images, unusable ones included
    rows_per_shard: int  # the last shard may have fewer
    num_classes: int | None  # size of the label table, None without labels
    id2label: dict[int, str] | None  # names of the classes that occur, None without labels

    def __post_init__(self) -> None:
        for name in ("num_rows", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` of a latent cache must be at least 1, got {getattr(self, name)}.")
        check_resolution(self.resolution, self.downsample_factors[-1])

    @property
    def has_entropy(self) -> bool:
        return self.autoencoder == "DynamicAutoencoderKL"

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.num_rows))

    def to_json(self) -> dict[str, Any]:
        """The values of plan.json."""
        return json.loads(json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, allow_nan=False))

    @classmethod
    def load(cls, folder: Path) -> "LatentCachePlan":
        """Read plan.json.

        Raises:
            ValueError: it is missing or damaged, or of another version of the format.
        """
        path = folder / PLAN
        if not path.is_file():
            raise ValueError(f"{folder} is no latent cache: it has no {PLAN}.")
        stored = read_json(path)
        found = stored.pop("format", None), stored.pop("version", None)
        if found != (_FORMAT, _VERSION):
            raise ValueError(
                f"{path} must be of {_FORMAT!r}, version {_VERSION}, got {found[0]!r}, version {found[1]!r}: write the"
                " cache again, into another folder, by `accelerate launch examples/cache_latents.py`."
            )
        if stored.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} is damaged: it has the fields {sorted(stored)}.")
        if stored["id2label"] is not None:
            stored["id2label"] = {int(label): name for label, name in stored["id2label"].items()}
        return cls(**stored)


def shard_folder(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}"


def shard_metadata(plan_sha256: str, shard: int) -> dict[str, str]:
    """What the header of the codes of a shard says of its place.

    One entry: safetensors writes several in random order, and equal shards would differ.
    """
    return {"latent_cache": json.dumps({"plan_sha256": plan_sha256, "shard": shard})}


def read_bad_images(folder: Path, shard: int) -> list[dict]:
    """The images that a shard leaves out, {"row", "name", "reason"}.

    Raises a ValueError if a file of the shard is missing or, by its size, damaged.
    """
    path = shard_folder(folder, shard)
    records = settle(path)["files"]
    for name, record in records.items():
        check_file(path / name, record, contents=name == BAD_IMAGES)
    return read_json(path / BAD_IMAGES)["bad_images"]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class LatentCache(Dataset):
    """The images of a latent cache, written by examples/cache_latents.py, with the flips of `ImageDataset`.

        cache = LatentCache("cache", vae, seed=0, resolution=256)
        batch = next(iter(DataLoader(cache, batch_size=32, shuffle=True, collate_fn=cache.collate)))
        moments, entropy = read_codes(vae, batch)
        grain_map = grain_map_from_entropy(entropy, vae.thresholds(fine_ratio=0.3))
        latents = vae.scale_latents(vae.posterior(moments, grain_map).sample())

    Items are {"moments": [(2C, h, w), (2C, 2h, 2w) ... (2C, H/f, W/f)], coarsest first, "entropy": (h, w),
    "class_labels": int64 scalar}, float32; the label is 0 without labels. Those of an `AutoencoderKL` have one grain
    and no entropy, and `LatentCodec` reads either. Images are read from the disk one by one: memory does not grow with
    the cache.

    Args:
        folder: the cache.
        vae: the autoencoder that the codes are for, or its codec; None skips its comparison with the one that encoded.
        seed: with the epoch and the number of the image in its data set it decides every flip.
        resolution: side of the images in pixels that training expects; None for whatever the cache has.
        moments: False leaves them out: the grain model is trained on entropy alone.
        verify: compare the SHA-256 of the shards, which reads all of them once; sizes are compared in any case.
        process_index: of this process, out of `num_processes` that share the verification.
        num_processes: how many share it.

    Attributes:
        num_classes, id2label, description: those of the plan, as `ImageDataset` has them.
        fingerprint: changes when anything in the cache does: SHA-256 of its manifest.

    Raises:
        ValueError: the cache is unfinished, incomplete or damaged, or was written for another autoencoder, scale or
            resolution; the message names file or fields.
    """

    def __init__(
        self,
        folder: str | Path,
        vae: DynamicAutoencoderKL | AutoencoderKL | LatentCodec | None,
        *,
        seed: int,
        resolution: int | None = None,
        moments: bool = True,
        verify: bool = True,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.folder = Path(folder)
        self.seed = seed
        self.moments = moments
        self.plan = LatentCachePlan.load(self.folder)
        shards = range(self.plan.num_shards)
        if not is_sealed(self.folder):
            finished = sum(is_sealed(shard_folder(self.folder, shard)) for shard in shards)
            raise ValueError(
                f"latent cache {self.folder} is unfinished: {finished} of {len(shards)} shards, no {MANIFEST}. Run the"
                " same command of examples/cache_latents.py again."
            )
        verify_folder(self.folder)
        expected = {} if vae is None else LatentCodec(vae).describe()
        if resolution is not None:
            expected["resolution"] = resolution
        differ = differences({name: getattr(self.plan, name) for name in expected}, expected)
        if differ:
            raise ValueError(
                f"latent cache {self.folder} does not fit this training: {'; '.join(differ)}. Write one with"
                " examples/cache_latents.py for this autoencoder and resolution."
            )
        num_images = [len(self.plan.rows(shard)) - len(read_bad_images(self.folder, shard)) for shard in shards]
        if verify:
            with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock
                share = (shard_folder(self.folder, shard) for shard in shards[process_index::num_processes])
                list(threads.map(verify_folder, share))
        self.num_classes = self.plan.num_classes
        self.id2label = self.plan.id2label
        self.description = self.plan.source
        self.fingerprint = file_sha256(self.folder / MANIFEST)
        self._ends = list(accumulate(num_images))  # index after each shard
        self._plan_sha256 = file_sha256(self.folder / PLAN)
        self._num_grains = len(self.plan.downsample_factors)
        self._arrays: dict[int, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, item: int | Place) -> dict:
        batch = self.__getitems__([item])
        return {name: [one[0] for one in of] if name == "moments" else of[0] for name, of in batch.items()}

    def __getitems__(self, items: list[int | Place]) -> dict:
        """A batch, as a `DataLoader` asks for it; stacked already, so `collate` has nothing left to do.

        To take it apart into items and stack those again would take as long as to read it.
        """
        epochs, indices = zip(*map(place_of_item, items))
        shards, positions = zip(*map(self._find, indices))
        rows = _gather(shards, "rows", positions).tolist()
        flips = [self._draws_flip(epoch, row) for epoch, row in zip(epochs, rows)]
        batch = {"class_labels": torch.from_numpy(_gather(shards, "class_labels", positions))}
        if self.plan.has_entropy:
            entropy = _gather(shards, "entropy", positions)
            for one, flip in zip(entropy, flips):
                if flip:
                    one[:] = one[:, ::-1].copy()
            batch["entropy"] = torch.from_numpy(entropy)
        if self.moments:
            places = list(zip(positions, map(int, flips)))
            grains = [_gather(shards, f"moments.{grain}", places) for grain in range(self._num_grains)]
            # Converted by torch: numpy takes ten times as long for float16
            batch["moments"] = [torch.from_numpy(moments).float() for moments in grains]
        return batch

    @staticmethod
    def collate(batch: dict) -> dict:
        """What a `DataLoader` needs as its `collate_fn`: batches come stacked from `__getitems__`."""
        return batch

    def _draws_flip(self, epoch: int, row: int) -> bool:
        return self.plan.flips and random.Random(f"{self.seed}/{epoch}/{row}").random() < 0.5

    def _find(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        """The shard of an image, open, and its position there."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a latent cache of {len(self)}.")
        shard = bisect_right(self._ends, index)
        if shard not in self._arrays:
            self._arrays[shard] = self._open(shard)
        return self._arrays[shard], index - (self._ends[shard - 1] if shard else 0)

    def _open(self, shard: int) -> dict[str, np.ndarray]:
        path = shard_folder(self.folder, shard) / CODES
        try:
            # As tensors, safetensors maps the file into memory; what is not touched is not read.
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        expected = shard_metadata(self._plan_sha256, shard)
        if metadata != expected:
            raise ValueError(f"{path} does not belong there: its header says {metadata}, not {expected}.")
        return arrays

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_arrays": {}}  # a worker process opens the shards itself


def read_entropy(vae: DynamicAutoencoderKL, batch: dict) -> torch.Tensor:
    """Entropy of the regions of a batch, (B, h, w) in nats: of a cache, or counted on `batch["pixels"]`."""
    return batch["entropy"] if "entropy" in batch else vae.region_entropy(batch["pixels"])


@torch.no_grad()
def read_codes(vae: DynamicAutoencoderKL, batch: dict) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Moments of every grain and entropy of a batch: of a cache, or encoded from `batch["pixels"]`.

    Returns:
        What `DynamicAutoencoderKL.encode_grains` and `region_entropy` give: (B, 2C, h, w) ... (B, 2C, H/f, W/f),
        coarsest first, and (B, h, w).
    """
    return LatentCodec(vae).moments(batch), read_entropy(vae, batch)


def _gather(shards: list[dict[str, np.ndarray]], name: str, places: list) -> np.ndarray:
    """An array of one element of each shard, without the checks that take `np.stack` most of its time."""
    first = shards[0][name][places[0]]
    gathered = np.empty((len(places), *first.shape), first.dtype)
    for i, (shard, place) in enumerate(zip(shards, places)):
        gathered[i] = shard[name][place]
    return gathered
