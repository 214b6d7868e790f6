# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""No model loads a checkpoint that does not hold exactly its weights, and none is saved in part."""

import inspect
import json
import os
import re
import tempfile
from typing import get_type_hints

import pytest
import torch
from alike import same_weights
from diffusers import AutoModel
from diffusers.training_utils import EMAModel
from image_files import flip_bit
from loopback_hub import files_of
from safetensors.torch import load_file, save_file

from diffusers_d2it import (
    D2iTContentModel,
    D2iTGrainModel,
    D2iTPipeline,
    DCDiTModel,
    DynamicAutoencoderKL,
    load_preset,
)
from diffusers_d2it.files.folders import verify
from diffusers_d2it.models import configs


CLASSES = [DynamicAutoencoderKL, D2iTGrainModel, D2iTContentModel, DCDiTModel]
WEIGHTS = "diffusion_pytorch_model.safetensors"


# ---- Loading ----


@pytest.mark.parametrize(
    ("factory", "dtype"),
    [
        ("make_vae", torch.float32),
        ("make_grain_model", torch.float16),
        ("make_content_model", torch.bfloat16),
        *(("make_dcdit", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    ],
)
def test_loading_under_autocast_changes_nothing(request, tmp_path, factory, dtype):
    model = request.getfixturevalue(factory)().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_weights(type(model).from_pretrained(tmp_path, dtype=dtype), loaded)
    assert same_weights(loaded.to(dtype), model)  # a router of DC-DiT is in float32 before


@pytest.mark.parametrize(
    ("factory", "fault"),
    [
        *(("make_vae", fault) for fault in ("missing", "foreign", "shape", "nan", "inf", "-inf")),
        *((factory, "missing") for factory in ("make_grain_model", "make_content_model", "make_dcdit")),
    ],
)
def test_a_checkpoint_with_other_weights_is_refused_by_name(request, tmp_path, factory, fault):
    model = request.getfixturevalue(factory)()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "manifest.json").unlink()
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    weights = load_file(file)
    key = sorted(weights)[len(weights) // 2]
    if fault == "missing":
        del weights[key]
    elif fault == "foreign":
        key = "quant_conv.weight"
        weights[key] = torch.zeros(8, 8, 1, 1)
    elif fault == "shape":
        weights[key] = torch.zeros(*weights[key].shape, 2)
    else:
        weights[key].view(-1)[-1] = float(fault)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(key)) as caught:
        type(model).from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_mismatched_sizes_cannot_be_ignored_but_for_other_classes(make_grain_model, tmp_path):
    """It would leave random weights."""
    make_grain_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="label_embed"):
        D2iTGrainModel.from_pretrained(tmp_path, num_classes=20)
    ignoring = {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
    assert D2iTGrainModel.from_pretrained(tmp_path, num_classes=20, **ignoring).label_embed.num_embeddings == 21
    with pytest.raises(ValueError, match="norm_out"):
        D2iTGrainModel.from_pretrained(tmp_path, num_grains=3, **ignoring)


def test_shards_dtype_and_loading_information_are_to_be_had(make_vae, tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded, info = DynamicAutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert same_weights(loaded, vae) and len(files_of(tmp_path)) > 4
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same_weights(DynamicAutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), vae.bfloat16())


@pytest.mark.parametrize("cls", CLASSES)
def test_every_key_of_a_configuration_has_a_range_and_every_default_is_in_it(cls):
    hints = get_type_hints(cls.__init__)
    assert hints.keys() == inspect.signature(cls).parameters.keys()
    numbers = {key for key, hint in hints.items() if "int" in str(hint) or "float" in str(hint)}
    assert numbers <= configs.LIMITS.keys()
    with torch.device("meta"):
        assert cls().num_parameters() > 0


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (DynamicAutoencoderKL, {"downsample_factors": [4, 8, 16], "decoder_block_out_channels": [128, 128, 256]}),
        (DynamicAutoencoderKL, {"downsample_factors": (1, 2), "block_out_channels": (32, 32),
                                "decoder_block_out_channels": (32,), "shift_factor": 0}),
        (DynamicAutoencoderKL, {"latent_channels": 128, "in_channels": 1, "norm_num_groups": 1}),
        (D2iTGrainModel, {"num_grains": 8, "num_classes": 1, "mlp_ratio": 2}),
        (D2iTContentModel, {"num_grains": 5, "window_size": 16, "out_channels": 8, "num_classes": None}),
        (D2iTContentModel, load_preset("content-xl") | {"num_layers": 28, "frequency_shift": 1.0}),
    ],
)  # fmt: skip
def test_what_is_out_of_the_ordinary_is_still_in_range(cls, config):
    with torch.device("meta"):
        assert cls(**config).num_parameters() > 0


