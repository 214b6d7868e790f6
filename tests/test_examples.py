# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The scripts of examples/ as a user runs them: real processes, real photographs, tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from diffusers_d2it import D2iTGrainModel, D2iTPipeline, DynamicAutoencoderKL, load_preset
from diffusers_d2it.calibration import EntropyCalibration
from diffusers_d2it.training import to_pixels


STEPS = 5  # eight photographs in batches of two: the fifth step is in the second epoch
EXAMPLES = Path(__file__).parent.parent / "examples"
COMMON = ["--resolution", "32", "--train_batch_size", "2", "--seed", "7", "--report_to", "none"]


def run(script: str, *arguments: str, launch: list[str] | None = None, expect_failure: bool = False, **environment):
    command = [*(launch or [sys.executable]), str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert (result.returncode != 0) == expect_failure, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photographs in class sub-folders: two classes of four."""
    from conftest import _load_photos

    root = tmp_path_factory.mktemp("photos")
    for i, photo in enumerate(_load_photos(64)):
        path = root / ("sky" if i % 2 else "earth") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(((photo.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)).save(path)
    return root


def train(script: str, folder: Path, output: Path, steps: int, *arguments: str, **kwargs):
    return run(
        script,
        "--train_data_dir",
        folder,
        "--output_dir",
        output,
        "--max_train_steps",
        steps,
        "--checkpointing_steps",
        2,
        "--validation_steps",
        STEPS,
        *COMMON,
        *arguments,
        **kwargs,
    )


@pytest.fixture(scope="module")
def dvae(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "dvae"
    train("train_dvae.py", folder, output, STEPS, "--preset", "dvae-tiny")
    return output


@pytest.fixture(scope="module")
def grain_arguments(dvae) -> list:
    arguments = ["--preset", "grain-tiny", "--vae", dvae / "vae", "--label_column", "label"]
    return [*arguments, "--gradient_accumulation_steps", "3", "--gradient_checkpointing"]


@pytest.fixture(scope="module")
def grain(folder, grain_arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "grain"
    train("train_grain.py", folder, output, STEPS, *grain_arguments)
    return output


@pytest.fixture(scope="module")
def d2it_arguments(dvae, grain) -> list:
    return ["--preset", "content-tiny", "--vae", dvae / "vae", "--grain", grain, "--label_column", "label"]


@pytest.fixture(scope="module")
def d2it(folder, d2it_arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "d2it"
    train("train_d2it.py", folder, output, STEPS, *d2it_arguments)
    return output


def assert_same_run(a: Path, b: Path) -> None:
    for model in ("model", "model_ema"):
        left, right = (
            load_file(run / f"checkpoint-{STEPS}" / model / "diffusion_pytorch_model.safetensors") for run in (a, b)
        )
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_autoencoder_run_leaves_a_calibrated_model_and_pictures(dvae):
    vae = DynamicAutoencoderKL.from_pretrained(dvae / "vae")
    assert vae.config.calibration["num_images"] == 8
    assert vae.config.scaling_factor != 1.0 and vae.config.shift_factor is not None
    assert PIL.Image.open(dvae / "samples" / f"step-{STEPS:07d}.png").size == (8 * 32, 3 * 32)
    assert sorted(path.name for path in dvae.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert not list(dvae.glob(".*"))  # nothing written aside is left


def test_latents_have_unit_scale_after_training(dvae, folder):
    vae = DynamicAutoencoderKL.from_pretrained(dvae / "vae")
    images = [PIL.Image.open(path) for path in sorted(folder.rglob("*.png"))]
    with torch.no_grad():
        posterior = vae.encode(torch.stack([to_pixels(image, 32) for image in images])).latent_dist
        latents = vae.scale_latents(posterior.sample(torch.Generator().manual_seed(0)))
    assert latents.std().item() == pytest.approx(1, abs=0.15)
    torch.testing.assert_close(vae.unscale_latents(vae.scale_latents(latents)), latents, atol=1e-5, rtol=1e-5)


def test_interrupted_autoencoder_run_ends_in_the_same_weights(dvae, folder, tmp_path):
    train("train_dvae.py", folder, tmp_path, 2, "--preset", "dvae-tiny")
    train("train_dvae.py", folder, tmp_path, STEPS, "--preset", "dvae-tiny", "--resume_from_checkpoint", "latest")
    assert_same_run(dvae, tmp_path)


def test_interrupted_grain_run_with_accumulation_ends_in_the_same_weights(grain, grain_arguments, folder, tmp_path):
    # Three batches an update do not divide the four of an epoch: updates cross its end
    train("train_grain.py", folder, tmp_path, 2, *grain_arguments)
    train("train_grain.py", folder, tmp_path, STEPS, *grain_arguments, "--resume_from_checkpoint", "latest")
    assert_same_run(grain, tmp_path)


def test_interrupted_content_run_ends_in_the_same_weights(d2it, d2it_arguments, folder, tmp_path):
    train("train_d2it.py", folder, tmp_path, 3, *d2it_arguments, "--dataloader_num_workers", "1")
    resume = ["--resume_from_checkpoint", tmp_path / "checkpoint-2"]
    train("train_d2it.py", folder, tmp_path, STEPS, *d2it_arguments, *resume)
    assert_same_run(d2it, tmp_path)


def test_output_loads_in_the_pipeline(d2it, grain):
    pipe = D2iTPipeline.from_pretrained(d2it / "pipeline")
    assert pipe.id2label == {0: "earth", 1: "sky"}
    output = pipe("sky", num_inference_steps=2)
    assert output.images[0].size == (32, 32)
    trained = D2iTGrainModel.from_pretrained(grain, subfolder="grain_model")
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), pipe.grain_model.parameters()))
    assert PIL.Image.open(d2it / "samples" / f"step-{STEPS:07d}.png").size == (2 * 32, 2 * 32)


def test_a_finished_folder_is_not_overwritten(dvae, folder):
    result = train("train_dvae.py", folder, dvae, STEPS, "--preset", "dvae-tiny", expect_failure=True)
    assert "already holds checkpoint-5" in result.stderr


def test_checkpoint_of_another_model_is_refused(dvae, folder, tmp_path):
    config = tmp_path / "other.json"
    preset = json.loads((dvae / "vae" / "config.json").read_text())
    keys = ("downsample_factors", "decoder_block_out_channels", "layers_per_block", "norm_num_groups")
    other = {key: preset[key] for key in keys} | {"block_out_channels": [8, 8, 16, 32], "latent_channels": 4}
    config.write_text(json.dumps(other))
    arguments = ["--preset", config, "--resume_from_checkpoint", "latest"]
    result = train("train_dvae.py", folder, dvae, 6, *arguments, expect_failure=True)
    assert "another model" in result.stderr and "block_out_channels" in result.stderr


def test_unconditional_training_with_three_grains_on_a_plain_folder(folder, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in folder.rglob("*.png"):
        (plain / path.name).write_bytes(path.read_bytes())
    three_grains = {"downsample_factors": [4, 8, 16], "block_out_channels": [8, 8, 16, 16, 16]}
    config = tmp_path / "three-grains.json"
    config.write_text(json.dumps(load_preset("dvae-tiny") | three_grains | {"grain_ratios": [0.3, 0.3, 0.4]}))
    train("train_dvae.py", plain, tmp_path / "dvae", 1, "--preset", config)
    vae = ["--vae", tmp_path / "dvae" / "vae"]
    train("train_grain.py", plain, tmp_path / "grain", 1, "--preset", "grain-tiny", *vae)
    arguments = [*vae, "--grain", tmp_path / "grain", "--preset", "content-tiny", "--mixed_precision", "bf16"]
    train("train_d2it.py", plain, tmp_path / "d2it", 1, *arguments)
    pipe = D2iTPipeline.from_pretrained(tmp_path / "d2it" / "pipeline")
    assert pipe.transformer.config.num_classes is None and pipe.transformer.config.num_grains == 3
    assert len(pipe(num_inference_steps=2).images) == 1


def test_calibration_is_the_same_streamed_and_by_two_processes(folder, dvae, tmp_path):
    expected = EntropyCalibration(region_size=8)
    for path in sorted(folder.rglob("*.png")):
        expected.update(to_pixels(PIL.Image.open(path), 32)[None])
    source = ["--train_data_dir", folder, "--resolution", "32"]
    to_file = ["--region_size", "8", "--output"]
    run("calibrate_dvae.py", *source, "--streaming", *to_file, tmp_path / "one.json")
    # Without a GPU, accelerate runs two processes only under the flag --multi_gpu
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--mixed_precision", "no", "--main_process_port", "0"]
    two = ["calibrate_dvae.py", *source, *to_file, tmp_path / "two.json"]
    result = run(*two, launch=launch, ACCELERATE_USE_CPU="true")
    assert "2 processes" in result.stdout
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two == expected.to_config(source=one["source"])

    vae = tmp_path / "vae"
    DynamicAutoencoderKL.from_pretrained(dvae / "vae", calibration=None).save_pretrained(vae)
    run("calibrate_dvae.py", *source, "--vae", vae, "--max_images", "5")
    assert DynamicAutoencoderKL.from_pretrained(vae).config.calibration["num_images"] == 5


def test_demo_draws_the_bundled_checkpoint(tmp_path):
    run("demo.py", "--output", tmp_path / "demo.png", "--class_labels", "lion", "lemon", "--num_inference_steps", "3")
    assert PIL.Image.open(tmp_path / "demo.png").size[0] > 0
