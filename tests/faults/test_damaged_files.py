# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every file of everything that is saved, damaged in every way: it is noticed, and the file is named."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from image_files import flip_bit
from ways_of_saving import SaveCache, SaveCheckpoint, SaveModel, SavePipeline

from diffusers_d2it import D2iTGrainModel, D2iTPipeline, DCDiTPipeline
from diffusers_d2it.data.latent_cache import LatentCache
from diffusers_d2it.files.folders import MANIFEST
from diffusers_d2it.training import find_checkpoint


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "web_page": lambda path: path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "flipped_bit": lambda path: flip_bit(path, path.stat().st_size // 2),
}


def try_damages(count, folder: Path, load: Callable[[], object], needs_manifest: bool = True) -> None:
    """Damage each file of a folder in each way; `load` must raise an error or log a warning that names the file.

    What comes from the Hub has no manifest, and is loaded all the same: that it is missing is no damage then.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    assert files
    for path in files:
        content = path.read_bytes()
        for name, damage in DAMAGES.items():
            if name == "missing" and path.name == MANIFEST and not needs_manifest:
                continue
            damage(path)
            what = f"{path.relative_to(folder)} {name}"
            count.named(load, path.name, what=what)
            path.write_bytes(content)
    load()


def test_checkpoints(tmp_path, make_pipeline, fault):
    named = fault("file of a checkpoint damaged, resumed by name")
    latest = fault("file of the newest checkpoint damaged")
    way = SaveCheckpoint(tmp_path, make_pipeline())
    way.checkpoints.total_limit = None
    for version in (1, 2):
        way.save(version)
    newest = tmp_path / "checkpoint-2"
    try_damages(named, newest, lambda: find_checkpoint(way.accelerator, tmp_path, newest))

    def load_latest() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = find_checkpoint(way.accelerator, tmp_path, "latest")
        if found != newest:
            assert found == tmp_path / "checkpoint-1"
            raise ValueError(str(caught[0].message))  # names what was skipped

    try_damages(latest, newest, load_latest)


def test_a_checkpoint_under_another_name_or_without_a_manifest_is_not_one(tmp_path, make_pipeline, fault):
    count = fault("checkpoint renamed, copied in part, stray names")
    way = SaveCheckpoint(tmp_path, make_pipeline())
    way.save(3)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-7")
    for stray in ("checkpoint-final", "checkpoint-8.old", "checkpoint-", "checkpoint-9"):
        (tmp_path / stray).mkdir()
    (tmp_path / "checkpoint-10").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find_checkpoint(way.accelerator, tmp_path, "latest")
    texts = [str(one.message) for one in caught]
    count.tried(found, lost=found != tmp_path / "checkpoint-3")
    for name in ("checkpoint-7", "checkpoint-9", "checkpoint-10"):
        count.tried(name, silent=not any(name in text for text in texts))
    for name in ("checkpoint-7", "checkpoint-9", "checkpoint-final"):
        with pytest.raises(ValueError, match=name):
            find_checkpoint(way.accelerator, tmp_path, tmp_path / name)


def test_models_and_pipelines(tmp_path, make_pipeline, make_dcdit_pipeline, fault):
    of_model, of_pipeline = fault("file of a saved model damaged"), fault("file of a saved pipeline damaged")
    components = make_pipeline()
    for way in (SaveModel(tmp_path, components), SavePipeline(tmp_path, components)):
        way.save(1)
    try_damages(of_model, tmp_path / "model", lambda: D2iTGrainModel.from_pretrained(tmp_path / "model"), False)
    try_damages(of_pipeline, tmp_path / "pipeline", lambda: D2iTPipeline.from_pretrained(tmp_path / "pipeline"), False)
    folder = tmp_path / "dcdit"  # with an autoencoder of diffusers
    make_dcdit_pipeline().save_pretrained(folder)
    try_damages(of_pipeline, folder, lambda: DCDiTPipeline.from_pretrained(folder), False)


def test_latent_caches(tmp_path, make_pipeline, fault):
    count = fault("file of a latent cache damaged")
    way = SaveCache(tmp_path, make_pipeline())
    way.save(0)

    def load() -> None:
        LatentCache(tmp_path / "cache", way.components.vae, seed=0, resolution=32)

    try_damages(count, tmp_path / "cache", load)
