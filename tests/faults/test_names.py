# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Names from outside that drive a terminal: of classes, files, weights and manifests. They are shown escaped."""

import json
import warnings

import pytest
import torch
from image_files import encode, photo, write_folder
from safetensors.torch import load_file, save_file
from ways_of_saving import SaveCheckpoint

from diffusers_d2it.data.bad_images import BadImages
from diffusers_d2it.data.loaders import ImageDataset
from diffusers_d2it.data.source import load_images
from diffusers_d2it.files.folders import digest, save_folder, verify
from diffusers_d2it.hub.card import make_model_card


EVIL = "\x1b[31mred\x1b[0m\u202eabc"


def harmless(text: str) -> bool:
    """Whether nothing in a text moves the cursor, colours it or turns its direction."""
    return "\x1b" not in text and "\u202e" not in text


def test_hostile_names_are_shown_escaped(tmp_path, make_pipeline, fault, caplog):
    count = fault("name that drives a terminal: shown escaped")
    folder = write_folder(tmp_path / "photos", {f"{EVIL}/0.png": encode(photo()), f"{EVIL}/{EVIL}.png": b"none"})
    source = load_images(folder)
    bad_images = BadImages(tmp_path / "bad_images.jsonl")
    dataset = ImageDataset(source, 32, 0, bad_images)
    assert [dataset[i]["pixels"].shape for i in range(2)] == [(3, 32, 32)] * 2
    pipe = make_pipeline(id2label={i: f"{EVIL} {i}" for i in range(10)})
    with pytest.raises(ValueError) as no_such_class:
        pipe(EVIL, num_inference_steps=1)
    shown = {
        "classes of a folder": str(source),
        "unusable images": bad_images.summary(),
        "log of unusable images": caplog.text,
        "classes in an error": str(no_such_class.value),
        "classes in a card": str(make_model_card(pipe, repo_id="user/repo", license=None, train_data=EVIL)),
    }
    for what, text in shown.items():
        assert text
        count.tried(what, silent=not harmless(text))


def test_hostile_names_in_checkpoints_are_shown_escaped(tmp_path, make_pipeline, fault):
    count = fault("name of a weight or in a manifest that drives a terminal")
    way = SaveCheckpoint(tmp_path, make_pipeline())
    way.save(1)
    path = tmp_path / "checkpoint-1" / "optimizer.safetensors"
    save_file({**load_file(path), f"{EVIL}/step": torch.zeros(())}, path)
    with pytest.raises(ValueError) as foreign:
        way.checkpoints.resume(tmp_path / "checkpoint-1")
    count.tried("weight", silent=not harmless(str(foreign.value)))

    save_folder(tmp_path / "saved", lambda folder: None)
    manifest = {"version": 1, "files": {EVIL: {"bytes": 1, "sha256": "0"}}}
    (tmp_path / "saved" / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest(manifest)}))
    with pytest.raises(ValueError) as named, warnings.catch_warnings():
        warnings.simplefilter("error")
        verify(tmp_path / "saved")
    count.tried("manifest", silent=not harmless(str(named.value)))
