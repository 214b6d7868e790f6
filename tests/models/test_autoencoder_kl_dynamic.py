# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The Dynamic VAE: which head encodes which region, the tied posterior, decoding and scale."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from grain_maps import mixed_map

from diffusers_d2it import region_entropy
from diffusers_d2it.grains import check_tied, fine_share, grain_map_from_entropy, tie


KINDS = pytest.mark.parametrize("num_grains", [2, 3])


def codes(latents: torch.Tensor, grain_map: torch.Tensor, cells: int) -> list[tuple[int, torch.Tensor]]:
    """(image, cells of one code (C, side, side)) of every code, by plain loops."""
    found = []
    for b, row, column in torch.cartesian_prod(*(torch.arange(size) for size in grain_map.shape)).tolist():
        side = cells >> grain_map[b, row, column].item()
        for y in range(row * cells, (row + 1) * cells, side):
            for x in range(column * cells, (column + 1) * cells, side):
                found.append((b, latents[b, :, y : y + side, x : x + side]))
    return found


def copied(code: torch.Tensor, cells: int) -> torch.Tensor:
    return code.repeat_interleave(cells, -2).repeat_interleave(cells, -1)


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


@KINDS
def test_shares_of_the_grains_are_the_configured_ratios(make_vae, photos, num_grains):
    """On the photographs that were calibrated on; ties and the rounding of quantiles leave a per cent."""
    vae = make_vae(num_grains)
    grain_map = vae.encode(photos).grain_map
    shares = [(grain_map == grain).float().mean().item() for grain in range(num_grains)]
    assert shares == pytest.approx(vae.config.grain_ratios, abs=0.02)


@KINDS
@pytest.mark.parametrize("fine_ratio", [0.2, 0.5, 0.8])
def test_fine_ratio_is_the_share_of_the_finest_grain(make_vae, photos, num_grains, fine_ratio):
    vae = make_vae(num_grains)
    grain_map = vae.encode(photos, fine_ratio=fine_ratio).grain_map
    assert fine_share(grain_map, num_grains).mean().item() == pytest.approx(fine_ratio, abs=0.02)


def test_coarser_grains_keep_their_proportion_when_a_fine_ratio_is_asked_for(make_vae, photos):
    vae = make_vae(3, grain_ratios=[0.2, 0.4, 0.4])
    grain_map = vae.encode(photos, fine_ratio=0.1).grain_map
    shares = [(grain_map == grain).float().mean().item() for grain in range(3)]
    assert shares == pytest.approx([0.3, 0.6, 0.1], abs=0.02)


def test_ratios_are_equal_shares_when_none_are_configured(make_vae, photos):
    grain_map = make_vae(3, grain_ratios=None).encode(photos).grain_map
    assert [(grain_map == grain).float().mean().item() for grain in range(3)] == pytest.approx([1 / 3] * 3, abs=0.02)


def test_entropy_is_measured_as_the_calibration_was(make_vae, photos, calibrate):
    """Bins and kernel are part of the calibration: thresholds of one kernel mean nothing for another."""
    calibration = calibrate(8) | {"num_bins": 128, "sigma": 0.05}
    calibration["quantiles"] = [value / 2 for value in calibration["quantiles"]]  # below ln 128
    entropy = make_vae(calibration=calibration).encode(photos, fine_ratio=0.5).entropy
    assert torch.equal(entropy, region_entropy(photos, 8, num_bins=128, sigma=0.05))


