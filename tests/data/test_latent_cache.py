# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The latent cache: equal to encoding on the fly, and refused when it does not fit or is damaged."""

import os
import pickle
import random
import re
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from image_files import encode, flip_bit, photo
from photo_caches import CODES, SHARD, contents
from torch.utils.data import default_collate

from diffusers_d2it.data.images import to_pixels
from diffusers_d2it.data.latent_cache import LatentCache, read_codes, read_entropy
from diffusers_d2it.data.latent_cache_writer import encode_images
from diffusers_d2it.data.loaders import batches_from, make_loader
from diffusers_d2it.grains import grain_map_from_entropy
from diffusers_d2it.models import LatentCodec


def whole(cache: LatentCache, epoch: int = 0) -> dict:
    """All eight images of a cache as one batch, with the flips of an epoch."""
    return cache.__getitems__([(epoch, index) for index in range(8)])


def assert_same_codes(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for cached, encoded in zip(a, b, strict=True):
        torch.testing.assert_close(cached, encoded, rtol=2**-10, atol=2**-14)  # float16


# ---- What is read is what would have been encoded ----


@pytest.mark.parametrize("num_grains", [2, 3])
def test_codes_are_those_of_the_encoder_at_every_fine_ratio(num_grains, make_vae, write_cache, tmp_path):
    vae = make_vae(num_grains)
    size = vae.config.sample_size
    photos = torch.stack([to_pixels(photo(i, size), size) for i in range(8)])
    write_cache(tmp_path, vae)
    cache = LatentCache(tmp_path, vae, seed=3, resolution=size)
    flipped_photos = 0
    for epoch in range(3):
        flips = [random.Random(f"3/{epoch}/{i}").random() < 0.5 for i in range(8)]  # those of ImageDataset
        flipped_photos += sum(flips)
        pixels = torch.stack([one.flip(-1) if flip else one for one, flip in zip(photos, flips)])
        batch = whole(cache, epoch)
        (moments, entropy), direct = read_codes(vae, batch), read_codes(vae, {"pixels": pixels})
        assert len(moments) == num_grains
        assert_same_codes(moments, direct[0])
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


@pytest.mark.parametrize("make", ["make_vae", "make_autoencoder_kl"])
def test_a_codec_reads_the_same_latents_from_a_cache_and_from_pixels(request, make, write_cache, tmp_path):
    scales = {"scaling_factor": 0.7, "shift_factor": 0.1}
    codec = LatentCodec(request.getfixturevalue(make)(**scales))
    write_cache(tmp_path, codec.vae)
    cache = LatentCache(tmp_path, codec, seed=3, resolution=32)
    batch = whole(cache)
    has_entropy = {"entropy"} if codec.has_grains else set()
    assert batch.keys() == {"moments", "class_labels"} | has_entropy == cache[0].keys()
    assert len(batch["moments"]) == len(codec.factors)
    pixels = torch.stack([to_pixels(photo(i, 32), 32) for i in range(8)])
    flips = [random.Random(f"3/0/{i}").random() < 0.5 for i in range(8)]
    pixels = torch.stack([one.flip(-1) if flip else one for one, flip in zip(pixels, flips)])
    assert 0 < sum(flips) < 8
    with torch.no_grad():
        moments = [codec.moments(source) for source in (batch, {"pixels": pixels})]
    assert_same_codes(*moments)
    latents = [codec.scale(codec.posterior(found).sample(torch.Generator().manual_seed(0))) for found in moments]
    torch.testing.assert_close(*latents, rtol=2**-8, atol=2**-8)
    assert latents[0].shape == (8, codec.channels, 32 // codec.factor, 32 // codec.factor)


def test_a_cache_without_flips_holds_and_gives_the_images_alone(make_vae, write_cache, tmp_path):
    vae = make_vae()
    for name in ("both", "one"):
        write_cache(tmp_path / name, vae, flips=name == "both")
    one, both = ((tmp_path / name / CODES).stat().st_size for name in ("one", "both"))
    assert 0.5 < one / both < 0.7
    pixels = torch.stack([to_pixels(photo(i, 32), 32) for i in range(8)])
    cache = LatentCache(tmp_path / "one", vae, seed=0)
    for epoch in range(2):
        batch = whole(cache, epoch)
        assert torch.equal(batch["entropy"], vae.region_entropy(pixels))
        assert_same_codes(batch["moments"], vae.encode_grains(pixels))


def test_a_batch_is_its_items_stacked_with_moments_and_without(cache, make_vae):
    both = [LatentCache(cache, make_vae(), seed=0, moments=moments) for moments in (True, False)]
    batches = [whole(data) for data in both]
    for data, batch in zip(both, batches):
        torch.testing.assert_close(batch, default_collate([data[i] for i in range(8)]), rtol=0, atol=0)
    assert batches[0].keys() - batches[1].keys() == {"moments"}
    assert torch.equal(batches[0]["entropy"], batches[1]["entropy"])


def test_workers_do_not_change_the_batches_of_training(cache, make_vae):
    accelerator = Accelerator(cpu=True)

    def batches(num_workers: int, first_batch: int) -> list[dict]:
        data = LatentCache(cache, make_vae(), seed=0)
        loader = make_loader(accelerator, data, batch_size=3, num_workers=num_workers)
        return list(islice(batches_from(loader, first_batch), 5 - first_batch))

    expected = batches(0, 0)  # two and a half epochs
    assert not torch.equal(expected[0]["entropy"], expected[2]["entropy"])
    for num_workers, first_batch in ((1, 0), (2, 0), (0, 3), (2, 3)):
        torch.testing.assert_close(batches(num_workers, first_batch), expected[first_batch:], rtol=0, atol=0)


def test_what_a_cache_says_of_itself(cache, make_vae, write_cache, tmp_path):
    data = LatentCache(cache, make_vae(), seed=0)
    assert (data.id2label, data.num_classes, data.description) == ({0: "earth", 1: "sky"}, 2, "eight photographs")
    copy = pickle.loads(pickle.dumps(data))  # as a worker process may get it
    assert copy.fingerprint == data.fingerprint and torch.equal(copy[7]["entropy"], data[7]["entropy"])
    assert len({path.stat().st_mode for path in cache.rglob("*.*")}) == 1  # who may read one may read all
    write_cache(tmp_path / "again", make_vae())
    assert LatentCache(tmp_path / "again", make_vae(), seed=1).fingerprint == data.fingerprint
    write_cache(tmp_path / "other", make_vae(), flips=False)
    assert LatentCache(tmp_path / "other", make_vae(), seed=0).fingerprint != data.fingerprint
    for index in (-1, 8):
        with pytest.raises(IndexError, match=f" {index} .* 8"):
            data[index]


def test_an_unusable_image_is_left_out_and_named(make_vae, write_cache, tmp_path):
    vae = make_vae()
    files = [encode(photo(i, 32)) for i in range(8)]
    write_cache(tmp_path / "whole", vae, files)
    damaged = [files[0], b"<html>", files[2], files[3][:200], *files[4:6], b"", b"", b"", files[0]]  # none in shard 2
    bad_images = write_cache(tmp_path / "damaged", vae, damaged)
    assert [(image["row"], image["name"]) for image in bad_images] == [(row, f"{row}.png") for row in (1, 3, 6, 7, 8)]
    assert all(image["reason"] for image in bad_images)
    complete, rest = (LatentCache(tmp_path / name, vae, seed=0) for name in ("whole", "damaged"))
    assert len(rest) == len(damaged) - len(bad_images) == 5
    for epoch in range(4):
        for position, row in enumerate((0, 2, 4, 5)):  # flips follow the row, so they are the same too
            one, other = rest[epoch, position], complete[epoch, row]
            torch.testing.assert_close(one["moments"], other["moments"], rtol=1e-3, atol=1e-4)
            assert one["class_labels"] == row % 2
    with pytest.raises(ValueError, match=r"2 .*0\.png: ."):
        write_cache(tmp_path / "nothing", vae, [b"", b"<html>"])


def test_values_beyond_float16_are_refused(make_vae, photos, write_cache, tmp_path):
    vae = make_vae()
    with torch.no_grad():
        vae.encoder.conv_outs["f8"].bias.fill_(7e4)
    with pytest.raises(ValueError, match=r"grain 0 .*float16.* 7e\+04"):
        encode_images(vae, photos, flips=False)
    with pytest.raises(ValueError, match="rows 0 to 1: .*grain 0"):
        write_cache(tmp_path, vae)


def test_a_map_must_fit_the_codes(make_vae):
    with pytest.raises(ValueError, match="`grain_map`.* 0"):
        make_vae().posterior(make_vae().encode_grains(torch.zeros(1, 3, 32, 32)), torch.full((1, 4, 4), 2))


# ---- A cache that does not fit ----


def test_a_cache_of_another_autoencoder_scale_or_resolution_is_refused(cache, make_vae, calibrate):
    LatentCache(cache, make_vae(), seed=0, resolution=32)

    def refused(vae, *differing: str, resolution: int = 32) -> str:
        with pytest.raises(ValueError) as error:
            LatentCache(cache, vae, seed=0, resolution=resolution)
        message = str(error.value)
        fields = (*LatentCodec(vae).describe(), "resolution")
        named = [field for field in fields if re.search(rf"[:;] {field} ", message)]
        assert named == list(differing) and str(cache) in message, message
        return message

    for changed in ({"seed": 1}, {"norm_num_groups": 2}, {"calibration": calibrate(8) | {"sigma": 0.02}}):
        refused(make_vae(**changed), "vae_fingerprint")
    refused(make_vae(num_grains=3), "vae_fingerprint", "downsample_factors")
    assert "not 0.5" in refused(make_vae(scaling_factor=0.5), "scaling_factor")
    refused(make_vae(shift_factor=0.1, scaling_factor=2.0), "scaling_factor", "shift_factor")
    assert "32, not 64" in refused(make_vae(), "resolution", resolution=64)
    changed = make_vae()
    with torch.no_grad():
        changed.encoder.conv_outs["f4"].bias[0] += 1e-6
    refused(changed, "vae_fingerprint")


def test_a_cache_of_an_autoencoder_kl_is_refused_for_any_other(make_autoencoder_kl, make_vae, write_cache, tmp_path):
    by_channel = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    write_cache(tmp_path, make_autoencoder_kl(**by_channel))
    tuned = make_autoencoder_kl(**by_channel, force_upcast=False)
    with torch.no_grad():
        tuned.decoder.conv_out.bias.add_(1)
    LatentCache(tmp_path, tuned, seed=0, resolution=32)
    fields = [*LatentCodec(tuned).describe()]
    for vae, named in (
        (make_autoencoder_kl(seed=5, **by_channel), ["vae_fingerprint"]),
        (make_autoencoder_kl(scaling_factor=0.5, **by_channel), ["scaling_factor"]),
        (make_autoencoder_kl(), ["latents_mean", "latents_std"]),
        (make_autoencoder_kl(**by_channel | {"latents_std": [1.0, 2.0, 3.0, 5.0]}), ["latents_std"]),
        (make_vae(), [field for field in fields if field not in ("shift_factor", "latent_channels")]),
    ):
        with pytest.raises(ValueError) as error:
            LatentCache(tmp_path, vae, seed=0)
        found = [field for field in fields if re.search(rf"[:;] {field} ", str(error.value))]
        assert found == named and str(tmp_path) in str(error.value)


def test_a_cache_outlives_a_tuned_decoder_and_a_new_calibration(cache, make_vae, calibrate):
    tuned = make_vae(calibration=calibrate(8) | {"num_images": 1}, grain_ratios=[0.2, 0.8])
    with torch.no_grad():
        tuned.decoder.conv_out.bias.add_(1)
    LatentCache(cache, tuned, seed=0, resolution=32)


# ---- Damage ----


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def swap(a: Path, b: Path) -> None:
    """Two files, or two folders."""
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


DAMAGE = {  # what is done, and what is named; each file damaged in each way: tests/faults/test_damaged_files.py
    "flipped bit in a header": (lambda cache: flip_bit(cache / CODES, 40), CODES),
    "truncated": (lambda cache: os.truncate(cache / CODES, 3000), CODES),
    "missing": (lambda cache: (cache / CODES).unlink(), CODES),
    "swapped": (lambda cache: swap(cache / CODES, cache / "shard-00000" / "codes.safetensors"), "shard-0000[01]"),
    "a whole shard swapped": (lambda cache: swap(cache / SHARD, cache / "shard-00000"), "shard-0000[01]"),
    "a whole shard missing": (lambda cache: shutil.rmtree(cache / SHARD), SHARD),
    "another manifest": (lambda cache: (cache / "manifest.json").write_text("[]"), "manifest.json"),
    "changed plan": (lambda cache: change(cache / "plan.json", 'classes": 2', 'classes": 3'), "plan.json"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_before_training_or_when_a_shard_is_opened_and_the_file_named(cache, make_vae, damage, verify):
    inflict, file = DAMAGE[damage]
    inflict(cache)
    with pytest.raises(ValueError, match=file):
        data = LatentCache(cache, make_vae(), seed=0, verify=verify)
        assert not verify and damage in ("swapped", "flipped bit in a header")  # sizes are compared in any case
        data[4]


def test_processes_share_the_verification(cache, make_vae):
    flip_bit(cache / CODES, -5)
    for process_index in (0, 2):
        LatentCache(cache, make_vae(), seed=0, process_index=process_index, num_processes=3)
    with pytest.raises(ValueError, match=SHARD):
        LatentCache(cache, make_vae(), seed=0, process_index=1, num_processes=3)


def test_another_cache_or_an_unfinished_one_is_refused(cache, make_vae, tmp_path):
    with pytest.raises(ValueError, match="plan.json"):
        LatentCache(tmp_path, make_vae(), seed=0)
    (cache / "manifest.json").unlink()
    shutil.rmtree(cache / "shard-00002")
    with pytest.raises(ValueError, match="cache.* 2 .*3 .*cache_latents.py"):
        LatentCache(cache, make_vae(), seed=0)


@pytest.mark.parametrize("version", [1, 2])
def test_a_cache_of_an_earlier_version_is_refused_by_name(cache, make_vae, write_cache, version):
    change(cache / "plan.json", '"version": 3', f'"version": {version}')
    before = contents(cache)
    for use in (lambda: LatentCache(cache, make_vae(), seed=0), lambda: write_cache(cache, make_vae())):
        with pytest.raises(
            ValueError, match=f"plan.json .*version 3.*version {version}.*accelerate launch.*cache_latents.py"
        ):
            use()
    assert contents(cache) == before
