# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""`from_single_file`: weights that lie alone are those of the model that a configuration describes, or refused."""

import json

import pytest
import torch
from alike import same_weights
from safetensors.torch import load_file, save_file

from diffusers_d2it import D2iTContentModel


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("factory", ["make_vae", "make_grain_model", "make_content_model", "make_dcdit"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_a_single_file_is_the_model_that_was_saved(request, tmp_path, factory, as_dict):
    model = request.getfixturevalue(factory)()
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "loose.safetensors"
    (tmp_path / "saved" / WEIGHTS).rename(file)
    loaded = type(model).from_single_file(load_file(file) if as_dict else file, config=tmp_path / "saved")
    assert same_weights(loaded, model)
    assert not loaded.training
    half = type(model).from_single_file(file, config=tmp_path / "saved", dtype=torch.float16)
    assert half.dtype == torch.float16
    # diffusers takes a word for float32, with a warning
    assert same_weights(type(model).from_single_file(file, config=tmp_path / "saved", dtype="float16"), model)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda weights: weights.pop("patch_embed.weight"), "patch_embed.weight"),
        (lambda weights: weights.update(more=torch.zeros(1)), "more"),
        (lambda weights: weights.update({"label_embed.weight": torch.zeros(3, 3)}), "label_embed.weight"),
        (lambda weights: weights["label_embed.weight"].fill_(torch.nan), "label_embed.weight"),
        (
            lambda weights: weights.update({"patch_embed.weight": weights["patch_embed.weight"].view(torch.int32)}),
            "patch_embed.weight.*int32",
        ),
    ],
    ids=["missing", "unknown", "shape", "nan", "integers"],
)
def test_other_weights_are_refused_by_name(make_content_model, tmp_path, change, named):
    model = make_content_model()
    model.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    change(weights)
    save_file(weights, tmp_path / "loose.safetensors")
    with pytest.raises(ValueError, match=f"loose.safetensors.*{named}"):
        D2iTContentModel.from_single_file(tmp_path / "loose.safetensors", config=tmp_path)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_weights_that_a_dtype_cannot_hold_are_refused(make_content_model, tmp_path, argument):
    model = make_content_model()
    model.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["patch_embed.weight"][0, 0] = 1e5
    with pytest.raises(ValueError, match="patch_embed.weight.*float16"):
        D2iTContentModel.from_single_file(weights, config=tmp_path, **{argument: torch.float16})
    loaded = D2iTContentModel.from_single_file(weights, config=tmp_path, **{argument: torch.bfloat16})
    assert loaded.patch_embed.weight.isfinite().all()


def test_an_argument_counts_whether_or_not_the_configuration_has_its_key(make_content_model, tmp_path):
    model = make_content_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for kept in ({**config, "num_classes": 20}, {key: config[key] for key in config if key != "num_classes"}):
        (tmp_path / "config.json").write_text(json.dumps(kept))
        loaded = D2iTContentModel.from_single_file(model.state_dict(), config=tmp_path, num_classes=10)
        assert same_weights(loaded, model)
        with pytest.raises(ValueError, match="label_embed.weight"):
            D2iTContentModel.from_single_file(model.state_dict(), config=tmp_path)


def test_what_is_no_such_file_is_refused(make_content_model, tmp_path):
    make_content_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`config`"):
        D2iTContentModel.from_single_file(tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="model.ckpt"):
        D2iTContentModel.from_single_file("model.ckpt", config=tmp_path)
    with pytest.raises(OSError, match="gone.safetensors"):
        D2iTContentModel.from_single_file(tmp_path / "gone.safetensors", config=tmp_path)
