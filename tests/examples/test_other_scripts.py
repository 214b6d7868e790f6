# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The scripts of examples/ that do not train, and the recipes of those that do."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from script_runs import EXAMPLES, call, call_train, load_script, together

from diffusers_d2it import DynamicAutoencoderKL, load_preset
from diffusers_d2it.data import LatentCache
from diffusers_d2it.data.images import to_pixels
from diffusers_d2it.entropy import EntropyCalibration
from diffusers_d2it.pixels import to_uint8


def test_calibration_is_the_same_streamed_and_by_two_processes(folder, make_vae, tmp_path, capsys):
    expected = EntropyCalibration(region_size=8)
    for path in sorted(folder.rglob("*.png")):
        expected.update(to_pixels(PIL.Image.open(path), 32)[None])
    photos = shutil.copytree(folder, tmp_path / "photos")
    (photos / "cat" / "broken.jpg").write_bytes(b"<html>")
    source = ["--train_data_dir", photos, "--resolution", "32"]
    to_file = ["--region_size", "8", "--output"]
    call("calibrate_dvae.py", *source, "--streaming", *to_file, tmp_path / "one.json")
    assert "photos: a stream" in capsys.readouterr().out
    said = together(partial(call, "calibrate_dvae.py", *source, *to_file, tmp_path / "two.json"))
    assert "2 processes" in said and "photos: 9 images" in said
    assert "1 image could not be used" in said
    lists = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    assert lists == ["one.json.bad_images.jsonl", "two.json.bad_images.jsonl"]
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two == expected.to_config(source=one["source"])

    vae = tmp_path / "vae"
    make_vae(calibration=None).save_pretrained(vae)
    call("calibrate_dvae.py", *source, "--vae", vae, "--max_images", "5")
    assert DynamicAutoencoderKL.from_pretrained(vae).config.calibration["num_images"] == 5


def test_codes_of_an_autoencoder_kl_are_cached_and_models_of_grains_refuse_it(
    folder, make_autoencoder_kl, autoencoder_kl, tmp_path, capsys
):
    flags = ["--vae", autoencoder_kl, "--resolution", 32]
    call("cache_latents.py", *flags, "--train_data_dir", folder, "--output_dir", tmp_path / "cache")
    said = capsys.readouterr().out
    assert "8 images" in said and "train_dcdit.py" in said.split("next:")[1]
    cache = LatentCache(tmp_path / "cache", make_autoencoder_kl(), seed=0, resolution=32)
    assert len(cache) == 8 and [one.shape for one in cache[0]["moments"]] == [(8, 8, 8)]
    with pytest.raises(ValueError, match="`vae`.*DynamicAutoencoderKL.*'AutoencoderKL'"):
        of_cache = ["--latent_cache", tmp_path / "cache", "--preset", "grain-tiny"]
        call_train("train_grain.py", tmp_path / "grain", 1, *of_cache, *flags)


def test_demo_draws_the_bundled_checkpoint(tmp_path):
    call("demo.py", "--output", tmp_path / "demo.png", "--class_labels", "lion", "lemon", "--num_inference_steps", "3")
    assert PIL.Image.open(tmp_path / "demo.png").size[0] > 0


def test_photographs_at_several_budgets(tmp_path, load_photos):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, photo in zip(paths, load_photos(160)):
        PIL.Image.fromarray(to_uint8(photo).permute(1, 2, 0).numpy()).save(path)
    call("reconstruct.py", "--images", *paths, "--output", tmp_path / "budgets.png", "--fine_ratios", "0", "1")
    sheet = np.asarray(PIL.Image.open(tmp_path / "budgets.png"), dtype=float)
    assert sheet.shape[1] // 128 == 6 and sheet.shape[0] // 128 == 2
    photo, entropy, coarse, fine = (sheet[20:148, 132 * column : 132 * column + 128] for column in (0, 1, 3, 5))
    assert entropy.min() == 0 and entropy.max() == 255  # one shade a region, of 16x16 pixels
    assert (entropy == entropy[::16, ::16].repeat(16, 0).repeat(16, 1)).all()
    assert np.abs(fine - photo).mean() < np.abs(coarse - photo).mean() < 40


# ---- Recipes ----

