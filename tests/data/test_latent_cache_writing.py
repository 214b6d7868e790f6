# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Writing a latent cache: whole whenever it is trusted, however often it is interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import PIL.ImageChops
import pytest
import torch
from accelerate import Accelerator
from image_files import encode, flip_bit, photo
from photo_caches import CODES, SHARD, contents, make_plan
from safetensors import safe_open
from script_runs import call, in_processes, together

from diffusers_d2it.data import latent_cache_writer
from diffusers_d2it.data.latent_cache import LatentCache
from diffusers_d2it.data.latent_cache_writer import EncodedRows, encode_images, write_latent_cache


def test_another_plan_or_another_folder_is_not_written_to(cache, make_vae, write_cache, tmp_path):
    before = contents(cache)
    with pytest.raises(ValueError, match="rows_per_shard 3, not 5"):
        write_cache(cache, make_vae(), rows_per_shard=5)
    with pytest.raises(ValueError, match='data_fingerprint .*, not "other"'):
        write_cache(cache, make_vae(), data_fingerprint="other")
    assert contents(cache) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="mine .*thesis.tex"):
        write_cache(tmp_path / "mine", make_vae())
    assert contents(tmp_path / "mine").keys() == {"thesis.tex"}


def test_a_second_run_in_the_same_folder_is_refused(make_vae, write_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache_writer, "_LOCK_SECONDS", 0)
    leftover = tmp_path / "cache" / ".staging-shard-00001-0" / ".tmpABC"
    leftover.parent.mkdir(parents=True)
    leftover.touch()

    def encode(shards: list[int]) -> list:
        assert shards == [0, 1, 2] and not leftover.exists()
        with pytest.raises(ValueError, match=str(tmp_path / "cache")):
            write_cache(tmp_path / "cache", make_vae())
        raise InterruptedError

    with pytest.raises(InterruptedError):
        write_latent_cache(tmp_path / "cache", make_plan(make_vae()), Accelerator(cpu=True), encode)
    write_cache(tmp_path / "cache", make_vae())


def test_a_damaged_shard_is_written_again_and_the_others_are_kept(cache, make_vae, write_cache):
    before, kept = contents(cache), (cache / "shard-00000" / "codes.safetensors").stat()
    flip_bit(cache / CODES, -5)
    os.truncate(cache / "shard-00002" / "manifest.json", 10)
    with pytest.warns(UserWarning) as warned:
        write_cache(cache, make_vae())
    assert all(any(name in str(one.message) for one in warned) for name in (SHARD, "shard-00002"))
    assert contents(cache) == before
    assert (cache / "shard-00000" / "codes.safetensors").stat() == kept


def test_a_cache_of_an_autoencoder_kl_is_continued_to_the_same_files(make_autoencoder_kl, write_cache, tmp_path):
    write_cache(tmp_path, make_autoencoder_kl())
    before = contents(tmp_path)
    (tmp_path / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "shard-00000")
    flip_bit(tmp_path / CODES, -5)
    with pytest.warns(UserWarning, match=SHARD):
        write_cache(tmp_path, make_autoencoder_kl())
    assert contents(tmp_path) == before
    with safe_open(tmp_path / CODES, "pt") as file:
        assert {*file.keys()} == {"moments.0", "class_labels", "rows"}
        assert file.get_slice("moments.0").get_shape() == [3, 2, 8, 8, 8]
    with pytest.raises(ValueError, match="autoencoder|vae_fingerprint"):
        write_cache(tmp_path, make_autoencoder_kl(seed=5))


def test_a_shard_must_be_what_the_plan_says(make_vae, tmp_path, photos):
    codes = encode_images(make_vae(), photos[:3, :, :32, :32], flips=True)
    codes |= {"class_labels": torch.zeros(3, dtype=torch.int64), "rows": torch.arange(3)}

    def write(shard: int, tensors: dict) -> None:
        encoded = [(shard, EncodedRows(tensors))]
        write_latent_cache(tmp_path, make_plan(make_vae()), Accelerator(cpu=True), lambda shards: encoded)

    with pytest.raises(ValueError, match="shard 0 .*float16.* got .*float32"):
        write(0, codes | {"moments.1": codes["moments.1"].float()})
    with pytest.raises(ValueError, match="shard 1 .* 3 to 5"):
        write(1, codes)
    with pytest.raises(ValueError, match=SHARD):  # is missing
        write(0, codes)


