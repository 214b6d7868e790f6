# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""An AutoencoderKL of diffusers loads as it was saved or not at all."""

import json
import re
from pathlib import Path

import pytest
import torch
from alike import same_weights
from safetensors.torch import load_file, save_file

from diffusers_d2it.models.autoencoder_kl import check_autoencoder_kl, load_autoencoder_kl


WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # until 2023


@pytest.fixture
def folder(make_autoencoder_kl, tmp_path) -> Path:
    make_autoencoder_kl().save_pretrained(tmp_path)
    return tmp_path


def renamed(name: str) -> str:
    for new, old in OLD_NAMES.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def test_what_is_whole_is_loaded(make_autoencoder_kl, folder):
    vae = make_autoencoder_kl()
    assert same_weights(load_autoencoder_kl(folder), vae)
    vae.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len([*(folder / "shards").glob("*.safetensors")]) > 1
    assert same_weights(load_autoencoder_kl(folder / "shards"), vae)
    vae.half().save_pretrained(folder / "half", variant="fp16")
    check_autoencoder_kl(folder / "half", "fp16")


def test_names_of_old_files_are_known_where_diffusers_knows_them(make_autoencoder_kl, folder):
    old = {renamed(name): value for name, value in load_file(folder / WEIGHTS).items()}
    assert sum("attentions.0.query" in name for name in old) == 4
    save_file(old, folder / WEIGHTS)
    assert same_weights(load_autoencoder_kl(folder), make_autoencoder_kl())
    (folder / WEIGHTS).rename(folder / (shard := WEIGHTS.replace(".", "-00001-of-00001.")))
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, shard)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="attentions"):  # it would leave them random
        check_autoencoder_kl(folder)


@pytest.mark.parametrize("fault", ["missing", "foreign", "shape", "nan", "inf", "integers"])
def test_other_weights_are_refused_by_name(folder, fault):
    weights, key = load_file(folder / WEIGHTS), "encoder.conv_in.weight"
    if fault == "missing":
        del weights[key]
    elif fault == "foreign":
        key = "encoder.conv_in.scale"
        weights[key] = torch.zeros(8)
    elif fault == "shape":
        weights[key] = weights[key][:4].contiguous()
    elif fault == "integers":
        weights[key] = weights[key].view(torch.int32)
    else:
        weights[key].view(-1)[-1] = float(fault)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=re.escape(key)) as caught:
        load_autoencoder_kl(folder)
    assert str(folder) in str(caught.value)


def test_pickled_weights_are_not_read(make_autoencoder_kl, folder):
    (folder / WEIGHTS).unlink()
    make_autoencoder_kl().save_pretrained(folder, safe_serialization=False)
    assert (folder / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(ValueError, match=str(folder / WEIGHTS)):
        load_autoencoder_kl(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "AutoencoderTiny"),
        ("_use_default_values", ["scaling_factor"]),
        ("scaling_factor", None),
        ("scaling_factor", float("nan")),
        ("latents_mean", [0.0, 0.0, 0.0, 0.0]),  # without latents_std
        ("latents_std", [1.0]),
        ("down_block_types", ["DownEncoderBlock2D"] * 2),
        ("down_block_types", ["DownBlock2D"] * 3),
        ("block_out_channels", [8, 8, 10**9]),
        ("norm_num_groups", 3),
        ("act_fn", "sinus"),
        ("use_quant_conv", "no"),
        ("quantization_config", {"quant_method": "torchao"}),
    ],
)
def test_other_configurations_are_refused_by_file_and_value(folder, key, value):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=re.escape(str(file))) as caught:
        load_autoencoder_kl(folder)
    assert key in str(caught.value) or str(value) in str(caught.value)
