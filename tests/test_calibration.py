# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Thresholds of a data set: the same however it is read, and good for the ratios that were asked for."""

import json
import math

import numpy as np
import pytest
import torch

from diffusers_d2it import DynamicAutoencoderKL, load_preset, region_entropy
from diffusers_d2it.entropy import EntropyCalibration, thresholds_for_ratios
from diffusers_d2it.grains import grain_map_from_entropy


COUNTING_STEP = math.log(256) / 2**16  # nats
ROUNDING_STEP = 1e-4  # nats, of the stored quantiles


def calibrated(**calibration) -> DynamicAutoencoderKL:
    """A model of regions of 8 pixels with this calibration."""
    with torch.device("meta"):  # thresholds come from the configuration alone
        return DynamicAutoencoderKL(**load_preset("dvae-tiny") | {"calibration": calibration})


def calibrate_batches(batches: list[torch.Tensor], region_size: int = 8) -> EntropyCalibration:
    calibration = EntropyCalibration(region_size=region_size)
    for batch in batches:
        calibration.update(batch)
    return calibration


def shares(entropy: torch.Tensor, thresholds: list[float], num_grains: int) -> list[float]:
    grain_map = grain_map_from_entropy(entropy, thresholds)
    return [(grain_map == grain).float().mean().item() for grain in range(num_grains)]


@pytest.fixture
def entropy(load_photos) -> torch.Tensor:
    """Entropy of the 2048 regions of 8 px that `config` was counted on."""
    return region_entropy(load_photos(128), 8)


@pytest.fixture
def config(load_photos) -> dict:
    return calibrate_batches([load_photos(128)]).to_config("photographs, 128x128")


# ---- Counting ----


def test_batches_their_order_and_the_processes_that_share_them_do_not_matter(load_photos, config):
    photos = load_photos(128)
    for batches in (photos.split(1), photos.split(3), photos.flip(0).split(3)):
        assert calibrate_batches(batches).to_config("photographs, 128x128") == config
    merged = EntropyCalibration(region_size=8)
    for share in photos.split([1, 5, 2]):
        part = calibrate_batches([share])
        merged.merge(part.counts, part.num_images)
    assert merged.to_config("photographs, 128x128") == config
    # Images of different sizes are counted region by region
    pieces = calibrate_batches([photos[..., :40], photos[..., 40:72], photos[..., 72:]])
    assert torch.equal(pieces.counts, merged.counts)


def test_config_tells_what_was_counted_and_how(load_photos, config):
    assert {key: value for key, value in config.items() if key not in ("quantiles", "tie_share")} == {
        "num_images": 8,
        "num_regions": 8 * 16 * 16,
        "region_size": 8,
        "num_bins": 256,
        "sigma": 0.01,
        "luma_weights": [0.299, 0.587, 0.114],
        "luma_range": [0.0, 1.0],
        "source": "photographs, 128x128",
    }
    assert json.loads(json.dumps(config)) == config
    other = EntropyCalibration(region_size=16, num_bins=128, sigma=0.02)
    other.update(load_photos(128))
    other = other.to_config("")
    assert (other["region_size"], other["num_bins"], other["sigma"]) == (16, 128, 0.02)
    assert other["num_regions"] == 8 * 8 * 8
    assert max(other["quantiles"]) <= math.log(128) + ROUNDING_STEP


def test_quantiles_are_those_of_the_entropies(config, entropy):
    steps = len(config["quantiles"]) - 1
    exact = np.quantile(entropy.numpy().astype(np.float64), np.arange(steps + 1) / steps, method="inverted_cdf")
    np.testing.assert_allclose(config["quantiles"], exact, rtol=0, atol=COUNTING_STEP + ROUNDING_STEP)
    assert config["quantiles"] == sorted(config["quantiles"])


def test_tie_share_is_the_share_of_equal_entropies():
    """Of 4 images of 16 regions three are flat and equal, so 48 of 64 regions cannot be told apart."""
    flat = torch.zeros(3, 3, 32, 32)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = calibrate_batches([torch.cat([flat, noise])]).to_config("")
    assert config["tie_share"] == pytest.approx(0.75, abs=0.02)
    assert calibrate_batches([flat]).to_config("")["tie_share"] == 1.0


def test_nothing_is_counted_of_images_out_of_range_and_nothing_is_refused():
    calibration = EntropyCalibration()
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        calibration.update(torch.full((1, 3, 32, 32), 255.0))
    assert calibration.num_images == 0 and calibration.counts.sum() == 0
    with pytest.raises(ValueError, match="image"):
        calibration.to_config("nothing")


# ---- Thresholds ----


@pytest.mark.parametrize(
    "ratios", [[0.99, 0.01], [0.7, 0.3], [0.123, 0.877], [0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.5, 0.0, 0.5]]
)
def test_grains_get_the_shares_that_were_asked_for(config, entropy, ratios):
    thresholds = thresholds_for_ratios(config, ratios)
    assert len(thresholds) == len(ratios) - 1 and thresholds == sorted(thresholds)
    tolerance = config["tie_share"] + 1 / 200  # ties, and the steps of the stored quantiles
    assert shares(entropy, thresholds, len(ratios)) == pytest.approx(ratios, abs=tolerance)


