# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The codec: one way to latents and back for D2iT's autoencoder and for any other."""

import inspect

import pytest
import torch

from diffusers_d2it.models import LatentCodec
from diffusers_d2it.models.latent_codec import CONFIG_OF_DECODING


MAKERS = ["make_vae", "make_autoencoder_kl"]
BY_CHANNEL = {"latents_mean": [0.1, -0.2, 0.3, 2.0], "latents_std": [0.5, 1.0, 2.0, 4.0]}


@pytest.mark.parametrize("num_grains", [2, 3])
def test_the_posterior_is_that_of_an_all_fine_map(make_vae, load_photos, num_grains):
    vae = make_vae(num_grains)
    codec = LatentCodec(vae)
    moments = codec.encode(load_photos(vae.config.sample_size))
    grain_map = torch.full((8, 4, 4), num_grains - 1)
    mine, whole = codec.posterior(moments), vae.posterior(moments, grain_map)
    assert torch.equal(mine.mode(), whole.mode())
    draws = [one.sample(torch.Generator().manual_seed(0)) for one in (mine, whole)]
    assert torch.equal(*draws) and torch.equal(codec.scale(draws[0]), vae.scale_latents(draws[1]))


def test_latents_of_an_autoencoder_kl_are_those_of_diffusers(make_autoencoder_kl, photos):
    vae = make_autoencoder_kl(scaling_factor=0.5)
    codec = LatentCodec(vae)
    expected = vae.encode(photos).latent_dist.sample(torch.Generator().manual_seed(0))
    posterior = codec.posterior(codec.moments({"pixels": photos}))
    found = codec.scale(posterior.sample(torch.Generator().manual_seed(0)))
    assert torch.equal(found, 0.5 * expected) and found.shape == (8, 4, 16, 16)
    torch.testing.assert_close(codec.decode(found), vae.decode(expected).sample)


@pytest.mark.parametrize("scales", [{}, {"shift_factor": 0.3}, BY_CHANNEL, BY_CHANNEL | {"shift_factor": 9.0}])
def test_scaling_has_an_inverse_and_means_what_the_configuration_says(make_autoencoder_kl, scales):
    codec = LatentCodec(make_autoencoder_kl(scaling_factor=0.7, **scales))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scaled = codec.scale(latents)
    torch.testing.assert_close(codec.unscale(scaled), latents)
    if "latents_mean" in scales:
        for channel in range(4):
            mean, deviation = (scales[key][channel] for key in ("latents_mean", "latents_std"))
            torch.testing.assert_close(scaled[:, channel], 0.7 * (latents[:, channel] - mean) / deviation)
    else:
        torch.testing.assert_close(scaled, 0.7 * (latents - scales.get("shift_factor", 0.0)))


@pytest.mark.parametrize("make", MAKERS)
def test_a_codec_of_a_codec_and_of_a_compiled_autoencoder_is_the_same(request, make):
    vae = request.getfixturevalue(make)()
    codec = LatentCodec(vae)
    assert codec.describe() == LatentCodec(codec).describe() == LatentCodec(torch.compile(vae)).describe()


def test_what_is_no_autoencoder_or_does_not_suit_one_is_refused(make_autoencoder_kl, make_grain_model, photos):
    with pytest.raises(ValueError, match="`vae`.*D2iTGrainModel"):
        LatentCodec(make_grain_model())
    codec = LatentCodec(make_autoencoder_kl())
    for pixels in (photos[:, :1], photos[..., :62], photos[0]):
        with pytest.raises(ValueError, match="`pixels`.* 4"):
            codec.encode(pixels)


@pytest.mark.parametrize("make", MAKERS)
def test_every_entry_of_the_configuration_has_a_part_in_encoding_or_none(request, make):
    """An entry that is new here must be put in one of the lists; without that, it counts as decisive."""
    decisive = (
        "in_channels latent_channels block_out_channels layers_per_block norm_num_groups mid_block_add_attention"
    )
    own = {"make_vae": "downsample_factors", "make_autoencoder_kl": "down_block_types act_fn use_quant_conv"}
    keys = {*inspect.signature(type(request.getfixturevalue(make)())).parameters}
    assert keys - CONFIG_OF_DECODING == {*decisive.split(), *own[make].split()}
