# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What one stage accepts all of them accept, and a failed try leaves nothing that blocks the next one."""

import datasets
import pytest
from accelerate import Accelerator
from image_files import encode, photo, truncated_jpeg, write_folder
from photo_caches import make_plan
from script_runs import load_script

from diffusers_d2it.data import EncodedRows, load_images, write_latent_cache
from diffusers_d2it.evaluation import open_images
from diffusers_d2it.training import make_accelerator


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


STAGES = {
    "train_dvae.py": ["--output_dir", "runs", "--max_train_steps", "1"],
    "cache_latents.py": ["--vae", "vae", "--output_dir", "cache"],
    "train_grain.py": ["--vae", "vae", "--output_dir", "runs", "--max_train_steps", "1"],
    "train_dcdit.py": ["--vae", "vae", "--output_dir", "runs", "--max_train_steps", "1"],
    "train_d2it.py": ["--vae", "vae", "--grain", "grain", "--output_dir", "runs", "--max_train_steps", "1"],
}


def verdict(script: str, *flags: str) -> dict | str | None:
    """What a stage finds in its data: classes, None without them, or its error."""
    stage = load_script(script)
    flags = stage.parse_args([*STAGES[script], *flags])
    try:
        return load_images(**load_script("flags.py").image_arguments(flags)).id2label
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("flags", [[], ["--unconditional"], ["--label_column", "class_folder"]], ids=" ".join)
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
def test_all_stages_find_the_same(tmp_path, names, flags):
    folder = write_folder(tmp_path / "photos", {name: encode(photo(i, 32)) for i, name in enumerate(names)})
    first, *others = (verdict(script, "--train_data_dir", str(folder), *flags) for script in STAGES)
    assert [other for other in others if other != first] == []
    if not isinstance(first, str):  # what training takes can be measured and calibrated
        assert len(open_images(folder, 32)) == load_images(folder, labelled=False).num_rows


def test_what_training_leaves_out_is_left_out_of_measures(tmp_path):
    bad = {f"{i}.png": data for i, data in enumerate([b"", b"<html>", truncated_jpeg(), encode(photo(0, 8))])}
    folder = write_folder(tmp_path / "photos", bad | {"good.png": encode(photo(1, 32))})
    images = open_images(folder, 32)
    assert sum(len(batch) for _, batch in images.batches(2)) == 1 and len(images.left_out) == 4


# ---- After a failed try ----


def test_a_run_begins_where_one_came_to_nothing(tmp_path):
    write_folder(tmp_path, {"bad_images.jsonl": b'{"name": "a.png", "reason": "x"}\n', "logs/events": b""})
    make_accelerator(tmp_path).output_lock.close()
    assert not (tmp_path / "bad_images.jsonl").exists()  # of other images, perhaps
    write_folder(tmp_path, {"bad_images.jsonl": b"{}\n", "notes.txt": b""})
    with pytest.raises(ValueError, match="`output_dir`.*notes.txt"):
        make_accelerator(tmp_path)
    assert (tmp_path / "bad_images.jsonl").exists()


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
