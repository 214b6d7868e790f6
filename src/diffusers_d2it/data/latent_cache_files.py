# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A latent cache on disk: its files, what they say of themselves, and the checks on them.

    plan.json                 what is cached, of which autoencoder and which images; written first
    shard-00000.safetensors   the codes of rows 0 ... rows_per_shard - 1 of the images
    shard-00000.json          its size, SHA-256, number of images, and the images left out; written after it
    index.json                the same of all shards, and the SHA-256 of the plan; written last, when all are there

Every file is written aside, forced to the disk and then renamed: a file in its place is whole. A shard counts when its
JSON file is there and agrees with it, the cache when index.json is there.

Tensors of a shard of n images, V = 2 for an image and its mirror, V = 1 without flips:
    moments.<grain>  (n, V, 2C, H/f, W/f) float16, means and log-variances on the grain's own grid; 0 is the coarsest
    entropy          (n, h, w) float32, nats; of the image, that of the mirror is its mirror
    class_labels     (n,) int64, 0 without labels
    rows             (n,) int64, numbers of the images in the data set, ascending
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from ..entropy import NUM_BINS, SIGMA
from ..files.folders import digest, file_sha256, read_json
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL


VERSION = 1
PLAN = "plan.json"
INDEX = "index.json"
LOCK = ".lock"

# What `encode_grains` and `region_entropy` do not read: a cache outlives a tuned decoder or a new calibration.
_MODULES_OF_DECODING = ("decoder.", "post_quant_conv.")
_CONFIG_OF_DECODING = {
    "out_channels",
    "decoder_block_out_channels",
    "use_post_quant_conv",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "grain_ratios",
    "calibration",
}


def vae_fingerprint(vae: DynamicAutoencoderKL) -> str:
    """SHA-256 of all that decides how an autoencoder encodes: configuration, names, shapes and float32 weights.

    The decoder has no part in it, nor have scale, shift and thresholds, which are applied to codes after they are
    read. The bins and the width by which the calibration counts entropy have one.
    """
    calibration = vae.config.calibration or {}
    config = {
        key: value for key, value in vae.config.items() if key not in _CONFIG_OF_DECODING and not key.startswith("_")
    }
    config.update(num_bins=calibration.get("num_bins", NUM_BINS), sigma=calibration.get("sigma", SIGMA))
    sha256 = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if not name.startswith(_MODULES_OF_DECODING):
            sha256.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
            sha256.update(tensor.to("cpu", torch.float32).contiguous().numpy())
    return sha256.hexdigest()


def describe_vae(vae: DynamicAutoencoderKL) -> dict:
    """The fields of a plan that an autoencoder decides."""
    return {
        "vae_fingerprint": vae_fingerprint(vae),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor or 0.0,
        "downsample_factors": list(vae.config.downsample_factors),
        "latent_channels": vae.config.latent_channels,
    }


