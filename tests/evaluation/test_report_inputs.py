# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What reports start from: real images with the classes of the checkpoint, and flags that cannot be used."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from image_files import encode, photo, write_folder
from metric_inputs import small_network
from photographs import load_photographs
from script_runs import load_script

from diffusers_d2it import D2iTPipeline
from diffusers_d2it.data.bad_images import BadImages
from diffusers_d2it.evaluation.features import ModuleFeatures
from diffusers_d2it.evaluation.map_sources import Sampling
from diffusers_d2it.evaluation.report_inputs import (
    LabelledImages,
    check_report_arguments,
    finite,
    load_checkpoint,
    load_labelled_images,
    load_report_features,
    sampling_of,
    score_real_images,
)
from diffusers_d2it.pixels import to_uint8


NAMES = {2: "tabby cat, cat", 5: "rocket", 7: "coffee"}


def parse(*flags) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    load_script("flags.py").add_report_arguments(parser)
    data = [] if "--train_data_dir" in flags else ["--dataset_name", "user/photos"]
    return parser.parse_args([*data, *map(str, flags)])


@pytest.fixture(autouse=True)
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def load(root: Path, pipe: D2iTPipeline, *flags) -> LabelledImages:
    args = parse("--train_data_dir", root, "--num_images", 3, "--num_reference_images", 2, *flags)
    return load_labelled_images(args, pipe, BadImages(root.parent / "bad.jsonl"), Accelerator(cpu=True))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photographs 0 to 5, two of each class, in sub-folders; labels are 0 coffee, 1 rocket, 2 cat."""
    files = {f"{name}/{i}.png": encode(photo(i, 32)) for i, name in enumerate(["coffee", "rocket", "tabby cat"] * 2)}
    return write_folder(tmp_path / "photos", files)


@pytest.fixture
def pipe(make_pipeline) -> D2iTPipeline:
    return make_pipeline(id2label=NAMES)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def test_images_and_labels_belong_together_and_the_reference_is_of_others(folder, pipe):
    photos = to_uint8(load_photographs(32))[:6]
    data = load(folder, pipe)
    [_, reference] = next(data.reference.batches(10))
    drawn = torch.cat([data.images, reference])
    numbers = [[torch.equal(one, image) for image in photos].index(True) for one in drawn]
    assert len(set(numbers)) == 5
    assert data.labels.tolist() == [{0: 7, 1: 5, 2: 2}[number % 3] for number in numbers[:3]]
    assert data.description == "photos, split train, 32x32"


def test_the_seed_decides_which_images(folder, pipe):
    one, same, other = (load(folder, pipe, "--seed", seed) for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images) and not torch.equal(one.images, other.images)


def test_streams(folder, pipe):
    data = load(folder, pipe, "--streaming")
    assert len(data.images) == 3 and set(data.labels.tolist()) <= set(NAMES)


def test_other_sizes_and_what_cannot_be_used(folder, pipe, accelerator):
    assert load(folder, pipe, "--resolution", 64, "--num_images", 1).images.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="`resolution`.* 8.* 30"):
        load(folder, pipe, "--resolution", 30)
    (folder / "rocket" / "broken.png").write_bytes(b"<html>")
    bad = BadImages(folder.parent / "bad.jsonl")
    args = parse("--train_data_dir", folder, "--num_images", 3, "--num_reference_images", 3)
    assert len(load_labelled_images(args, pipe, bad, accelerator).images) == 3
    args.num_images = 4
    with pytest.raises(ValueError, match="has 6 images .* --num_images 4 and --num_reference_images 3 need 7.*broken"):
        load_labelled_images(args, pipe, bad, accelerator)


def test_unconditional_checkpoints_need_no_classes(folder, make_pipeline):
    assert load(folder, make_pipeline(num_classes=None)).labels is None


# ---------------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------------


def test_classes_are_found_by_any_of_their_names(tmp_path, pipe):
    names = ["cat", "a cup, coffee", "rocket"] * 2
    files = {f"{name}/{i}.png": encode(photo(i, 32)) for i, name in enumerate(names)}
    assert set(load(write_folder(tmp_path / "photos", files), pipe, "--num_images", 4).labels.tolist()) <= set(NAMES)


def write_numbers(root: Path, labels: list[int]) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [photo(i, 32) for i in range(len(labels))], "label": labels}
    root.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "train.parquet")
    return root


def test_labels_that_are_numbers_are_those_of_the_checkpoint(tmp_path, pipe, make_pipeline):
    root = write_numbers(tmp_path / "numbers", [7, 5, 7, 5, 7, 5])
    assert set(load(root, pipe).labels.tolist()) <= {5, 7}
    assert set(load(root, make_pipeline(id2label=None)).labels.tolist()) <= {5, 7}
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"5": "coffee", "7": "rocket"}))  # names count more than numbers
    assert load(root, pipe, "--id2label", names, "--num_images", 3).labels.tolist() != load(root, pipe).labels.tolist()


def test_classes_that_the_checkpoint_does_not_have(tmp_path, folder, pipe, make_pipeline):
    with pytest.raises(ValueError, match="--checkpoint does not have: '3'. It has 'tabby cat, cat', 'rocket', 'cof"):
        load(write_numbers(tmp_path / "numbers", [3, 5, 7, 5, 7]), pipe)
    with pytest.raises(ValueError, match="does not have: 'tabby cat'"):
        load(folder, make_pipeline(id2label={0: "coffee", 1: "rocket", 2: "lion"}))
    with pytest.raises(ValueError, match="does not have: '12'. It has '0', '1'"):
        load(write_numbers(tmp_path / "more", [3, 12, 3, 3, 3]), make_pipeline(id2label=None))


def test_a_data_set_without_classes(tmp_path, pipe):
    flat = write_folder(tmp_path / "flat", {f"{i}.png": encode(photo(i, 32)) for i in range(6)})
    with pytest.raises(ValueError, match="flat has no classes, and the checkpoint draws images of 10: name"):
        load(flat, pipe)


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def test_flags_of_sampling():
    args = parse("--num_inference_steps", 7, "--guidance_scale", 1.5, "--batch_size", 2, "--seed", 3)
    assert sampling_of(args) == Sampling(7, 1.5, 10, 2, 3)
    check_report_arguments(args)


@pytest.mark.parametrize(
    "flag, value, least",
    [
        ("num_images", 0, 1),
        ("num_reference_images", 1, 2),
        ("num_inference_steps", 0, 1),
        ("grain_num_inference_steps", 0, 1),
        ("batch_size", 0, 1),
        ("seed", -1, 0),
    ],
)
def test_numbers_that_are_too_small(flag, value, least):
    with pytest.raises(ValueError, match=f"--{flag} must be at least {least}, got {value}"):
        check_report_arguments(parse(f"--{flag}", value))


def test_checkpoints_that_cannot_be_reported_on(tmp_path, make_pipeline, accelerator):
    with pytest.raises(ValueError, match=f"--checkpoint {tmp_path} cannot be loaded: .*model_index.json"):
        load_checkpoint(parse("--checkpoint", tmp_path), accelerator)
    make_pipeline(grain_model=None, grain_scheduler=None).save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="--checkpoint .*without has no grain model, which predicts maps"):
        load_checkpoint(parse("--checkpoint", tmp_path / "without"), accelerator)


def test_protocol_of_the_bundled_checkpoint(accelerator):
    pipe, protocol = load_checkpoint(parse("--dtype", "bfloat16", "--scheduler", "unipc"), accelerator)
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler" == protocol["scheduler"]["class"]
    assert pipe.transformer.dtype == torch.bfloat16 == getattr(torch, protocol["dtype"])
    assert set(protocol["checkpoint"]["weights_sha256"]) == {"vae", "grain_model", "transformer"}
    json.dumps(protocol)


def test_features_and_metrics_that_do_not_suit(folder, pipe, accelerator):
    with pytest.raises(ValueError, match="--features metric_inputs:absent: .*cannot be imported"):
        load_report_features(parse("--features", "metric_inputs:absent"), accelerator)
    data, features = load(folder, pipe), ModuleFeatures(small_network(), "conv")
    for metric, message in (("is", "at least 10 images"), ("recall", "at least 4 images")):
        args = parse("--metrics", metric)
        with pytest.raises(ValueError, match=f"one of --metrics, --features, --num_images, .*{message}"):
            score_real_images(args, data, features, sampling_of(args))


def test_numbers_that_json_does_not_have():
    value = {"a": [1.5, math.nan, (math.inf, 2)], "b": {"c": -math.inf, "d": "NaN", "e": None, "f": True}}
    assert finite(value) == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": "NaN", "e": None, "f": True}}
