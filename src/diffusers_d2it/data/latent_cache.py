# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Train from codes that were encoded once: the data set that reads a latent cache.

What is read are posteriors at every grain, not samples at one: a step still draws its own noise, flip and fine ratio.
"""

import random
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from ..files.folders import check_sha256, check_size
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from .latent_cache_files import (
    LatentCachePlan,
    describe_vae,
    read_index,
    shard_metadata,
    shard_path,
)


class LatentCache(Dataset):
    """The images of a latent cache, written by examples/cache_latents.py, with the flips of `ImageDataset`.

        cache = LatentCache("cache", vae, seed=0, resolution=256)
        batch = next(iter(DataLoader(cache, batch_size=32, shuffle=True, collate_fn=cache.collate)))
        moments, entropy = read_codes(vae, batch)
        grain_map = grain_map_from_entropy(entropy, vae.thresholds(fine_ratio=0.3))
        latents = vae.scale_latents(vae.posterior(moments, grain_map).sample())

    Items are {"moments": [(2C, h, w), (2C, 2h, 2w) ... (2C, H/f, W/f)], coarsest first, "entropy": (h, w),
    "class_labels": int64 scalar}, float32; the label is 0 without labels. Images are read from the disk one by one:
    memory does not grow with the cache.

    Args:
        folder: the cache.
        vae: the autoencoder that the codes are for; None skips its comparison with the one that encoded.
        seed: with the epoch and the number of the image in its data set it decides every flip.
        resolution: side of the images in pixels that training expects; None for whatever the cache has.
        moments: False leaves them out: the grain model is trained on entropy alone.
        verify: compare the SHA-256 of the shards, which reads all of them once; sizes are always compared.
        process_index: of this process, out of `num_processes` that share the verification.
        num_processes: how many share it.

    Raises:
        ValueError: the cache is unfinished, incomplete or damaged, or was written for another autoencoder, scale or
            resolution; the message names file or fields.
    """

    def __init__(
        self,
        folder: str | Path,
        vae: DynamicAutoencoderKL | None,
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
        self.epoch = 0
        self.plan = LatentCachePlan.load(self.folder)
        index = read_index(self.folder)
        expected = {} if vae is None else describe_vae(vae)
        if resolution is not None:
            expected["resolution"] = resolution
        differences = self.plan.differences(expected)
        if differences:
            raise ValueError(
                f"latent cache {self.folder} does not fit this training: {'; '.join(differences)}. Write one with"
                " examples/cache_latents.py for this autoencoder and resolution."
            )

        self._plan_sha256 = index["plan_sha256"]
        self._sha256 = index["sha256"]
        self._ends = list(accumulate(shard["num_images"] for shard in index["shards"]))  # index after each shard
        self._num_grains = len(self.plan.downsample_factors)
        self._arrays: dict[int, dict[str, np.ndarray]] = {}
        for number, shard in enumerate(index["shards"]):
            check_size(shard_path(self.folder, number), shard["bytes"])
        if verify:
            with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock
                checks = [
                    threads.submit(check_sha256, shard_path(self.folder, number), shard["sha256"])
                    for number, shard in enumerate(index["shards"])
                    if number % num_processes == process_index
                ]
            for check in checks:
                check.result()

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the classes that occur, by id; None without labels."""
        return self.plan.id2label

    @property
    def num_classes(self) -> int | None:
        """Size of the label table; None without labels."""
        return self.plan.num_classes

    @property
    def description(self) -> str:
        """The images in words."""
        return self.plan.source

    @property
    def fingerprint(self) -> str:
        """Changes when anything in the cache does: SHA-256 over those of its plan and shards."""
        return self._sha256

    def set_epoch(self, epoch: int) -> None:
        """Draw other flips."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict:
        batch = self.__getitems__([index])
        item = {"entropy": batch["entropy"][0], "class_labels": batch["class_labels"][0]}
        if self.moments:
            item["moments"] = [moments[0] for moments in batch["moments"]]
        return item

    def __getitems__(self, indices: list[int]) -> dict:
        """A batch, as a `DataLoader` asks for it; stacked already, so `collate` has nothing left to do.

        To take it apart into items and stack those again would take as long as to read it.
        """
        shards, positions = zip(*map(self._find, indices))
        flips = [self._draws_flip(row) for row in _gather(shards, "rows", positions).tolist()]
        entropy = _gather(shards, "entropy", positions)
        for one, flip in zip(entropy, flips):
            if flip:
                one[:] = one[:, ::-1].copy()
        labels = _gather(shards, "class_labels", positions)
        batch = {"entropy": torch.from_numpy(entropy), "class_labels": torch.from_numpy(labels)}
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

    def _draws_flip(self, row: int) -> bool:
        return self.plan.flips and random.Random(f"{self.seed}/{self.epoch}/{row}").random() < 0.5

    def _find(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        """The shard of an image, open, and its position there."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a latent cache of {len(self)}.")
        shard = bisect_right(self._ends, index)
        if shard not in self._arrays:
            self._arrays[shard] = self._open(shard)
        return self._arrays[shard], index - (self._ends[shard - 1] if shard else 0)

    def _open(self, shard: int) -> dict[str, np.ndarray]:
        path = shard_path(self.folder, shard)
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
    moments = batch["moments"] if "moments" in batch else vae.encode_grains(batch["pixels"])
    return moments, read_entropy(vae, batch)


def _gather(shards: list[dict[str, np.ndarray]], name: str, places: list) -> np.ndarray:
    """An array of one element of each shard, without the checks that take `np.stack` most of its time."""
    first = shards[0][name][places[0]]
    gathered = np.empty((len(places), *first.shape), first.dtype)
    for i, (shard, place) in enumerate(zip(shards, places)):
        gathered[i] = shard[name][place]
    return gathered
