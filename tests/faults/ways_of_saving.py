# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every way in which the library saves something, each with the check that tells what is on the disk afterwards.

A way saves versions: all weights of version v are the number v, so that a mixture shows.
"""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from script_runs import join_threads
from small_runs import SmallRun

from diffusers_d2it import D2iTGrainModel, D2iTPipeline
from diffusers_d2it.data.latent_cache import LatentCache, LatentCachePlan
from diffusers_d2it.data.latent_cache_writer import EncodedRows, write_latent_cache
from diffusers_d2it.files import lock, write_json_durably
from diffusers_d2it.hub.card import make_model_card
from diffusers_d2it.hub.push import write_card
from diffusers_d2it.models import LatentCodec
from diffusers_d2it.training import find_checkpoint


class Mixed(AssertionError):
    """What was loaded without an error is no version that was ever saved."""


def set_version(model: torch.nn.Module, version: int) -> None:
    """Make every weight the number of the version."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(version)


def version_of(*models: torch.nn.Module) -> int:
    """The version that models hold. Raises `Mixed` if they hold several."""
    values = {value for model in models for p in model.parameters() for value in p.unique().tolist()}
    if len(values) != 1:
        raise Mixed(f"weights of versions {sorted(values)}")
    return int(values.pop())


class Way(ABC):
    """One way of saving.

    Args:
        folder: empty; everything is saved in there.
        components: a pipeline of tiny models.
    """

    def __init__(self, folder: Path, components: D2iTPipeline):
        self.folder = folder
        self.components = components

    @abstractmethod
    def save(self, version: int) -> None:
        """Save a version over those before it."""

    @abstractmethod
    def saved(self) -> int:
        """The version that a user gets. Raises `Mixed` if it is none, another error if nothing can be loaded."""

    def start_again(self) -> None:  # noqa: B027  most ways need nothing
        """What a script does first when it is started again."""


class SaveModel(Way):
    """`save_pretrained` of a model in shards, over an earlier one in another number of shards."""

    def save(self, version):
        set_version(self.components.grain_model, version)
        size = "40KB" if version % 2 else "15KB"
        self.components.grain_model.save_pretrained(self.folder / "model", max_shard_size=size)

    def saved(self):
        return version_of(D2iTGrainModel.from_pretrained(self.folder / "model"))


class SavePipeline(Way):
    """`save_pretrained` of a pipeline."""

    def save(self, version):
        models = (self.components.vae, self.components.grain_model, self.components.transformer)
        for model in models:
            set_version(model, version)
        self.components.save_pretrained(self.folder / "pipeline")

    def saved(self):
        pipe = D2iTPipeline.from_pretrained(self.folder / "pipeline")
        return version_of(pipe.vae, pipe.grain_model, pipe.transformer)


class SaveCheckpoint(Way):
    """A checkpoint of a training that goes on meanwhile, the only one that is kept."""

    def __init__(self, folder, components):
        super().__init__(folder, components)
        self.accelerator = Accelerator(cpu=True)
        self.run = SmallRun(self.accelerator, self.folder, components.grain_model, total_limit=1)
        self.run.update(0)
        self.checkpoints = self.run.checkpoints

    def save(self, version):
        self._set(version)
        self.checkpoints.save(version)
        self._set(-1)  # the training goes on while it is written
        if version % 2:
            join_threads()  # by the thread, else by who waits for it
        self.checkpoints.finish()

    def _set(self, version: int) -> None:
        set_version(self.run.model, version)
        for tensor in self._rest():
            tensor.fill_(version)

    def _rest(self) -> list[torch.Tensor]:
        """All but the weights: the average and what the optimizer keeps."""
        return [*self.run.ema.shadow_params, *(t for s in self.run.optimizer.state.values() for t in s.values())]

    def start_again(self):
        lock(self.folder).close()

    def saved(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # names what it skips
            checkpoint = find_checkpoint(self.accelerator, self.folder, "latest")
        version = self.checkpoints.resume(checkpoint)
        weights, rest = version_of(self.run.model), {float(value) for t in self._rest() for value in t.unique()}
        if not {weights} == rest == {version}:
            raise Mixed(f"step {version}, optimizer and average {rest}, weights {weights}")
        return version


class SaveCache(Way):
    """A latent cache of three shards. It is written once; its version is the number of whole shards."""

    def __init__(self, folder, components):
        super().__init__(folder, components)
        self.plan = LatentCachePlan(
            **LatentCodec(components.vae).describe(), resolution=32, flips=False, source="numbers",
            data_fingerprint="x", num_rows=6, rows_per_shard=2, num_classes=None, id2label=None,
        )  # fmt: skip

    def save(self, version):
        def encode(shards: list[int]) -> Iterator[tuple[int, EncodedRows]]:
            return ((shard, self._contents(shard)) for shard in shards)

        write_latent_cache(self.folder / "cache", self.plan, Accelerator(cpu=True), encode)

    def _contents(self, shard: int) -> EncodedRows:
        rows = list(self.plan.rows(shard))
        channels = 2 * self.plan.latent_channels
        side = 32 // self.plan.downsample_factors[-1]
        tensors = {
            f"moments.{grain}": torch.full((2, 1, channels, side << grain, side << grain), shard, dtype=torch.float16)
            for grain in range(len(self.plan.downsample_factors))
        }
        tensors["entropy"] = torch.full((2, side, side), float(shard))
        return EncodedRows({**tensors, "class_labels": torch.tensor(rows), "rows": torch.tensor(rows)})

    def saved(self):
        try:
            self._read()
        except ValueError:  # unfinished, which is said
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a shard that is there is not damaged
            self.save(0)  # the same command again
        self._read()
        return 0

    def _read(self) -> None:
        cache = LatentCache(self.folder / "cache", self.components.vae, seed=0, resolution=32)
        entropies = [cache[i]["entropy"].unique().tolist() for i in range(6)]
        if entropies != [[float(i // 2)] for i in range(6)]:
            raise Mixed(f"entropies {entropies}")


class SaveFiles(Way):
    """Single files: a calibration, and a model card with its image."""

    def save(self, version):
        write_json_durably(self.folder / "calibration.json", {"version": version})
        image = self.folder / f"drawn-{version}.png"
        if not image.exists():
            Image.new("RGB", (8, 8), (version // 256, version % 256, 0)).save(image)
        card = make_model_card(self.components, repo_id="user/repo", license=None, train_data=f"version {version}.")
        write_card(self.folder, card, image)

    def saved(self):
        calibration = json.loads((self.folder / "calibration.json").read_text())["version"]
        text = (self.folder / "README.md").read_text()
        versions = {calibration, int(text.split("version ")[1].split(".")[0].split("\\")[0])}
        high, low, _ = Image.open(self.folder / "samples.png").getpixel((0, 0))
        versions.add(256 * high + low)
        if max(versions) - min(versions) > 1:  # three files, one after the other
            raise Mixed(f"versions {versions}")
        return min(versions)


WAYS = [SaveModel, SavePipeline, SaveCheckpoint, SaveCache, SaveFiles]