@pytest.fixture
def folder(tmp_path) -> Path:
    """48 photographs in two classes, one of them damaged."""
    for i in range(48):
        path = tmp_path / "photos" / ("sky" if i % 2 else "earth") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"<html>" if i == 30 else encode(PIL.ImageChops.offset(photo(i), i, 0)))
    return tmp_path / "photos"


def test_two_processes_that_were_killed_continue_to_the_cache_that_one_writes(make_vae, folder, tmp_path, capsys):
    make_vae().save_pretrained(tmp_path / "vae")
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    flags = ["--train_data_dir", folder, "--vae", tmp_path / "vae", "--resolution", 32]
    flags += ["--rows_per_shard", 2, "--encode_batch_size", 2, "--output_dir"]

    def write_until_killed() -> None:
        save_file, num_shards = latent_cache_writer.save_file, 3 + int(os.environ["RANK"])

        def killed_in_the_next_shard(*arguments, **metadata) -> None:
            nonlocal num_shards
            save_file(*arguments, **metadata)
            if num_shards == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            num_shards -= 1

        latent_cache_writer.save_file = killed_in_the_next_shard
        call("cache_latents.py", *flags, killed)

    call("cache_latents.py", *flags, whole)
    assert "24 shards" in capsys.readouterr().out
    assert in_processes(write_until_killed) == [None, None] and list(killed.glob(".staging-*"))
    with pytest.raises(ValueError, match="killed.* 7 .*24 "):
        LatentCache(killed, make_vae(), seed=0)
    kept = {path: path.stat() for path in killed.glob("shard-*/codes.safetensors")}

    said = together(partial(call, "cache_latents.py", *flags, killed))
    assert "24 shards" in said and "2 processes" in said
    assert len(kept) == 7 and {path: path.stat() for path in kept} == kept
    assert contents(killed) == contents(whole) and not list(killed.glob(".*"))
    lists = [json.loads(path.read_text())["bad_images"] for path in killed.glob("shard-*/bad_images.json")]
    (bad,) = (image for images in lists for image in images)
    assert bad["name"].endswith("earth/30.png") and bad["row"] == 15 and bad["reason"]
    data = LatentCache(killed, make_vae(), seed=0, resolution=32)
    assert len(data) == 47 and data.id2label == {0: "earth", 1: "sky"}
    assert data.description == "photos, 32x32"


# ---- Memory ----

READ_ALL = """
import re, sys
from pathlib import Path
import torch
from diffusers_d2it.data.latent_cache import LatentCache

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    cache = LatentCache(folder, None, seed=0)
    for _ in range(2):
        for start in range(0, len(cache), 20):
            cache.__getitems__(list(range(start, start + 20)))
    print(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_cache(make_vae, tmp_path):
    def write(folder: Path, num_rows: int) -> int:
        plan = make_plan(make_vae(), num_rows=num_rows, rows_per_shard=50, resolution=128)

        def encode(shards: list[int]) -> Iterator[tuple[int, EncodedRows]]:
            for shard in shards:
                tensors = {f"moments.{i}": torch.randn(50, 2, 8, 16 << i, 16 << i).half() for i in range(2)}
                rows = torch.tensor(plan.rows(shard))
                tensors |= {"entropy": torch.rand(50, 16, 16), "class_labels": rows % 2, "rows": rows}
                yield shard, EncodedRows(tensors)

        write_latent_cache(folder, plan, Accelerator(cpu=True), encode)
        return sum(path.stat().st_size for path in folder.glob("shard-*/*"))

    sizes = [write(tmp_path / name, num_rows) for name, num_rows in (("small", 100), ("large", 1000))]
    assert sizes[1] > 9 * sizes[0] > 36e6
    command = [sys.executable, "-c", READ_ALL, tmp_path / "small", tmp_path / "large"]
    # The C library returns what is freed at once, instead of keeping it as it sees fit
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    small, large = (1024 * int(line) for line in result.stdout.split())
    assert large - small < 1e6  # of 37 MB more that were read
