# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The checkpoints that come with the package are whole, small, trained, and described."""

import json
from pathlib import Path

import pytest
import torch

from diffusers_d2it import D2iTPipeline, bundled_checkpoint, list_bundled_checkpoints
from diffusers_d2it.evaluation.reconstruction import psnr
from diffusers_d2it.grains import grain_map_from_entropy, tie
from diffusers_d2it.losses import grain_loss


CLASSES = {"tiny-imagenet-20-64": (20, 207, "golden retriever", 64), "imagenette-128": (10, 574, "golf ball", 128)}


@pytest.fixture(scope="module", params=CLASSES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(name) -> D2iTPipeline:
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def photos(name, load_photos) -> torch.Tensor:
    return load_photos(CLASSES[name][-1])


def test_they_are_small_and_have_cards():
    folders = [Path(bundled_checkpoint(name)) for name in list_bundled_checkpoints()]
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors")) <= 34e6
    for folder in folders:
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert f'D2iTPipeline.from_pretrained(bundled_checkpoint("{folder.name}"))' in card
        assert "examples/train_d2it.py" in card and "## Metrics" in card and (folder / "samples.png").is_file()


def test_checkpoints_are_found_by_name():
    assert list_bundled_checkpoints() == sorted(CLASSES)
    assert Path(bundled_checkpoint()).name == "tiny-imagenet-20-64"
    with pytest.raises(ValueError, match="tiny-imagenet-20-46.*tiny-imagenet-20-64"):
        bundled_checkpoint("tiny-imagenet-20-46")
    with pytest.raises(OSError, match=r"`bundled_checkpoint\('imagenette-128'\)` is one"):
        D2iTPipeline.from_pretrained("imagenette-128", local_files_only=True)


def test_its_files_do_not_say_where_they_were_made(name):
    for path in Path(bundled_checkpoint(name)).rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8")), path


def test_it_draws_the_classes_it_names_and_no_others(name, pipe):
    number, id, word, side = CLASSES[name]
    assert len(pipe.id2label) == number and word in pipe.id2label[id]
    output = pipe(class_labels=[id], num_inference_steps=2)
    assert output.images[0].size == (side, side) and output.grain_maps.shape == (1, 8, 8)
    with pytest.raises(ValueError, match=word):
        pipe(class_labels=word[:-1] + "n")
    with pytest.raises(ValueError, match=f"`class_labels`.*{id + 1}.*{id}"):
        pipe(class_labels=id + 1)


@torch.no_grad()
def test_photographs_it_has_not_seen_are_reconstructed_better_with_more_codes(pipe, photos):
    scores = []
    for ratio in (0.0, 0.5, 1.0):
        latents = pipe.vae.encode(photos, fine_ratio=ratio).latent_dist.mode()
        scores.append(psnr(photos, pipe.vae.decode(latents).sample).mean().item())
    assert scores[0] + 0.5 < scores[1] < scores[2] - 0.2
    assert scores[0] > 17


@torch.no_grad()
def test_latents_of_photographs_have_about_unit_variance(pipe, photos):
    latents = pipe.vae.scale_latents(pipe.vae.encode(photos).latent_dist.mode())
    assert 0.7 < latents.std().item() < 1.4


@torch.no_grad()
def test_grain_model_restores_real_maps_from_noise(pipe, photos):
    # ln 2 is what a coin gives; at t = 400 much of the map is still visible
    grain_map = grain_map_from_entropy(pipe.vae.region_entropy(photos), pipe.vae.thresholds())
    state = pipe.grain_model.state_from_grain_map(grain_map, 2)
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((len(photos),), 400)
    noised = pipe.grain_scheduler.add_noise(state, noise, timesteps)
    no_class = torch.full((len(photos),), pipe.grain_model.config.num_classes)
    assert grain_loss(pipe.grain_model(noised, timesteps, no_class).logits, grain_map)["loss"] < 0.5


@torch.no_grad()
def test_content_model_predicts_the_flow_of_real_photographs(pipe, photos):
    encoded = pipe.vae.encode(photos)
    latents = pipe.vae.scale_latents(encoded.latent_dist.mode())
    noise = tie(torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), encoded.grain_map)
    timesteps = torch.full((len(photos),), 500)
    no_class = torch.full((len(photos),), pipe.transformer.config.num_classes)
    predicted = pipe.transformer((latents + noise) / 2, timesteps, encoded.grain_map, no_class).sample
    assert (predicted - (noise - latents)).square().mean() < 1.0  # predicting nothing gives 2
