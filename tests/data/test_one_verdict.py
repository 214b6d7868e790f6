# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What one stage accepts all of them accept, and a failed try leaves nothing that blocks the next one."""

import pytest
from accelerate import Accelerator
from image_files import encode, photo, write_folder
from photo_caches import make_plan
from script_runs import load_script

from diffusers_d2it.data import EncodedRows, load_images, write_latent_cache
from diffusers_d2it.evaluation import open_images


STAGES = {
    "train_dvae.py": ["--output_dir", "runs", "--max_train_steps", "1"],
    "cache_latents.py": ["--vae", "vae", "--output_dir", "cache"],
    "train_grain.py": ["--vae", "vae", "--output_dir", "runs", "--max_train_steps", "1"],
    "train_dcdit.py": ["--vae", "vae", "--output_dir", "runs", "--max_train_steps", "1"],
    "train_d2it.py": ["--vae", "vae", "--grain", "grain", "--output_dir", "runs", "--max_train_steps", "1"],
}


OF_IMAGES = ["", "--unconditional", "--label_column class_folder", "--split val", "--num_classes 3"]


@pytest.mark.parametrize("flags", OF_IMAGES)
def test_all_stages_ask_for_the_same_images(tmp_path, flags):
    image_arguments = load_script("flags.py").image_arguments
    flags = ["--train_data_dir", str(tmp_path), *flags.split()]
    first, *others = (image_arguments(load_script(name).parse_args([*own, *flags])) for name, own in STAGES.items())
    assert first["path"] == str(tmp_path) and [other for other in others if other != first] == []


@pytest.mark.parametrize(
    "names",
    [
        ["0.png", "1.png"],
        ["a/0.png", "b/1.png"],
        ["2019/a/0.png", "2020/b/1.png"],
        ["a/0.png", "1.png"],
        ["train/a/0.png", "val/a/1.png"],
        ["train/0.png", "val/1.png"],
        ["00000/00000.png", "01000/01000.png"],
        ["images/0.png", "images/1.png"],
    ],
    ids=" ".join,
)
def test_what_training_takes_can_be_measured_and_calibrated(tmp_path, names):
    folder = write_folder(tmp_path / "photos", {name: encode(photo(i, 32)) for i, name in enumerate(names)})
    assert len(open_images(folder, 32)) == load_images(folder, labelled=False).num_rows


# ---- After a failed try ----


@pytest.mark.parametrize("fault", ["stopped", "nothing usable"])
def test_a_cache_begins_where_one_came_to_nothing(tmp_path, make_vae, write_cache, fault):
    def encode_none(shards: list[int]):
        if fault == "stopped":
            raise InterruptedError
        for shard in shards:
            bad = [{"row": row, "name": f"{row}.png", "reason": "damaged"} for row in plan.rows(shard)]
            yield shard, EncodedRows(bad_images=bad)

    plan = make_plan(make_vae(), data_fingerprint="others")
    with pytest.raises(InterruptedError if fault == "stopped" else ValueError):
        write_latent_cache(tmp_path / "cache", plan, Accelerator(cpu=True), encode_none)
    write_cache(tmp_path / "cache", make_vae())
