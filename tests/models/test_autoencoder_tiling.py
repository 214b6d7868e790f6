# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The Dynamic VAE in little memory: slices of a batch, tiles of an image."""

import pytest
import torch

from diffusers_d2it.grains import check_tied


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
@torch.no_grad()
def test_tiling_an_image_of_one_tile_changes_nothing(make_vae, photos, num_grains):
    vae = make_vae(num_grains, sample_size=64)
    z = vae.encode(photos).latent_dist
    decoded = vae.decode(z.mode()).sample
    vae.enable_tiling()
    assert torch.equal(vae.encode(photos).latent_dist.parameters, z.parameters)
    assert torch.equal(vae.decode(z.mode()).sample, decoded)


@KINDS
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (32, 80), (112, 48)])
@torch.no_grad()
def test_several_tiles_give_tied_latents_and_images_of_the_right_size(
    make_vae, load_photos, num_grains, height, width
):
    vae = make_vae(num_grains, sample_size=32)
    x = load_photos(128)[:2, :, :height, :width]
    untiled = vae.encode(x)
    vae.enable_tiling()
    tiled = vae.encode(x)
    assert torch.equal(tiled.grain_map, untiled.grain_map)
    assert torch.equal(tiled.entropy, untiled.entropy)
    assert tiled.latent_dist.mean.shape == untiled.latent_dist.mean.shape == (2, 4, height // 4, width // 4)
    sample = tiled.latent_dist.sample(torch.Generator().manual_seed(0))
    for tensor in (tiled.latent_dist.parameters, sample):
        check_tied(tensor, tiled.grain_map)
    decoded = vae.decode(tiled.latent_dist.mode()).sample
    assert decoded.shape == x.shape and decoded.isfinite().all()


def tiles_along(side: int, tile: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(start and end of a tile, start and end of what it alone covers) along one side; the last tile may be short."""
    starts = list(range(0, side, stride))
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
    generator = torch.Generator().manual_seed(0)
    grain_map = torch.randint(
        num_grains, (2, height // vae.region_size, width // vae.region_size), generator=generator
    )
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
    assert (blend >= torch.minimum(before, after) - 1e-5).all() and (
        blend <= torch.maximum(before, after) + 1e-5
    ).all()
    difference = after - before
    share = ((blend - before) * difference).sum(dim=(0, 1, 2)) / difference.pow(2).sum(dim=(0, 1, 2))
    assert (share.diff() > 0).all()
    assert 0 < share[0] < 0.2 and 0.8 < share[-1] < 1


@torch.no_grad()
def test_a_side_of_one_tile_is_not_tiled(make_vae, load_photos):
    """A second row of tiles inside the first one would cost time and put rows with little context over good ones."""
    vae = make_vae(2, sample_size=64)
    x = load_photos(128)[:2, :, :64, :112]  # one row of tiles, 0 ... 64 and 48 ... 112
    left = vae.encode(x[..., :64], grain_map=torch.ones(2, 8, 8, dtype=torch.int64)).latent_dist.parameters
    decoded_left = vae.decode(left[:, :4]).sample
    vae.enable_tiling()
    tiled = vae.encode(x, grain_map=torch.ones(2, 8, 14, dtype=torch.int64)).latent_dist.parameters
    torch.testing.assert_close(tiled[..., :12], left[..., :12])
    z = torch.cat([left[:, :4], tiled[:, :4, :, 16:]], dim=-1)
    torch.testing.assert_close(vae.decode(z).sample[..., :48], decoded_left[..., :48])


@torch.no_grad()
def test_slicing_and_tiling_together_are_tiling(make_vae, load_photos):
    vae = make_vae(2, sample_size=32)
    x = load_photos(64)[:2]
    vae.enable_tiling()
    tiled = vae.encode(x).latent_dist
    decoded = vae.decode(tiled.mode()).sample
    vae.enable_slicing()
    both = vae.encode(x).latent_dist
    torch.testing.assert_close(both.parameters, tiled.parameters, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(tiled.mode()).sample, decoded, rtol=1e-4, atol=1e-5)
