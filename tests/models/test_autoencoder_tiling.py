# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The Dynamic VAE in little memory: slices of a batch, tiles of an image."""

import pytest
import torch
from grain_maps import check_tied, random_map


KINDS = pytest.mark.parametrize("num_grains", [2, 3])


@KINDS
@torch.no_grad()
def test_slicing_gives_every_image_what_it_gets_alone(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    alone = [vae.encode(photo[None]) for photo in photos]
    decoded_alone = [vae.decode(one.latent_dist.mode()).sample for one in alone]
    whole = vae.encode(photos).latent_dist
    vae.enable_slicing()
    sliced = vae.encode(photos)
    assert torch.equal(sliced.latent_dist.parameters, torch.cat([one.latent_dist.parameters for one in alone]))
    assert torch.equal(vae.decode(sliced.latent_dist.mode()).sample, torch.cat(decoded_alone))
    assert torch.equal(sliced.grain_map, torch.cat([one.grain_map for one in alone]))
    torch.testing.assert_close(sliced.latent_dist.parameters, whole.parameters, rtol=1e-4, atol=1e-5)
    vae.disable_slicing()
    assert torch.equal(vae.encode(photos).latent_dist.parameters, whole.parameters)


@KINDS
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (32, 80), (112, 48)])
@torch.no_grad()
def test_tiles_give_tied_latents_and_images_of_the_right_size(make_vae, load_photos, num_grains, height, width):
    vae = make_vae(num_grains, sample_size=32)
    x = load_photos(128)[:2, :, :height, :width]
    untiled = vae.encode(x)
    z = untiled.latent_dist.mode()
    expected = vae.decode(z).sample
    vae.enable_tiling()
    tiled = vae.encode(x)
    assert torch.equal(tiled.grain_map, untiled.grain_map) and torch.equal(tiled.entropy, untiled.entropy)
    assert tiled.latent_dist.mean.shape == z.shape
    for tensor in (tiled.latent_dist.parameters, tiled.latent_dist.sample(torch.Generator().manual_seed(0))):
        check_tied(tensor, tiled.grain_map)
    decoded = vae.decode(z).sample
    assert decoded.shape == x.shape and decoded.isfinite().all()
    if (height, width) == (32, 32):  # one tile
        assert torch.equal(tiled.latent_dist.parameters, untiled.latent_dist.parameters)
        assert torch.equal(decoded, expected)
    vae.enable_slicing()
    both = vae.encode(x).latent_dist
    torch.testing.assert_close(both.parameters, tiled.latent_dist.parameters, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(z).sample, decoded, rtol=1e-4, atol=1e-5)


def tiles_along(side: int, tile: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(start and end of a tile, start and end of what it alone covers) along one side; the last tile may be short.

    It is the first that reaches the end: another inside of it would put values of little context over good ones.
    """
    starts = [start for start in range(0, side, stride) if start == 0 or start + tile - stride < side]
    ends = [min(start + tile, side) for start in starts]
    return [
        (start, end, max([start, *ends[:i]]), min([end, *starts[i + 1 :]]))
        for i, (start, end) in enumerate(zip(starts, ends))
    ]


def crop(tensor: torch.Tensor, top: int, bottom: int, left: int, right: int, unit: int = 1) -> torch.Tensor:
    """A window of a tensor whose cells are `unit` pixels wide, given in pixels."""
    return tensor[..., top // unit : bottom // unit, left // unit : right // unit]


@KINDS
@pytest.mark.parametrize(("height", "width"), [(96, 128), (64, 112), (32, 128)])
@torch.no_grad()
def test_away_from_seams_a_tiled_image_is_what_its_tiles_are_alone(make_vae, load_photos, num_grains, height, width):
    """Exact, while closeness to the untiled image is not to be had: norms and attention look at the whole tile."""
    vae = make_vae(num_grains, sample_size=64)
    x = load_photos(128)[:2, :, :height, :width]
    grain_map = random_map(num_grains, (2, height // vae.region_size, width // vae.region_size))
    vae.enable_tiling()
    parameters = vae.encode(x, grain_map=grain_map).latent_dist.parameters
    z = parameters[:, :4]
    decoded = vae.decode(z).sample
    vae.disable_tiling()
    covered = 0
    for top, bottom, *rows in tiles_along(height, tile=64, stride=48):
        for left, right, *columns in tiles_along(width, tile=64, stride=48):
            window = (top, bottom, left, right)
            alone = (*rows, *columns)
            inside = (rows[0] - top, rows[1] - top, columns[0] - left, columns[1] - left)
            part_map = crop(grain_map, *window, unit=vae.region_size)
            part = vae.encode(crop(x, *window), grain_map=part_map).latent_dist.parameters
            torch.testing.assert_close(crop(parameters, *alone, unit=4), crop(part, *inside, unit=4))
            part = vae.decode(crop(z, *window, unit=4)).sample
            torch.testing.assert_close(crop(decoded, *alone), crop(part, *inside))
            covered += crop(decoded, *alone)[0, 0].numel()
    assert covered >= 0.3 * height * width  # the tiles do have places of their own


@torch.no_grad()
def test_where_two_tiles_meet_one_fades_into_the_other(make_vae, load_photos):
    """Across the overlap the share of the later tile rises, from nearly none to nearly all."""
    vae = make_vae(2, sample_size=64)
    z = vae.encode(load_photos(128)[:, :, :48, :96]).latent_dist.mode()  # tiles 0 ... 64 and 48 ... 96
    before, after = vae.decode(z[..., :16]).sample[..., 48:], vae.decode(z[..., 12:]).sample[..., :16]
    vae.enable_tiling()
    blend = vae.decode(z).sample[..., 48:64]
    difference = after - before
    share = torch.arange(1, 17) / 17  # of the later one, column by column
    torch.testing.assert_close(blend, before + share * difference, rtol=1e-4, atol=1e-5)