@pytest.mark.parametrize(
    ("cls", "name"),
    zip(CLASSES, ["dvae-f8f16", "grain-s", "content-xl", "dcdit-xl"]),
)
def test_the_size_that_is_checked_is_about_that_of_the_model(monkeypatch, cls, name):
    with torch.device("meta"):
        size = cls(**load_preset(name)).num_parameters()
        monkeypatch.setattr(configs, "MAX_PARAMETERS", size * 1.25)
        cls(**load_preset(name))
        monkeypatch.setattr(configs, "MAX_PARAMETERS", size / 1.25)
        with pytest.raises(ValueError, match="parameters"):
            cls(**load_preset(name))


def test_arguments_replace_keys_of_the_file_and_are_checked_like_them(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path)
    vae = DynamicAutoencoderKL.from_pretrained(tmp_path, scaling_factor=0.5, calibration=None)
    assert vae.config.scaling_factor == 0.5 and vae.config.calibration is None
    with pytest.raises(ValueError, match="config.json.*`scaling_factor`.*nan"):
        DynamicAutoencoderKL.from_pretrained(tmp_path, scaling_factor=float("nan"))


def test_a_part_of_a_pipeline_loads_alone_and_is_checked_against_the_manifest_of_the_pipeline(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    for load in (
        lambda: D2iTGrainModel.from_pretrained(tmp_path / "pipeline", subfolder="grain_model"),
        lambda: D2iTGrainModel.from_pretrained(str(tmp_path / "pipeline" / "grain_model")),
        lambda: AutoModel.from_pretrained(str(tmp_path / "pipeline"), subfolder="grain_model"),
    ):
        assert same_weights(load(), pipe.grain_model)
    file = tmp_path / "pipeline" / "grain_model" / WEIGHTS
    flip_bit(file, -1)
    with pytest.raises(ValueError, match=str(file)):
        D2iTGrainModel.from_pretrained(tmp_path / "pipeline", subfolder="grain_model")


def test_a_manifest_of_somebody_else_around_a_model_is_not_ours(make_grain_model, tmp_path):
    make_grain_model().save_pretrained(tmp_path / "model")
    for text in ('{"name": "a web application", "icons": []}', "not JSON", "[]", '{"files": ["model/a"]}'):
        (tmp_path / "manifest.json").write_text(text)
        assert D2iTGrainModel.from_pretrained(tmp_path / "model")


def test_the_average_of_diffusers_can_be_saved_and_loaded(make_grain_model, tmp_path):
    model = make_grain_model()
    average = EMAModel(model.parameters(), decay=0.5, model_cls=D2iTGrainModel, model_config=model.config)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, D2iTGrainModel)
    assert loaded.decay == 0.5 and loaded.optimization_step == 1
    assert all(map(torch.equal, loaded.shadow_params, average.shadow_params))


# ---- Saving ----


def test_variants_lie_beside_one_another(make_grain_model, tmp_path):
    full, half = make_grain_model(), make_grain_model(seed=5).half()
    full.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path, variant="fp16")
    verify(tmp_path)
    assert same_weights(D2iTGrainModel.from_pretrained(tmp_path), full)
    assert same_weights(D2iTGrainModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16), half)
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert same_weights(D2iTGrainModel.from_pretrained(tmp_path), full)  # what is not read may be gone
    with pytest.raises(ValueError, match="fp16.safetensors"):
        D2iTGrainModel.from_pretrained(tmp_path, variant="fp16")


def test_any_folder_will_do(make_pipeline, tmp_path, monkeypatch):
    pipe = make_pipeline()
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory() as temporary:
        for folder in (".", "new", "new/deep/er", temporary, tmp_path / "path"):
            pipe.save_pretrained(folder)
            verify(folder)
            assert same_weights(D2iTPipeline.from_pretrained(folder).transformer, pipe.transformer)
    assert not [name for _, folders, files in os.walk(tmp_path) for name in folders + files if name[0] == "."]


def test_what_is_refused_leaves_nothing_behind(make_grain_model, make_pipeline, tmp_path):
    (tmp_path / "file").touch()
    for saved in (make_grain_model(), make_pipeline()):
        for options in ({"safe_serialization": False}, {"use_flashpack": True}):
            with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
                saved.save_pretrained(tmp_path / "new", **options)
        with pytest.raises(TypeError, match="max_shard_sizes"):
            saved.save_pretrained(tmp_path / "new", max_shard_sizes="5GB")
        with pytest.raises(ValueError, match=str(tmp_path / "file")):
            saved.save_pretrained(tmp_path / "file")
    make_grain_model().save_pretrained(tmp_path / "new", is_main_process=False)
    assert files_of(tmp_path) == ["file"]


def test_saved_files_do_not_say_where_on_this_machine_they_came_from(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "a")
    pipe = D2iTPipeline.from_pretrained(tmp_path / "a")
    pipe.save_pretrained(tmp_path / "b")
    for name in files_of(tmp_path / "b"):
        if name.endswith(".json"):
            assert str(tmp_path) not in (tmp_path / "b" / name).read_text(), name
            assert "_name_or_path" not in json.loads((tmp_path / "b" / name).read_text()), name
