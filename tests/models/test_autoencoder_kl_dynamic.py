# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The Dynamic VAE: which head encodes which region, the tied posterior, decoding and scale, and what it refuses."""

import math
import re

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from grain_maps import check_tied, codes, random_map

from diffusers_d2it import DynamicAutoencoderKL, load_preset, region_entropy
from diffusers_d2it.grains import fine_share, grain_map_from_entropy, tie


KINDS = pytest.mark.parametrize("num_grains", [2, 3])


def map_for(vae: DynamicAutoencoderKL, batch: int = 8, side: int = 64) -> torch.Tensor:
    """A random map with every grain in every image, whatever the photographs."""
    return random_map(vae.num_grains, (batch, side // vae.region_size, side // vae.region_size))


# ---- Dynamic Grained Coding ----


@KINDS
def test_the_map_is_that_of_the_entropy_and_the_thresholds(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    output = vae.encode(photos)
    assert output.grain_map.dtype == torch.int64
    assert output.grain_map.shape == output.entropy.shape == (8, 64 // vae.region_size, 64 // vae.region_size)
    assert torch.equal(output.entropy, region_entropy(photos, vae.region_size))
    assert torch.equal(output.grain_map, grain_map_from_entropy(output.entropy, vae.thresholds()))
    assert output.latent_dist.mean.shape == (8, 4, 16, 16)


@pytest.mark.parametrize(
    ("overrides", "fine_ratio", "expected"),
    [
        ({"num_grains": 2}, None, [0.5, 0.5]),
        ({"num_grains": 2}, 0.2, [0.8, 0.2]),
        ({"num_grains": 3}, None, [0.3, 0.3, 0.4]),
        ({"num_grains": 3, "grain_ratios": None}, None, [1 / 3] * 3),
        ({"num_grains": 3, "grain_ratios": [0.2, 0.4, 0.4]}, 0.1, [0.3, 0.6, 0.1]),  # coarser ones in proportion
        ({"num_grains": 3, "grain_ratios": [0.0, 0.0, 1.0]}, 0.4, [0.3, 0.3, 0.4]),  # there is no proportion
    ],
)
def test_shares_of_the_grains_are_what_was_asked_for(make_vae, photos, overrides, fine_ratio, expected):
    """On the photographs that were calibrated on; ties and the rounding of quantiles leave a per cent."""
    grain_map = make_vae(**overrides).encode(photos, fine_ratio=fine_ratio).grain_map
    shares = [(grain_map == grain).float().mean().item() for grain in range(overrides["num_grains"])]
    assert shares == pytest.approx(expected, abs=0.02)
    assert fine_share(grain_map, overrides["num_grains"]).mean().item() == pytest.approx(shares[-1])


def test_entropy_is_measured_as_the_calibration_was(make_vae, photos, calibrate):
    """Bins and kernel are part of the calibration: thresholds of one kernel mean nothing for another."""
    calibration = calibrate(8) | {"num_bins": 128, "sigma": 0.05}
    calibration["quantiles"] = [value / 2 for value in calibration["quantiles"]]  # below ln 128
    entropy = make_vae(calibration=calibration).encode(photos, fine_ratio=0.5).entropy
    assert torch.equal(entropy, region_entropy(photos, 8, num_bins=128, sigma=0.05))


@KINDS
def test_a_given_map_is_used_as_it_is(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    drawn = vae.encode(photos)
    assert torch.equal(vae.encode(photos, drawn.grain_map).latent_dist.parameters, drawn.latent_dist.parameters)
    grain_map = map_for(vae)
    output = vae.encode(photos, grain_map=grain_map)
    assert torch.equal(output.grain_map, grain_map)
    assert torch.equal(output.latent_dist.layout.grain_map, grain_map)
    assert torch.equal(output.entropy, drawn.entropy)


@KINDS
@pytest.mark.parametrize("calibrated", [True, False])
def test_fine_ratio_0_and_1_are_exact_on_any_image(make_vae, photos, num_grains, calibrated):
    vae = make_vae(num_grains) if calibrated else make_vae(num_grains, calibration=None)
    for images in (photos[:2], torch.zeros_like(photos[:2])):
        assert (vae.encode(images, fine_ratio=1).grain_map == num_grains - 1).all()
        if calibrated or num_grains == 2:
            assert (vae.encode(images, fine_ratio=0).grain_map < num_grains - 1).all()


# ---- Hierarchical encoder ----


@KINDS
@torch.no_grad()
def test_every_region_holds_the_codes_of_the_head_of_its_grain(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    heads = vae.encoder(photos)
    assert [head.shape[-1] for head in heads] == [64 // factor for factor in reversed(vae.config.downsample_factors)]
    grain_map = map_for(vae)
    parameters = vae.encode(photos, grain_map=grain_map).latent_dist.parameters
    for image, grain, row, column, block in codes(parameters, grain_map, num_grains):
        assert (block == heads[grain][image, :, row, column, None, None]).all()


# ---- Tied posterior ----


@KINDS
@torch.no_grad()
def test_samples_are_the_mean_plus_the_deviation_times_tied_unit_noise(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = map_for(vae)
    posterior = vae.encode(photos, grain_map=grain_map).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7))
    sample = posterior.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(sample, posterior.mean + posterior.std * tie(noise, grain_map))
    for tensor in (posterior.mean, posterior.std, posterior.logvar, posterior.mode(), sample):
        check_tied(tensor, grain_map)


@torch.no_grad()
def test_a_list_of_generators_makes_every_image_its_own(make_vae, photos):
    posterior = make_vae().encode(photos[:2], fine_ratio=0.5).latent_dist
    one = make_vae().encode(photos[1:2], fine_ratio=0.5).latent_dist
    together = posterior.sample([torch.Generator().manual_seed(seed) for seed in (5, 6)])
    alone = one.sample([torch.Generator().manual_seed(6)])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@KINDS
@torch.no_grad()
def test_kl_is_the_closed_form_with_every_code_counted_once(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = map_for(vae)
    posterior = vae.encode(photos, grain_map=grain_map).latent_dist
    expected = torch.zeros(8, dtype=torch.float64)
    for image, *_, block in codes(posterior.parameters, grain_map, num_grains):
        mean, logvar = block[:, 0, 0].double().chunk(2)
        expected[image] += 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
    torch.testing.assert_close(posterior.kl().double(), expected, rtol=1e-5, atol=0)
    fine = vae.encode(photos, fine_ratio=1.0).latent_dist
    torch.testing.assert_close(fine.kl(), DiagonalGaussianDistribution(fine.parameters).kl())


# ---- Decoding, forward, scale ----


@KINDS
@torch.no_grad()
def test_forward_decodes_the_mode_or_a_sample(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    posterior = vae.encode(photos).latent_dist
    of_mode = vae(photos).sample
    of_sample = vae(photos, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample
    assert of_mode.shape == photos.shape
    torch.testing.assert_close(of_mode, vae.decode(posterior.mode()).sample)
    z = posterior.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(of_sample, vae.decode(z).sample)
    assert not torch.equal(of_sample, of_mode)


@torch.no_grad()
def test_tuples_hold_what_the_outputs_hold(make_vae, photos):
    vae = make_vae()
    output = vae.encode(photos)
    posterior, grain_map, entropy = vae.encode(photos, return_dict=False)
    assert torch.equal(posterior.parameters, output.latent_dist.parameters)
    assert torch.equal(grain_map, output.grain_map) and torch.equal(entropy, output.entropy)
    assert torch.equal(vae(photos, return_dict=False)[0], vae(photos).sample)


@KINDS
@torch.no_grad()
def test_images_need_not_be_square(make_vae, load_photos, num_grains):
    """A wide image is encoded as the transposed model would encode the tall one: shapes follow rows and columns."""
    vae = make_vae(num_grains)
    wide = load_photos(128)[:2, :, :48]
    output = vae.encode(wide)
    assert output.grain_map.shape == (2, 48 // vae.region_size, 128 // vae.region_size)
    assert torch.equal(output.entropy, region_entropy(wide, vae.region_size))
    z = output.latent_dist.mode()
    assert z.shape == (2, 4, 12, 32)
    check_tied(z, output.grain_map)
    assert vae.decode(z).sample.shape == wide.shape


@pytest.mark.parametrize("shift", [None, 0.7])
def test_unscaling_inverts_scaling_to_unit_latents(make_vae, photos, shift):
    vae = make_vae(scaling_factor=0.25, shift_factor=shift)
    z = 4 * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + (shift or 0)
    scaled = vae.scale_latents(z)
    assert scaled.std().item() == pytest.approx(1, abs=0.02) and scaled.mean().item() == pytest.approx(0, abs=0.02)
    torch.testing.assert_close(vae.unscale_latents(scaled), z)


# ---- Training and precision ----


@KINDS
def test_frozen_fine_path_leaves_all_to_train_that_it_does_not_read(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    moments = vae.encode_grains(photos[:1])[-1]
    (moments.mean() + vae.decode(moments[:, :4]).sample.mean()).backward()
    vae.freeze_fine_path()
    for name, parameter in vae.named_parameters():
        assert parameter.requires_grad == (parameter.grad is None), name
    assert any(parameter.requires_grad for parameter in vae.parameters())


@torch.no_grad()
def test_low_precision_leaves_the_map_alone(make_vae, photos):
    """Training in mixed precision encodes under autocast; the entropy is float32 there too."""
    vae = make_vae()
    expected = vae.encode(photos)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vae.encode(photos)
    assert output.entropy.dtype == torch.float32
    torch.testing.assert_close(output.entropy, expected.entropy, rtol=0, atol=2e-5)
    assert (output.grain_map == expected.grain_map).float().mean() > 0.99
    x = photos.bfloat16()
    expected, output = vae.encode(x.float()), vae.to(torch.bfloat16).encode(x)
    assert torch.equal(output.entropy, expected.entropy) and output.latent_dist.mean.dtype == torch.bfloat16
    check_tied(output.latent_dist.sample(torch.Generator().manual_seed(0)), output.grain_map)
    torch.testing.assert_close(output.latent_dist.kl().float(), expected.latent_dist.kl(), rtol=0.05, atol=0)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("downsample_factors", factors) for factors in ([8], [3, 6], [8, 4], [4, 16])),
        *(("grain_ratios", ratios) for ratios in ([1.0], [0.2, 0.2], [1.5, -0.5])),
        ("block_out_channels", [8, 8, 16]),
        ("decoder_block_out_channels", [8, 8]),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(key, value):
    with pytest.raises(ValueError, match=f"`{key}`.*{re.escape(str(value))}"):
        DynamicAutoencoderKL(**(load_preset("dvae-tiny") | {key: value}))


MAP = torch.zeros(8, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fine_ratio": -0.1}, "`fine_ratio`.*-0.1"),
        ({"fine_ratio": math.nan}, "`fine_ratio`.*nan"),
        ({"grain_map": MAP, "fine_ratio": 0.5}, "`grain_map`.*`fine_ratio`"),
        ({"grain_map": MAP.float()}, "`grain_map`.*int64.*float32"),
        ({"grain_map": MAP + 2}, "`grain_map`.*0 .*1 .*2"),
        ({"grain_map": MAP - 1}, "`grain_map`.*-1"),
        ({"grain_map": MAP[..., :4]}, r"`grain_map`.*\(8, 8, 8\).*\(8, 8, 4\)"),
        ({"grain_map": MAP[:1]}, r"`grain_map`.*\(8, 8, 8\).*\(1, 8, 8\)"),
        ({"grain_map": MAP[0]}, r"`grain_map`.*\(8, 8\)"),
        ({"grain_map": "fine"}, "`grain_map`.*str"),
    ],
)
def test_maps_and_ratios_that_do_not_fit_are_refused(make_vae, photos, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_vae().encode(photos, **arguments)


@KINDS
def test_without_calibration_there_are_no_thresholds_between_0_and_1(make_vae, photos, num_grains):
    vae = make_vae(num_grains, calibration=None)
    asked, of_one_grain = [{}, {"fine_ratio": 0.5}], "0 or 1"
    if num_grains == 3:  # two grains share what is not fine
        asked, of_one_grain = [*asked, {"fine_ratio": 0}], "1"
    for kwargs in asked:
        with pytest.raises(ValueError, match=f"`grain_map`.*`fine_ratio` of {of_one_grain}"):
            vae.encode(photos, **kwargs)
    assert torch.equal(vae.encode(photos, grain_map=map_for(vae)).grain_map, map_for(vae))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, r"\[-1, 1\]"),
        (lambda x: x.masked_fill(x > 0.9, math.nan), r"\[-1, 1\].*nan"),
        (lambda x: x[..., :60], "8.*64 and 60"),
        (lambda x: x[:, :1], r"\(B, 3, H, W\)"),
        (lambda x: x[0], r"\(B, 3, H, W\)"),
        (lambda x: ((x + 1) * 127).byte(), "uint8"),
    ],
)
def test_images_out_of_range_or_shape_are_refused_with_and_without_a_map(make_vae, photos, change, message):
    for kwargs in ({}, {"grain_map": MAP}, {"fine_ratio": 1.0}):
        with pytest.raises(ValueError, match=message):
            make_vae().encode(change(photos), **kwargs)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64, 1), (3, 64, 64), (1, 4, 64, 64), (1, 3, 60, 64), (1, 3, 64, 60)])
def test_tensors_of_another_shape_have_neither_moments_nor_image(make_vae, shape):
    with pytest.raises(ValueError, match=r"`x`.*\(B, 3, H, W\)"):
        make_vae().encode_grains(torch.zeros(shape))
    if shape[1:2] != (4,):
        with pytest.raises(ValueError, match=r"`z`.*\(B, 4, h, w\)"):
            make_vae().decode(torch.zeros(shape))
