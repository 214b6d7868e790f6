# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Presets are the paper's sizes."""

import json

import pytest
import torch

from diffusers_d2it import D2iTContentModel, D2iTGrainModel, DynamicAutoencoderKL, list_presets, load_preset


CLASSES = {"dvae": DynamicAutoencoderKL, "grain": D2iTGrainModel, "content": D2iTContentModel}


def build(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return CLASSES[name.split("-")[0]](**load_preset(name))


def test_every_size_of_the_paper_and_the_tiny_ones_are_listed():
    assert list_presets() == sorted(list_presets())
    assert set(list_presets()) >= {
        "dvae-f8f16",
        "grain-s",
        "content-b",
        "content-l",
        "content-xl",
        "dvae-tiny",
        "grain-tiny",
        "content-tiny",
    }


@pytest.mark.parametrize(
    ("name", "millions"), [("grain-s", 33), ("content-b", 136), ("content-l", 467), ("content-xl", 687)]
)
def test_parameters_are_those_of_the_paper(name, millions):
    assert build(name).num_parameters() == pytest.approx(millions * 1e6, rel=0.005)


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_is_a_whole_configuration_of_its_model(name):
    """Every key is an argument of the model, and what is built has the values of the file."""
    config = load_preset(name)
    model = build(name)
    for key, value in config.items():
        stored = model.config[key]
        assert (list(stored) if isinstance(stored, tuple) else stored) == value


@pytest.mark.parametrize("content", ["content-b", "content-l", "content-xl"])
def test_the_paper_presets_fit_one_another(content):
    dvae, grain, content = build("dvae-f8f16"), build("grain-s"), build(content)
    assert dvae.config.sample_size == 256
    assert content.config.sample_size == 256 // dvae.downsample_factor
    assert grain.config.sample_size == 256 // dvae.region_size
    assert dvae.num_grains == grain.config.num_grains == content.config.num_grains == 2
    assert dvae.config.latent_channels == content.config.in_channels
    assert grain.config.num_classes == content.config.num_classes == 1000


def test_the_tiny_presets_fit_one_another():
    dvae, grain, content = (build(f"{kind}-tiny") for kind in ("dvae", "grain", "content"))
    assert content.config.sample_size == dvae.config.sample_size // dvae.downsample_factor
    assert grain.config.sample_size == dvae.config.sample_size // dvae.region_size
    assert dvae.num_grains == grain.config.num_grains == content.config.num_grains
    assert dvae.config.latent_channels == content.config.in_channels
    assert grain.config.num_classes == content.config.num_classes
    assert sum(model.num_parameters() for model in (dvae, grain, content)) < 1e6


def test_refine_layers_replace_layers_of_the_backbone():
    """DiT-B, L and XL have 12, 24 and 28 blocks."""
    for name, num_blocks in (("content-b", 12), ("content-l", 24), ("content-xl", 28)):
        config = load_preset(name)
        assert config["num_layers"] + config["num_refine_layers"] == num_blocks


def test_a_preset_can_be_changed_without_changing_the_next_one():
    config = load_preset("dvae-tiny")
    config["downsample_factors"].append(16)
    assert load_preset("dvae-tiny")["downsample_factors"] == [4, 8]


def test_a_json_file_is_read_like_a_preset(tmp_path):
    config = load_preset("grain-tiny") | {"num_classes": 7}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    assert load_preset(str(path)) == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("content-xxl", "'content-xxl'.*Did you mean 'content-xl'.*content-b"),
        ("Grain-s", "Did you mean 'grain-s'"),
        ("zzz", "no preset or JSON file 'zzz'. Presets: content-b"),
        ("missing.json", "no preset or JSON file 'missing.json'"),
    ],
)
def test_an_unknown_preset_is_refused_with_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        load_preset(name)