@KINDS
def test_a_given_map_is_used_as_it_is(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    output = vae.encode(photos, grain_map=grain_map)
    assert torch.equal(output.grain_map, grain_map)
    assert torch.equal(output.latent_dist.layout.grain_map, grain_map)
    assert torch.equal(output.entropy, vae.encode(photos).entropy)


def test_giving_back_the_map_of_an_image_changes_nothing(make_vae, photos):
    vae = make_vae()
    first = vae.encode(photos)
    again = vae.encode(photos, grain_map=first.grain_map)
    assert torch.equal(again.latent_dist.parameters, first.latent_dist.parameters)


def test_fine_ratio_0_and_1_are_exact_on_any_image(make_vae, photos):
    for num_grains in (2, 3):
        vae = make_vae(num_grains)
        for images in (photos, torch.zeros_like(photos)):
            assert (vae.encode(images, fine_ratio=1).grain_map == num_grains - 1).all()
            assert (vae.encode(images, fine_ratio=0).grain_map < num_grains - 1).all()
    assert (make_vae(2).encode(photos, fine_ratio=0).grain_map == 0).all()


def test_all_fine_and_all_coarse_need_no_calibration(make_vae, photos):
    vae = make_vae(2, calibration=None)
    assert (vae.encode(photos, fine_ratio=1.0).grain_map == 1).all()
    assert (vae.encode(photos, fine_ratio=0.0).grain_map == 0).all()
    assert (make_vae(3, calibration=None).encode(photos, fine_ratio=1.0).grain_map == 2).all()


# ---- Hierarchical encoder ----


@KINDS
@torch.no_grad()
def test_every_region_holds_the_codes_of_the_head_of_its_grain(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    heads = vae.encoder(photos)
    assert [head.shape[-1] for head in heads] == [64 // factor for factor in reversed(vae.config.downsample_factors)]
    parameters = vae.encode(photos, grain_map=grain_map).latent_dist.parameters
    cells = 2 ** (num_grains - 1)
    for b, row, column in torch.cartesian_prod(*(torch.arange(size) for size in grain_map.shape)).tolist():
        grain = grain_map[b, row, column].item()
        codes_a_side = 2**grain
        own = heads[grain][b, :, row * codes_a_side :, column * codes_a_side :][:, :codes_a_side, :codes_a_side]
        region = parameters[b, :, row * cells :, column * cells :][:, :cells, :cells]
        assert torch.equal(region, copied(own, cells >> grain))


@KINDS
@torch.no_grad()
def test_a_map_of_one_grain_gives_the_copied_output_of_one_head(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    heads = vae.encoder(photos)
    side = 64 // vae.region_size
    for grain, head in enumerate(heads):
        posterior = vae.encode(photos, grain_map=torch.full((8, side, side), grain)).latent_dist
        assert torch.equal(posterior.mode(), copied(head.chunk(2, dim=1)[0], 2 ** (num_grains - 1 - grain)))
    finest = vae.encode(photos, fine_ratio=1.0).latent_dist
    assert torch.equal(finest.mode(), heads[-1].chunk(2, dim=1)[0])


@KINDS
@torch.no_grad()
def test_a_change_in_one_region_of_the_map_changes_only_its_latents(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    changed_map = grain_map.clone()
    changed_map[3, 1, 2] = (grain_map[3, 1, 2] + 1) % num_grains
    before, after = (vae.encode(photos, grain_map=m).latent_dist.mode() for m in (grain_map, changed_map))
    cells = 2 ** (num_grains - 1)
    differs = (before != after).any(dim=1)
    expected = torch.zeros_like(differs)
    expected[3, cells : 2 * cells, 2 * cells : 3 * cells] = True
    assert differs.any() and not (differs & ~expected).any()


# ---- Tied posterior ----


@KINDS
@torch.no_grad()
def test_mean_variance_and_sample_are_equal_inside_every_code(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    posterior = vae.encode(photos, grain_map=grain_map).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert sample.shape == posterior.mean.shape and not torch.equal(sample, posterior.mean)
    for tensor in (posterior.mean, posterior.std, posterior.logvar, posterior.mode(), sample):
        for _, code in codes(tensor, grain_map, cells=2 ** (num_grains - 1)):
            assert torch.equal(code, code[:, :1, :1].expand_as(code))


@KINDS
@torch.no_grad()
def test_samples_are_the_mean_plus_the_deviation_times_tied_unit_noise(make_vae, photos, num_grains):
    """Every code takes one draw with variance 1, also the coarse ones: an average would have a quarter."""
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    posterior = vae.encode(photos, grain_map=grain_map).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7))
    sample = posterior.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(sample, posterior.mean + posterior.std * tie(noise, grain_map))

    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([(posterior.sample(generator) - posterior.mean) / posterior.std for _ in range(50)])
    grain_of_cell = copied(grain_map, 2 ** (num_grains - 1))[:, None].expand_as(posterior.mean)
    for grain in range(num_grains):
        assert draws[:, grain_of_cell == grain].std().item() == pytest.approx(1, abs=0.05)


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
    grain_map = mixed_map(photos, vae)
    posterior = vae.encode(photos, grain_map=grain_map).latent_dist
    expected = torch.zeros(8, dtype=torch.float64)
    cells = 2 ** (num_grains - 1)
    for (b, mean), (_, logvar) in zip(
        codes(posterior.mean, grain_map, cells), codes(posterior.logvar, grain_map, cells)
    ):
        m, v = mean[:, 0, 0].double(), logvar[:, 0, 0].double()
        expected[b] += 0.5 * (m**2 + v.exp() - 1 - v).sum()
    torch.testing.assert_close(posterior.kl().double(), expected, rtol=1e-5, atol=0)


@KINDS
@torch.no_grad()
def test_kl_of_a_map_of_one_grain_is_the_kl_of_its_head(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    side = 64 // vae.region_size
    for grain, head in enumerate(vae.encoder(photos)):
        posterior = vae.encode(photos, grain_map=torch.full((8, side, side), grain)).latent_dist
        torch.testing.assert_close(posterior.kl(), DiagonalGaussianDistribution(head).kl())


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
    z = posterior.mode()
    assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z).sample)
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


@KINDS
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_mates(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    together = vae.encode(photos)
    others = vae.encode(torch.cat([-photos[:2], photos[2:3], photos.flip(-1)[3:]]))
    alone = vae.encode(photos[2:3])
    for output, index in ((others, slice(2, 3)), (alone, slice(None))):
        assert torch.equal(output.grain_map[index], together.grain_map[2:3])
        torch.testing.assert_close(
            output.latent_dist.parameters[index], together.latent_dist.parameters[2:3], rtol=1e-4, atol=1e-5
        )
    z = together.latent_dist.mode()
    torch.testing.assert_close(vae.decode(z).sample[2:3], vae.decode(z[2:3]).sample, rtol=1e-4, atol=1e-5)