# ---------------------------------------------------------------------------------------------------------------------
# What the files say
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentCachePlan:
    """What a cache holds, decided before the first image is encoded.

    Args:
        vae_fingerprint: from `vae_fingerprint`.
        scaling_factor: of the autoencoder; the stored moments are not scaled.
        shift_factor: of the autoencoder, 0.0 for none.
        downsample_factors: finest first.
        latent_channels: C.
        resolution: side of the images in pixels.
        flips: whether the mirrored images are stored too.
        source: the images in words.
        data_fingerprint: changes when the images do.
        num_rows: number of images, unusable ones included.
        rows_per_shard: rows of a shard; the last may have fewer.
        num_classes: size of the label table, None without labels.
        id2label: names of the classes that occur, None without labels.
    """

    vae_fingerprint: str
    scaling_factor: float
    shift_factor: float
    downsample_factors: list[int]
    latent_channels: int
    resolution: int
    flips: bool
    source: str
    data_fingerprint: str
    num_rows: int
    rows_per_shard: int
    num_classes: int | None
    id2label: dict[int, str] | None

    def __post_init__(self) -> None:
        for name in ("num_rows", "rows_per_shard", "resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` of a latent cache must be at least 1, got {getattr(self, name)}.")
        if self.resolution % self.downsample_factors[-1]:
            raise ValueError(
                f"`resolution` {self.resolution} is not a multiple of the region size {self.downsample_factors[-1]}."
            )

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.num_rows))

    def to_json(self) -> str:
        """The text of plan.json, the same for equal plans."""
        return _to_json({"format": "latent cache of diffusers-d2it", "version": VERSION, **asdict(self)})

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
        if stored.pop("format", None) is None or stored.pop("version", None) != VERSION:
            raise ValueError(f"{path} is not the plan of a latent cache of version {VERSION}.")
        if stored.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} is damaged: it has the fields {sorted(stored)}.")
        if stored["id2label"] is not None:
            stored["id2label"] = {int(label): name for label, name in stored["id2label"].items()}
        return cls(**stored)

    def differences(self, others: dict) -> list[str]:
        """The fields in which this plan differs from given values, in words."""
        return [
            f"{name} is {getattr(self, name)!r} in the cache, {value!r} here"
            for name, value in others.items()
            if getattr(self, name) != value
        ]


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard.

    Args:
        bytes: size of the file.
        sha256: of the file.
        num_images: how many it holds.
        bad_images: those left out, {"row", "name", "reason"}.
    """

    bytes: int
    sha256: str
    num_images: int
    bad_images: list[dict]

    def to_json(self) -> str:
        """The text of the JSON file beside a shard."""
        return _to_json(asdict(self))

    @classmethod
    def load(cls, folder: Path, shard: int) -> "ShardRecord":
        """Read the JSON file beside a shard.

        Raises:
            ValueError: it is damaged.
        """
        path = record_path(folder, shard)
        stored = read_json(path)
        if stored.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} is damaged: it has the fields {sorted(stored)}.")
        return cls(**stored)


def index_to_json(plan_sha256: str, records: list[ShardRecord]) -> str:
    """The text of index.json. Its last entry is the SHA-256 of the others, a name for the contents of the cache."""
    index = {
        "plan_sha256": plan_sha256,
        "num_images": sum(record.num_images for record in records),
        "shards": [
            {"bytes": record.bytes, "sha256": record.sha256, "num_images": record.num_images} for record in records
        ],
        "bad_images": [image for record in records for image in record.bad_images],
    }
    return _to_json({**index, "sha256": digest(index)})


def read_index(folder: Path) -> dict:
    """Read index.json.

    Raises:
        ValueError: the cache is unfinished, the index is damaged, or plan.json was changed after it.
    """
    path = folder / INDEX
    if not path.is_file():
        plan = LatentCachePlan.load(folder)
        finished = sum(record_path(folder, shard).is_file() for shard in range(plan.num_shards))
        raise ValueError(
            f"latent cache {folder} is unfinished: {finished} of {plan.num_shards} shards, no {INDEX}. Run the same"
            " command of examples/cache_latents.py again."
        )
    index = read_json(path)
    if index.get("sha256") != digest({key: value for key, value in index.items() if key != "sha256"}):
        raise ValueError(f"{path} is damaged: its contents do not have the SHA-256 that it states.")
    if file_sha256(folder / PLAN) != index["plan_sha256"]:
        raise ValueError(f"{folder / PLAN} was changed after the cache was written: {INDEX} has another SHA-256.")
    return index


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def record_path(folder: Path, shard: int) -> Path:
    """The JSON file beside a shard."""
    return shard_path(folder, shard).with_suffix(".json")


def shard_metadata(plan_sha256: str, shard: int) -> dict[str, str]:
    """What the header of a shard says of its place.

    One entry: safetensors writes several in random order, and equal shards would differ.
    """
    return {"latent_cache": json.dumps({"plan_sha256": plan_sha256, "shard": shard})}


def _to_json(values: dict) -> str:
    return json.dumps(values, indent=2, allow_nan=False) + "\n"
