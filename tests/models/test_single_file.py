# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""`from_single_file`: weights that lie alone are those of the model that a configuration describes, or refused."""

import pytest
import torch
from alike import same_weights
from safetensors.torch import load_file, save_file

from diffusers_d2it import D2iTContentModel


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("factory", ["make_vae", "make_grain_model", "make_content_model"])
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
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda weights: weights.pop("patch_embed.weight"), "patch_embed.weight"),
        (lambda weights: weights.update(more=torch.zeros(1)), "more"),
        (lambda weights: weights.update({"label_embed.weight": torch.zeros(3, 3)}), "label_embed.weight"),
        (lambda weights: weights["label_embed.weight"].fill_(torch.nan), "label_embed.weight"),
    ],
    ids=["missing", "unknown", "shape", "nan"],
)
def test_other_weights_are_refused_by_name(make_content_model, tmp_path, change, named):
    model = make_content_model()
    model.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    change(weights)
    save_file(weights, tmp_path / "loose.safetensors")
    with pytest.raises(ValueError, match=f"loose.safetensors.*{named}"):
        D2iTContentModel.from_single_file(tmp_path / "loose.safetensors", config=tmp_path)


def test_what_is_no_such_file_is_refused(make_content_model, tmp_path):
    make_content_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`config`"):
        D2iTContentModel.from_single_file(tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="model.ckpt"):
        D2iTContentModel.from_single_file("model.ckpt", config=tmp_path)
    with pytest.raises(OSError, match="gone.safetensors"):
        D2iTContentModel.from_single_file(tmp_path / "gone.safetensors", config=tmp_path)