RECIPES = sorted(path.relative_to(EXAMPLES.parent).as_posix() for path in (EXAMPLES / "configs").rglob("*.txt"))
SCRIPTS = {"dvae": ("train_dvae.py", 4), "grain": ("train_grain.py", 6), "content": ("train_d2it.py", 8)}
SCRIPTS |= {"decoder": SCRIPTS["dvae"], "dcdit": ("train_dcdit.py", 6)}
LAUNCHES = {
    "one-gpu.yaml": (DistributedType.NO, 1, 1),
    "eight-gpus.yaml": (DistributedType.MULTI_GPU, 1, 8),
    "eight-gpus-fsdp2.yaml": (DistributedType.FSDP, 1, 8),
    "two-nodes.yaml": (DistributedType.MULTI_GPU, 2, 16),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_of_a_recipe_are_known_and_its_model_exists(recipe, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    script, num_required = SCRIPTS[Path(recipe).stem.split("-")[0]]
    required = "--dataset_name user/photos --output_dir out --vae vae --grain grain".split()[:num_required]
    starts = Path(recipe).stem == "decoder" or ("from-dit" in recipe and script != "train_grain.py")
    required += ["--init_from", "start"] if starts else []
    args = load_script(script).parse_args([f"@{recipe}", *required])
    load_preset(args.preset)
    assert args.mixed_precision in ("bf16", "auto")


@pytest.mark.parametrize("dataset, num_images, model", [("imagenet", 1_281_167, "xl"), ("ffhq", 70_000, "l")])
def test_the_papers_recipes_are_its_eight_hundred_epochs(dataset, num_images, model, monkeypatch):
    # Sec. 4.1: batch 256 on eight GPUs, AdamW at 1e-4, average 0.9999, 800 epochs
    monkeypatch.chdir(EXAMPLES.parent)
    recipe = f"@examples/configs/{dataset}-256/content-{model}.txt"
    script = load_script("train_d2it.py")
    args = script.parse_args([recipe, *"--latent_cache cache --output_dir out --vae vae --grain grain".split()])
    assert 8 * args.train_batch_size * args.gradient_accumulation_steps == 256
    assert args.max_train_steps == num_images // 256 * 800
    assert (args.learning_rate, args.ema_decay, args.preset) == (1e-4, 0.9999, f"content-{model}")


@pytest.mark.parametrize("size, steps", [("s", 421_000), ("b", 408_000), ("l", 486_000), ("xl", 495_000)])
def test_recipes_of_dcdit_are_those_of_its_paper(size, steps, monkeypatch):
    # Table 6: batch 256, groups of 16 images, one cell in four, budgets after 5,000 updates, of shares 0, 0.1 ... 0.6
    monkeypatch.chdir(EXAMPLES.parent)
    recipe = f"@examples/configs/imagenet-256/dcdit-{size}.txt"
    args = load_script("train_dcdit.py").parse_args([recipe, *"--latent_cache c --output_dir o --vae v".split()])
    assert 8 * args.train_batch_size * args.gradient_accumulation_steps == 256 and args.ratio_group_size == 16
    assert (args.compression, args.ratio_weight, args.budget_warmup_steps) == (4, 0.03, 5000)
    assert args.budgets == pytest.approx([1 - dropped / 10 for dropped in range(6, -1, -1)])
    assert (args.learning_rate, args.weight_decay, args.ema_decay, args.max_grad_norm) == (1e-4, 0, 0.9999, 1)
    assert (args.label_dropout, args.learn_sigma, args.objective) == (0.1, True, "epsilon")
    assert (args.max_train_steps, args.preset) == (steps, f"dcdit-{size}")


@pytest.mark.parametrize("name", sorted(path.name for path in (EXAMPLES / "configs" / "accelerate").iterdir()))
def test_configurations_of_accelerate_are_read_by_it(name):
    config = load_config_from_file(str(EXAMPLES / "configs" / "accelerate" / name))  # raises for keys it does not know
    assert (config.distributed_type, config.num_machines, config.num_processes) == LAUNCHES[name]
    assert config.mixed_precision == "bf16" and not config.use_cpu
    assert config.fsdp_config.get("fsdp_version") == (2 if config.distributed_type == DistributedType.FSDP else None)
