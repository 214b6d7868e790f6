# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The latent cache: equal to encoding on the fly, refused when it does not fit, and whole whenever it is trusted."""

import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from script_runs import EXAMPLES, TWO_PROCESSES
from torch.utils.data import DataLoader, default_collate

from diffusers_d2it.data import latent_cache_writer
from diffusers_d2it.data.images import to_pixels
from diffusers_d2it.data.latent_cache import LatentCache, read_codes, read_entropy
from diffusers_d2it.data.latent_cache_files import LatentCachePlan, describe_vae
from diffusers_d2it.data.latent_cache_writer import EncodedRows, LatentCacheWriter, encode_images, encode_shards
from diffusers_d2it.data.loaders import batches_from, make_loader
from diffusers_d2it.grains import grain_map_from_entropy


def to_png(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(((pixels.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def from_png(data: bytes) -> torch.Tensor:
    return to_pixels(PIL.Image.open(io.BytesIO(data)), 32)


class Photographs:
    """An ImageSource in memory: image i is named i.png and has label i % 2."""

    def __init__(self, files: list[bytes]):
        self.files = files
        self.num_rows = len(files)

    def rows(self, start: int, stop: int):
        for row in range(start, stop):
            yield f"{row}.png", {"bytes": self.files[row], "path": f"{row}.png"}, row % 2


@pytest.fixture
def make_plan():
    """make_plan(vae, num_rows=8, rows_per_shard=3, flips=True, **overrides)."""

    def make(vae, num_rows=8, rows_per_shard=3, flips=True, **overrides) -> LatentCachePlan:
        fields = {
            "resolution": vae.config.sample_size,
            "flips": flips,
            "source": "eight photographs",
            "data_fingerprint": "photographs of scikit-image",
            "num_rows": num_rows,
            "rows_per_shard": rows_per_shard,
            "num_classes": 2,
            "id2label": {0: "earth", 1: "sky"},
        }
        return LatentCachePlan(**(describe_vae(vae) | fields | overrides))

    return make


@pytest.fixture
def write_cache(load_photos, make_plan):
    """write_cache(folder, vae, files=None, **plan): write a cache of eight photographs and return its index."""

    def write(folder: Path, vae, files: list[bytes] | None = None, **plan) -> dict:
        files = files or [to_png(photo) for photo in load_photos(vae.config.sample_size)]
        plan = make_plan(vae, num_rows=len(files), **plan)
        writer = LatentCacheWriter(folder, plan, Accelerator(cpu=True))
        for shard, contents in encode_shards(vae, Photographs(files), plan, writer.start(), batch_size=2):
            writer.write_shard(shard, contents)
        return writer.finish()

    return write


@pytest.fixture
def cache(make_vae, write_cache, tmp_path) -> Path:
    """A cache of eight photographs in three shards, two grains, 32 px."""
    write_cache(tmp_path / "cache", make_vae())
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# What is read is what would have been encoded
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_grains", [2, 3])
def test_codes_are_those_of_the_encoder_at_every_fine_ratio(num_grains, make_vae, load_photos, write_cache, tmp_path):
    vae = make_vae(num_grains)
    photos = (load_photos(vae.config.sample_size) + 1).mul(127.5).round() / 127.5 - 1  # as they are in the files
    write_cache(tmp_path, vae)
    cache = LatentCache(tmp_path, vae, seed=3, resolution=vae.config.sample_size)
    flipped_photos = 0
    for epoch in range(3):
        cache.set_epoch(epoch)
        flips = [random.Random(f"3/{epoch}/{i}").random() < 0.5 for i in range(8)]  # those of ImageDataset
        flipped_photos += sum(flips)
        pixels = torch.stack([photo.flip(-1) if flip else photo for photo, flip in zip(photos, flips)])
        batch = next(iter(DataLoader(cache, batch_size=8, collate_fn=cache.collate)))
        (moments, entropy), direct = read_codes(vae, batch), read_codes(vae, {"pixels": pixels})
        assert len(moments) == len(direct[0]) == num_grains
        for cached, encoded in zip(moments, direct[0]):
            torch.testing.assert_close(cached, encoded, rtol=2**-10, atol=2**-14)  # float16
        torch.testing.assert_close(entropy, direct[1], rtol=0, atol=1e-5)
        kept = torch.tensor(flips).logical_not()
        assert torch.equal(entropy[kept], vae.region_entropy(photos)[kept])
        assert torch.equal(read_entropy(vae, batch), entropy)
        assert torch.equal(batch["class_labels"], torch.arange(8) % 2)

        for fine_ratio in (0.0, 0.3, 0.5, 0.8, 1.0):
            expected = vae.encode(pixels, fine_ratio=fine_ratio)
            grain_map = grain_map_from_entropy(entropy, vae.thresholds(fine_ratio))
            assert torch.equal(grain_map, expected.grain_map)
            posterior = vae.posterior(moments, grain_map)
            torch.testing.assert_close(posterior.mean, expected.latent_dist.mean, rtol=2**-10, atol=2**-14)
            torch.testing.assert_close(posterior.std, expected.latent_dist.std, rtol=2**-8, atol=2**-14)
            samples = [p.sample(torch.Generator().manual_seed(0)) for p in (posterior, expected.latent_dist)]
            torch.testing.assert_close(*samples, rtol=2**-8, atol=2**-8)
    assert 0 < flipped_photos < 24


def test_flips_change_with_the_epoch_and_repeat_with_the_seed(cache, make_vae, write_cache, tmp_path):
    write_cache(tmp_path / "unflipped", make_vae(), flips=False)
    unflipped = LatentCache(tmp_path / "unflipped", None, seed=0)

    def flips(seed: int, epoch: int) -> list[bool]:
        data = LatentCache(cache, None, seed=seed)
        data.set_epoch(epoch)
        found = []
        for item, original in zip((data[i] for i in range(8)), (unflipped[i] for i in range(8))):
            found.append(not torch.equal(item["entropy"], original["entropy"]))
            same = [torch.equal(a, b) for a, b in zip(item["moments"], original["moments"])]
            assert same == [not found[-1]] * 2  # of an image all is mirrored or nothing
        return found

    drawn = [flips(0, epoch) for epoch in range(4)]
    assert len({tuple(one) for one in drawn}) > 1
    assert drawn == [flips(0, epoch) for epoch in range(4)] != [flips(1, epoch) for epoch in range(4)]


def test_a_cache_without_flips_holds_and_gives_the_images_alone(make_vae, write_cache, load_photos, tmp_path):
    vae = make_vae()
    both = write_cache(tmp_path / "both", vae)
    one = write_cache(tmp_path / "one", vae, flips=False)
    assert 0.5 < one["shards"][0]["bytes"] / both["shards"][0]["bytes"] < 0.7
    pixels = torch.stack([from_png(to_png(photo)) for photo in load_photos(32)])
    cache = LatentCache(tmp_path / "one", vae, seed=0)
    for epoch in range(2):
        cache.set_epoch(epoch)
        batch = next(iter(DataLoader(cache, batch_size=8, collate_fn=cache.collate)))
        assert torch.equal(batch["entropy"], vae.region_entropy(pixels))
        for cached, encoded in zip(batch["moments"], vae.encode_grains(pixels)):
            torch.testing.assert_close(cached, encoded, rtol=2**-10, atol=2**-14)


def test_a_cache_read_for_entropy_alone_leaves_the_moments(cache, make_vae):
    vae = make_vae()
    items = [LatentCache(cache, vae, seed=0, moments=moments)[5] for moments in (True, False)]
    assert items[0].keys() - items[1].keys() == {"moments"}
    assert torch.equal(items[0]["entropy"], items[1]["entropy"])


def test_a_batch_is_its_items_stacked(cache, make_vae):
    for moments in (True, False):
        data = LatentCache(cache, make_vae(), seed=0, moments=moments)
        (batch,) = DataLoader(data, batch_size=8, collate_fn=data.collate)
        items = default_collate([data[i] for i in range(8)])
        assert batch.keys() == items.keys() and ("moments" in batch) == moments
        assert torch.equal(batch["entropy"], items["entropy"])
        assert torch.equal(batch["class_labels"], items["class_labels"])
        assert all(torch.equal(a, b) for a, b in zip(batch.get("moments", []), items.get("moments", []), strict=True))


def test_workers_do_not_change_the_batches_of_training(cache, make_vae):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))

    def batches(num_workers: int, first_batch: int) -> list[dict]:
        args = Namespace(train_batch_size=3, dataloader_num_workers=num_workers)
        loader = make_loader(accelerator, LatentCache(cache, make_vae(), seed=0), args)
        torch.manual_seed(0)  # of which accelerate derives the order
        return list(islice(batches_from(accelerator, accelerator.prepare(loader), first_batch), 5 - first_batch))

    expected = batches(0, 0)  # two and a half epochs
    assert not torch.equal(expected[0]["entropy"], expected[2]["entropy"])
    for num_workers, first_batch in ((1, 0), (2, 0), (0, 3), (2, 3)):
        for a, b in zip(expected[first_batch:], batches(num_workers, first_batch), strict=True):
            assert torch.equal(a["entropy"], b["entropy"]) and torch.equal(a["class_labels"], b["class_labels"])
            assert all(torch.equal(x, y) for x, y in zip(a["moments"], b["moments"], strict=True))


def test_what_a_cache_says_of_itself(cache, make_vae, write_cache, tmp_path):
    data = LatentCache(cache, make_vae(), seed=0)
    assert (data.id2label, data.num_classes, data.description) == ({0: "earth", 1: "sky"}, 2, "eight photographs")
    copy = pickle.loads(pickle.dumps(data))  # as a worker process may get it
    assert copy.fingerprint == data.fingerprint and torch.equal(copy[7]["entropy"], data[7]["entropy"])
    assert len({path.stat().st_mode for path in cache.iterdir()}) == 1  # who may read one may read all
    write_cache(tmp_path / "again", make_vae())
    assert LatentCache(tmp_path / "again", make_vae(), seed=1).fingerprint == data.fingerprint
    write_cache(tmp_path / "other", make_vae(), flips=False)
    assert LatentCache(tmp_path / "other", make_vae(), seed=0).fingerprint != data.fingerprint
    for index in (-1, 8):
        with pytest.raises(IndexError, match=f"image {index} of a latent cache of 8"):
            data[index]


def test_an_unusable_image_is_left_out_and_named(make_vae, load_photos, write_cache, tmp_path):
    vae = make_vae()
    files = [to_png(photo) for photo in load_photos(32)]
    write_cache(tmp_path / "whole", vae, files)
    damaged = [files[0], b"<html>", files[2], files[3][:200], *files[4:6], b"", b"", b"", files[0]]  # none in shard 2
    index = write_cache(tmp_path / "damaged", vae, damaged)
    assert [(image["row"], image["name"]) for image in index["bad_images"]] == [
        (row, f"{row}.png") for row in (1, 3, 6, 7, 8)
    ]
    assert all(image["reason"] for image in index["bad_images"])
    whole, rest = (LatentCache(tmp_path / name, vae, seed=0) for name in ("whole", "damaged"))
    assert len(rest) == index["num_images"] == 5
    for epoch in range(4):
        whole.set_epoch(epoch)
        rest.set_epoch(epoch)
        for position, row in enumerate((0, 2, 4, 5)):  # flips follow the row, so they are the same too
            torch.testing.assert_close(rest[position]["moments"], whole[row]["moments"], rtol=1e-3, atol=1e-4)
            assert rest[position]["class_labels"] == row % 2
    with pytest.raises(ValueError, match=r"none of 2 images can be used, 0\.png: ."):
        write_cache(tmp_path / "nothing", vae, [b"", b"<html>"])


def test_values_beyond_float16_are_refused(make_vae, photos, write_cache, tmp_path):
    vae = make_vae()
    with torch.no_grad():
        vae.encoder.conv_outs["f8"].bias.fill_(7e4)
    with pytest.raises(ValueError, match=r"moments of grain 0 must be finite in float16.*got values up to 7e\+04"):
        encode_images(vae, photos, flips=False)
    with pytest.raises(ValueError, match="images of rows 0 to 1: moments of grain 0"):
        write_cache(tmp_path, vae)


def test_grains_are_encoded_only_from_whole_regions(make_vae):
    for shape in ((1, 3, 32, 36), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=rf"`x` must have shape \(B, 3, H, W\).*{re.escape(str(shape))}"):
            make_vae().encode_grains(torch.zeros(shape))
    with pytest.raises(ValueError, match="`grain_map` must hold grains 0"):
        make_vae().posterior(make_vae().encode_grains(torch.zeros(1, 3, 32, 32)), torch.full((1, 4, 4), 2))


# ---------------------------------------------------------------------------------------------------------------------
# A cache that does not fit
# ---------------------------------------------------------------------------------------------------------------------


def test_a_cache_of_another_autoencoder_scale_or_resolution_is_refused(cache, make_vae, calibrate):
    LatentCache(cache, make_vae(), seed=0, resolution=32)

    def refused(*fields: str, resolution: int = 32, vae=None, **overrides) -> str:
        with pytest.raises(ValueError) as error:
            LatentCache(cache, vae or make_vae(**overrides), seed=0, resolution=resolution)
        message = str(error.value)
        assert str(cache) in message
        named = set(re.findall(r"(\w+) is (?:\S+|\[.*?\]) in the cache", message))
        assert named == set(fields), message
        return message

    refused("vae_fingerprint", seed=1)
    assert "0.5 here" in refused("scaling_factor", scaling_factor=0.5)
    refused("shift_factor", "scaling_factor", shift_factor=0.1, scaling_factor=2.0)
    assert "32 in the cache, 64 here" in refused("resolution", resolution=64)
    refused("vae_fingerprint", norm_num_groups=2)
    refused("vae_fingerprint", calibration=calibrate(8) | {"sigma": 0.02})
    refused("vae_fingerprint", "downsample_factors", num_grains=3)
    changed = make_vae()
    with torch.no_grad():
        changed.encoder.conv_outs["f4"].bias[0] += 1e-6
    refused("vae_fingerprint", vae=changed)


def test_a_cache_outlives_a_tuned_decoder_and_a_new_calibration(cache, make_vae, calibrate):
    tuned = make_vae(calibration=calibrate(8) | {"num_images": 1}, grain_ratios=[0.2, 0.8])
    with torch.no_grad():
        tuned.decoder.conv_out.bias.add_(1)
    LatentCache(cache, tuned, seed=0, resolution=32)


def test_every_entry_of_the_configuration_has_a_part_in_encoding_or_none(make_vae):
    """An entry that is new here must be put in one of the lists; without that, it counts as decisive."""
    from diffusers_d2it.data.latent_cache_files import _CONFIG_OF_DECODING

    decisive = {
        "in_channels",
        "latent_channels",
        "downsample_factors",
        "block_out_channels",
        "layers_per_block",
        "norm_num_groups",
        "mid_block_add_attention",
    }
    public = {key for key in make_vae().config if not key.startswith("_")}
    assert public == decisive | _CONFIG_OF_DECODING and not decisive & _CONFIG_OF_DECODING


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


SHARD = "shard-00001.safetensors"
DAMAGE = {
    "flipped bit in a tensor": (lambda cache: flip_bit(cache / SHARD, -5), SHARD),
    "flipped bit in a header": (lambda cache: flip_bit(cache / SHARD, 40), SHARD),
    "truncated": (lambda cache: os.truncate(cache / SHARD, 3000), SHARD),
    "empty": (lambda cache: os.truncate(cache / SHARD, 0), SHARD),
    "missing": (lambda cache: (cache / SHARD).unlink(), SHARD),
    "HTML": (lambda cache: (cache / SHARD).write_text("<html>404</html>"), SHARD),
    "swapped": (lambda cache: swap(cache / SHARD, cache / "shard-00000.safetensors"), "shard-0000[01].safetensors"),
    "flipped bit in the index": (lambda cache: flip_bit(cache / "index.json", -30), "index.json"),
    "truncated index": (lambda cache: os.truncate(cache / "index.json", 100), "index.json"),
    "another index": (lambda cache: (cache / "index.json").write_text("[]"), "index.json"),
    "changed plan": (
        lambda cache: change(cache / "plan.json", 'classes": 2', 'classes": 3'),
        "plan.json was",
    ),
    "truncated plan": (lambda cache: os.truncate(cache / "plan.json", 100), "plan.json"),
    "no plan": (lambda cache: (cache / "plan.json").unlink(), "plan.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_before_training_and_the_file_named(cache, make_vae, damage):
    inflict, file = DAMAGE[damage]
    inflict(cache)
    with pytest.raises(ValueError, match=file):
        LatentCache(cache, make_vae(), seed=0)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_sizes_are_compared_without_verification_too(cache, make_vae, damage):
    DAMAGE[damage][0](cache)
    with pytest.raises(ValueError, match=SHARD):
        LatentCache(cache, make_vae(), seed=0, verify=False)


@pytest.mark.parametrize("damage", ["swapped", "flipped bit in a header"])
def test_shards_in_the_wrong_place_are_found_when_they_are_opened(cache, make_vae, damage):
    DAMAGE[damage][0](cache)
    data = LatentCache(cache, make_vae(), seed=0, verify=False)
    with pytest.raises(ValueError, match=f"{SHARD} (does not belong there|cannot be read)"):
        data[4]


def test_processes_share_the_verification(cache, make_vae):
    flip_bit(cache / SHARD, -5)
    for process_index in (0, 2):
        LatentCache(cache, make_vae(), seed=0, process_index=process_index, num_processes=3)
    with pytest.raises(ValueError, match=SHARD):
        LatentCache(cache, make_vae(), seed=0, process_index=1, num_processes=3)


def test_another_cache_or_an_unfinished_one_is_refused(cache, make_vae, tmp_path):
    (cache / "index.json").unlink()
    (cache / "shard-00002.json").unlink()
    with pytest.raises(ValueError, match=r"unfinished: 2 of 3 shards.*same command"):
        LatentCache(cache, make_vae(), seed=0)
    with pytest.raises(ValueError, match="is no latent cache: it has no plan.json"):
        LatentCache(tmp_path, make_vae(), seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Writing, interrupted
# ---------------------------------------------------------------------------------------------------------------------


def test_another_plan_or_another_folder_is_not_written_to(cache, make_vae, write_cache, tmp_path):
    before = contents(cache)
    with pytest.raises(ValueError, match=r"another plan: rows_per_shard is 3 in the cache, 5 here\. Repeat"):
        write_cache(cache, make_vae(), rows_per_shard=5)
    with pytest.raises(ValueError, match="data_fingerprint is .* in the cache, 'other' here"):
        write_cache(cache, make_vae(), data_fingerprint="other")
    assert contents(cache) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="neither empty nor a latent cache, it holds thesis.tex"):
        write_cache(tmp_path / "mine", make_vae())
    assert contents(tmp_path / "mine").keys() == {"thesis.tex"}


def test_a_second_run_in_the_same_folder_is_refused(make_vae, make_plan, write_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache_writer, "_LOCK_SECONDS", 0.1)
    leftover = tmp_path / "cache" / ".staging-shard-00001.json-0" / ".tmpABC"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    writer = LatentCacheWriter(tmp_path / "cache", make_plan(make_vae()), Accelerator(cpu=True))
    assert writer.start() == [0, 1, 2] and not leftover.exists()
    with pytest.raises(ValueError, match="another run is writing to"):
        write_cache(tmp_path / "cache", make_vae())


def test_a_damaged_shard_is_written_again_and_the_others_are_kept(cache, make_vae, write_cache):
    before, kept = contents(cache), (cache / "shard-00000.safetensors").stat()
    flip_bit(cache / SHARD, -5)
    os.truncate(cache / "shard-00002.json", 10)
    with pytest.warns(UserWarning) as warned:
        write_cache(cache, make_vae())
    assert all(any(name in str(one.message) for one in warned) for name in (SHARD, "shard-00002.json"))
    assert contents(cache) == before
    assert (cache / "shard-00000.safetensors").stat() == kept


def test_a_shard_must_be_what_the_plan_says(make_vae, make_plan, tmp_path, photos):
    plan = make_plan(make_vae())
    writer = LatentCacheWriter(tmp_path / "cache", plan, Accelerator(cpu=True))
    writer.start()
    codes = encode_images(make_vae(), photos[:3, :, :32, :32], flips=True)
    codes |= {"class_labels": torch.zeros(3, dtype=torch.int64), "rows": torch.arange(3)}
    with pytest.raises(ValueError, match="shard 0 must hold .*torch.float16.* got .*torch.float32"):
        writer.write_shard(0, EncodedRows(codes | {"moments.1": codes["moments.1"].float()}))
    with pytest.raises(ValueError, match="shard 1 must hold or name each of the rows 3 to 5"):
        writer.write_shard(1, EncodedRows(codes))
    writer.write_shard(0, EncodedRows(codes))
    with pytest.raises(ValueError, match="shard-00001.json is missing"):
        writer.finish()


def test_death_at_any_call_that_writes_leaves_nothing_that_is_trusted(make_vae, make_plan, load_photos, tmp_path):
    vae = make_vae()
    plan = make_plan(vae)
    source = Photographs([to_png(photo) for photo in load_photos(32)])
    encoded = dict(encode_shards(vae, source, plan, [0, 1, 2], batch_size=2))

    def write(folder: Path) -> None:
        writer = LatentCacheWriter(folder, plan, Accelerator(cpu=True))
        for shard in writer.start():
            writer.write_shard(shard, encoded[shard])
        writer.finish()

    def write_and_die(folder: Path, last_call: int) -> bool:
        """Whether the process died: in its n-th call, of which half is done."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        calls = 0

        def dying(function, half=None):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == last_call:
                    if half is not None:
                        half(*arguments)
                    os._exit(9)
                return function(*arguments, **options)

            return call

        status = 1
        try:
            latent_cache_writer.save_file = dying(
                latent_cache_writer.save_file, lambda tensors, path: path.write_bytes(b"\x90\x01\0\0\0\0\0\0{")
            )
            Path.write_text = dying(Path.write_text, lambda path, text: path.write_bytes(text.encode()[:20]))
            Path.replace = dying(Path.replace)
            Path.unlink = dying(Path.unlink)
            os.fsync = dying(os.fsync)
            shutil.copymode = dying(shutil.copymode)
            shutil.rmtree = dying(shutil.rmtree)
            write(folder)
            status = 0
        finally:
            os._exit(status)

    write(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    deaths = 0
    while write_and_die(tmp_path / str(deaths), last_call=deaths + 1):
        folder = tmp_path / str(deaths)
        finished = {p.name: p.stat() for p in folder.glob("shard-*.safetensors") if p.with_suffix(".json").is_file()}
        if (folder / "index.json").is_file():
            assert contents(folder).items() >= expected.items()
            LatentCache(folder, vae, seed=0)
        else:
            with pytest.raises(ValueError, match=r"unfinished: \d of 3 shards|has no plan.json"):
                LatentCache(folder, vae, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no shard is called damaged
            write(folder)
        assert contents(folder) == expected
        assert {name: (folder / name).stat() for name in finished} == finished
        deaths += 1
    assert deaths > 30  # 3 shards of two files, plan and index: each written, forced to the disk and renamed
    assert contents(tmp_path / str(deaths)) == expected


@pytest.fixture
def folder(load_photos, tmp_path) -> Path:
    """48 photographs in two classes, one of them damaged."""
    for i in range(48):
        path = tmp_path / "photos" / ("sky" if i % 2 else "earth") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"<html>" if i == 30 else to_png(load_photos(64)[i % 8].roll(i, dims=-1)))
    return tmp_path / "photos"


def test_a_script_killed_again_and_again_by_one_and_by_two_processes_writes_the_same_cache(make_vae, folder, tmp_path):
    make_vae().save_pretrained(tmp_path / "vae")
    arguments = [EXAMPLES / "cache_latents.py", "--train_data_dir", folder, "--vae", tmp_path / "vae"]
    arguments += "--resolution 32 --rows_per_shard 2 --encode_batch_size 2".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

    def start(launch: list[str], output: Path) -> subprocess.Popen:
        command = [*launch, *arguments, "--output_dir", output]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    whole, killed = start([sys.executable], tmp_path / "whole"), tmp_path / "killed"
    kept: dict[str, os.stat_result] = {}
    for launch in ([sys.executable], TWO_PROCESSES):
        process = start(launch, killed)
        moment = random.randint(1, 6), random.uniform(0, 0.06)
        while len(list(killed.glob("shard-*.json"))) < len(kept) + moment[0]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(moment[1])
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            member.kill()
        process.communicate()
        with pytest.raises(ValueError, match=r"unfinished: \d+ of 24 shards"):
            LatentCache(killed, make_vae(), seed=0)
        assert {name: (killed / name).stat() for name in kept} == kept, moment
        kept = {p.name: p.stat() for p in killed.glob("shard-*.safetensors") if p.with_suffix(".json").is_file()}

    process = start(TWO_PROCESSES, killed)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert "24 shards, written by 2 processes; 1 unusable images left out" in output
    output = whole.communicate(timeout=100)[0]
    assert whole.returncode == 0, output
    assert "24 shards, written by 1 processes" in output
    assert {name: (killed / name).stat() for name in kept} == kept
    assert contents(killed) == contents(tmp_path / "whole")
    assert not [path for path in killed.iterdir() if path.is_dir()]

    (bad,) = json.loads((killed / "index.json").read_text())["bad_images"]
    assert bad["name"].endswith("earth/30.png") and bad["row"] == 15 and bad["reason"]
    data = LatentCache(killed, make_vae(), seed=0, resolution=32)
    assert len(data) == 47 and data.id2label == {0: "earth", 1: "sky"}
    assert data.description == "photos, split train, 32x32"


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

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


def test_memory_does_not_grow_with_the_cache(make_vae, make_plan, tmp_path):
    def write(folder: Path, num_rows: int) -> int:
        plan = make_plan(make_vae(), num_rows=num_rows, rows_per_shard=50, resolution=128)
        writer = LatentCacheWriter(folder, plan, Accelerator(cpu=True))
        for shard in writer.start():
            tensors = {f"moments.{i}": torch.randn(50, 2, 8, 16 << i, 16 << i).half() for i in range(2)}
            rows = torch.tensor(plan.rows(shard))
            tensors |= {"entropy": torch.rand(50, 16, 16), "class_labels": rows % 2, "rows": rows}
            writer.write_shard(shard, EncodedRows(tensors))
        return sum(shard["bytes"] for shard in writer.finish()["shards"])

    sizes = [write(tmp_path / name, num_rows) for name, num_rows in (("small", 100), ("large", 1000))]
    assert sizes[1] > 9 * sizes[0] > 36e6
    command = [sys.executable, "-c", READ_ALL, tmp_path / "small", tmp_path / "large"]
    # The C library returns what is freed at once, instead of keeping it as it sees fit
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    small, large = (1024 * int(line) for line in result.stdout.split())
    assert large - small < 1e6  # of 37 MB more that were read