def test_thresholds_lie_on_the_line_between_quantiles():
    calibration = {"quantiles": [1.0, 2.0, 4.0, 8.0, 16.0]}
    for coarse, threshold in ((0.125, 1.5), (0.25, 2.0), (0.4, 4 * 0.6 * 1 + 2 * 0.4), (0.875, 12.0)):
        assert thresholds_for_ratios(calibration, [coarse, 1 - coarse]) == pytest.approx([threshold])


@pytest.mark.parametrize(
    ("ratios", "grain"), [([1, 0], 0), ([0, 1], 1), ([1, 0, 0], 0), ([0, 1, 0], 1), ([0, 0, 1], 2)]
)
def test_a_share_of_one_is_exact_also_on_images_unlike_the_calibrated_ones(config, ratios, grain):
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = torch.cat([noise, torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)])
    grain_map = grain_map_from_entropy(region_entropy(images, 8), thresholds_for_ratios(config, ratios))
    assert (grain_map == grain).all()


def test_ratios_are_numbers_from_0_to_1(config):
    vae = calibrated(**config)
    for ratio in (0, 1, 0.5, np.float32(0.25), torch.tensor(0.25)):
        assert len(vae.thresholds(ratio)) == 1
    for ratio in (-0.01, 1.01, math.nan, math.inf, "0.5", [0.5], torch.tensor([0.5, 0.5])):
        with pytest.raises(ValueError, match=r"`fine_ratio`.*\[0, 1\]"):
            vae.thresholds(ratio)


def test_shares_that_sum_to_one_only_after_rounding_are_exact_too(config):
    """0.7 + 0.2 + 0.1 is 0.9999999999999999: the empty finest grain must stay empty."""
    ratios = [0.7, 0.2, 0.1, 0.0]
    assert sum(ratios) != 1 and thresholds_for_ratios(config, ratios)[2] == math.inf


def test_a_threshold_on_top_of_a_mass_of_equal_entropies_leaves_the_mass_below():
    """Saturated regions and drawings: when 40 % of the regions are equal, a ratio of 0.6 can be met exactly."""
    textured = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for level in (*range(0, 40, 3), *range(216, 256, 3)):  # of 8 bit: near the ends each has an entropy of its own
        images = torch.cat([torch.full((2, 3, 16, 16), level / 127.5 - 1), textured])
        config = calibrate_batches([images]).to_config("")
        fine = shares(region_entropy(images, 8), thresholds_for_ratios(config, [0.4, 0.6]), 2)[1]
        assert fine == pytest.approx(0.6), level


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region_size": 16}, "16.*8"),
        ({"quantiles": None}, "quantiles.*None"),
        ({"quantiles": [3.0]}, r"quantiles.*\[3.0\]"),
        ({"quantiles": [3.0, 2.0]}, "quantiles.*3.0, 2.0"),
        ({"quantiles": [2.0, math.nan, 3.0]}, "quantiles.*nan"),
        ({"luma_weights": [0.2126, 0.7152, 0.0722]}, "luma_weights"),
        ({"luma_range": [-1.0, 1.0]}, "luma_range"),
    ],
)
def test_a_calibration_of_something_else_is_refused(config, changes, message):
    calibrated(**config | {"quantiles": [2.0, 2.0]})
    with pytest.raises(ValueError, match=f"`calibration.*{message}"):
        calibrated(**config | changes)


def test_a_key_that_a_calibration_does_not_have_is_refused(config):
    with pytest.raises(ValueError, match="calibration.num_bin'.*128.*num_bins"):
        calibrated(**config, num_bin=128)


# ---- The calibration that is shipped ----


def test_the_paper_preset_carries_a_calibration_on_500_photographs(load_photos):
    with torch.device("meta"):
        shipped = DynamicAutoencoderKL(**load_preset("dvae-f8f16"))
    calibration = shipped.config.calibration
    assert (calibration["num_bins"], calibration["sigma"], calibration["num_images"]) == (256, 0.01, 500)
    assert calibration["num_regions"] == 500 * 16 * 16  # 256x256 images
    assert calibration["tie_share"] < 0.03 and calibration["source"]
    assert 1.5 < calibration["quantiles"][0] < calibration["quantiles"][-1] <= math.log(256)

    assert shipped.thresholds() == shipped.thresholds(0.5)
    entropy = shipped.region_entropy(load_photos(256))
    fine = [shares(entropy, shipped.thresholds(ratio), 2)[1] for ratio in (0.0, 0.3, 0.5, 0.7, 1.0)]
    assert fine == sorted(set(fine))
    assert fine[0] == 0 and fine[-1] == 1
    flat = torch.full((1, 3, 16, 16), 0.3)
    noise = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.3).clamp(-1, 1)
    assert region_entropy(flat).item() < shipped.thresholds(0.5)[0] < region_entropy(noise).item()
