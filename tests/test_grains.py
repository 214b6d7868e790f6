# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Dynamic Grained Coding: entropy against Eqs. 2-3 written out, and the algebra of split, merge and tie."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers_d2it import region_entropy
from diffusers_d2it.grains import (
    GrainLayout,
    cells_per_region,
    check_fine_ratio,
    check_grain_map,
    check_tied,
    code_weights,
    fine_share,
    grain_map_from_entropy,
    grain_map_to_cells,
    merge,
    split,
    tie,
)


def entropy_by_definition(pixels: torch.Tensor, region_size: int, num_bins: int, sigma: float) -> torch.Tensor:
    """Eqs. 2-3 term by term in float64: every pixel of a region against every bin."""
    pixels = pixels.double()
    luma = (0.299 * pixels[:, 0] + 0.587 * pixels[:, 1] + 0.114 * pixels[:, 2] + 1) / 2
    bins = torch.linspace(0, 1, num_bins, dtype=torch.float64)
    rows, columns = (side // region_size for side in luma.shape[-2:])
    entropy = torch.empty(len(luma), rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            top, left = row * region_size, column * region_size
            region = luma[:, top : top + region_size, left : left + region_size].flatten(1)
            density = torch.exp(-0.5 * ((bins - region[..., None]) / sigma) ** 2).sum(dim=1)
            probability = density / density.sum(dim=-1, keepdim=True)
            entropy[:, row, column] = -torch.special.xlogy(probability, probability).sum(dim=-1)
    return entropy


def random_maps(num_grains: int, shape: tuple[int, int, int] = (3, 4, 6), seed: int = 0) -> torch.Tensor:
    return torch.randint(num_grains, shape, generator=torch.Generator().manual_seed(seed))


def random_latents(grain_map: torch.Tensor, num_grains: int, channels: int = 2, seed: int = 0) -> torch.Tensor:
    batch, height, width = grain_map.shape
    cells = 2 ** (num_grains - 1)
    shape = (batch, channels, height * cells, width * cells)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def code_blocks(latents: torch.Tensor, grain_map: torch.Tensor, num_grains: int) -> list[tuple[int, torch.Tensor]]:
    """(grain, cells of one code (C, side, side)) of every code, by plain loops."""
    cells = 2 ** (num_grains - 1)
    blocks = []
    for b, row, column in torch.cartesian_prod(*(torch.arange(size) for size in grain_map.shape)).tolist():
        grain = grain_map[b, row, column].item()
        side = cells >> grain
        for y in range(row * cells, (row + 1) * cells, side):
            for x in range(column * cells, (column + 1) * cells, side):
                blocks.append((grain, latents[b, :, y : y + side, x : x + side]))
    return blocks


def texture(contrast: float, brightness: float, size: int = 16, seed: int = 0) -> torch.Tensor:
    """A grey noise texture (1, 3, size, size) with the given mean and standard deviation, in [-1, 1]."""
    noise = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return (brightness + contrast * noise).clamp(-1, 1).expand(-1, 3, -1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Entropy
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region_size", "num_bins", "sigma"),
    [
        (8, 256, 0.01),
        (16, 256, 0.01),
        (32, 256, 0.01),
        (16, 512, 0.01),
        (16, 512, 0.005),
        (8, 256, 0.05),
        (16, 128, 0.02),
        (16, 100, 0.02),
        (8, 64, 0.02),  # bins so coarse that most pixels lie far from any
        (8, 64, 0.01),  # P = S ** 2 of the paper for regions of 8 pixels
    ],
)
def test_entropy_of_photos_is_eqs_2_and_3(photos, region_size, num_bins, sigma):
    fast = region_entropy(photos, region_size, num_bins, sigma)
    exact = entropy_by_definition(photos, region_size, num_bins, sigma)
    assert fast.dtype == torch.float32
    assert fast.shape == (8, 64 // region_size, 64 // region_size)
    torch.testing.assert_close(fast.double(), exact, rtol=0, atol=2e-5)


def test_entropy_of_any_luma_is_eqs_2_and_3():
    """Luma between the levels of 8 bit, at the ends of the range, and everywhere between."""
    generator = torch.Generator().manual_seed(0)
    pixels = 2 * torch.rand(4, 3, 32, 48, generator=generator) - 1
    pixels[1] = pixels[1] * 0.02 - 0.98
    pixels[2] = pixels[2] * 0.02 + 0.98
    pixels[3] = pixels[3].sign()
    exact = entropy_by_definition(pixels, 16, 256, 0.01)
    assert exact.shape == (4, 2, 3)
    torch.testing.assert_close(region_entropy(pixels).double(), exact, rtol=0, atol=2e-5)


def test_entropy_of_flat_regions_is_eqs_2_and_3_at_every_luma():
    """The hardest case for a sum over binned pixels: nothing averages, and the kernel may be cut by the range."""
    levels = torch.linspace(-1, 1, 4001).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    exact = entropy_by_definition(levels, 4, 256, 0.01)
    torch.testing.assert_close(region_entropy(levels, 4).double(), exact, rtol=0, atol=2e-5)


def test_bins_that_cannot_sample_the_kernel_are_refused(photos):
    for num_bins, sigma in ((1, 0.01), (8, 0.01), (50, 0.01)):
        with pytest.raises(ValueError, match="num_bins"):
            region_entropy(photos, 16, num_bins, sigma)


def test_defaults_are_the_papers_region_and_kernel(photos):
    assert torch.equal(region_entropy(photos), region_entropy(photos, region_size=16, num_bins=256, sigma=0.01))


@pytest.mark.parametrize("num_bins", [64, 256])
def test_entropy_lies_between_one_level_and_all_levels(photos, num_bins):
    """A single level has the least entropy; every level equally often comes close to ln(num_bins), and stays below."""
    ramp = torch.linspace(-1, 1, 64 * 64).view(1, 1, 64, 64).expand(-1, 3, -1, -1)
    flat_white = torch.ones(1, 3, 64, 64)
    sigma = 0.02
    highest = region_entropy(ramp, 64, num_bins, sigma)
    lowest = region_entropy(flat_white, 64, num_bins, sigma)
    entropy = region_entropy(photos, 16, num_bins, sigma)
    assert math.log(num_bins) - 0.05 < highest.item() <= math.log(num_bins)
    assert (entropy <= math.log(num_bins)).all()
    assert (entropy >= lowest.item() - 2e-5).all()
    assert 0 < lowest.item() < highest.item()


@pytest.mark.parametrize("brightness", [-0.9, -0.5, 0.0, 0.5, 0.9])
def test_flat_regions_score_below_textured_ones_whatever_the_brightness(brightness):
    flat = [
        region_entropy(torch.full((1, 3, 16, 16), level)).item() for level in (-1.0, -0.9, -0.5, 0.0, 0.37, 0.9, 1.0)
    ]
    faint, strong = (region_entropy(texture(contrast, brightness)).item() for contrast in (0.02, 0.1))
    assert max(flat) < faint < strong


def test_dark_textures_score_like_bright_ones():
    dark, bright = (region_entropy(texture(0.04, brightness)) for brightness in (-0.7, 0.7))
    torch.testing.assert_close(dark, bright, rtol=0, atol=0.02)


def test_all_flat_regions_inside_the_range_score_the_same():
    """Half a bin off the grid of bins changes nothing that a threshold could resolve."""
    levels = torch.linspace(-0.8, 0.8, 101)
    entropy = region_entropy(levels.view(-1, 1, 1, 1).expand(-1, 3, 16, 16))
    assert entropy.max() - entropy.min() < 1e-3


def test_only_luma_counts():
    """Colours of equal luma are one flat region; the same colours shuffled in place give the same entropy."""
    red = torch.tensor([0.5, 0.0, 0.0]).view(1, 3, 1, 1).expand(-1, -1, 16, 16)
    grey = torch.full((1, 3, 16, 16), 0.5 * 0.299)
    torch.testing.assert_close(region_entropy(red), region_entropy(grey), rtol=0, atol=2e-5)


def test_entropy_ignores_the_order_of_pixels_in_a_region(photos):
    region = photos[:, :, :16, :16]
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    shuffled = region.flatten(2)[..., order].unflatten(2, (16, 16))
    torch.testing.assert_close(region_entropy(shuffled), region_entropy(region), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dims", [(-1,), (-2,), (-2, -1)])
@pytest.mark.parametrize("region_size", [8, 16])
def test_flipping_photos_flips_the_map_exactly(photos, dims, region_size):
    thresholds = [4.0]
    entropy = region_entropy(photos, region_size)
    flipped = region_entropy(photos.flip(dims), region_size)
    assert torch.equal(
        grain_map_from_entropy(flipped, thresholds), grain_map_from_entropy(entropy, thresholds).flip(dims)
    )
    torch.testing.assert_close(flipped, entropy.flip(dims), rtol=0, atol=1e-5)


def test_entropy_of_an_image_does_not_depend_on_its_batch_mates(photos):
    alone = torch.cat([region_entropy(photo[None]) for photo in photos])
    together = region_entropy(photos)
    with_others = region_entropy(torch.cat([photos[:1], -photos[1:]]))[:1]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(with_others, together[:1], rtol=0, atol=1e-5)


def test_entropy_of_a_region_does_not_depend_on_its_neighbours(photos):
    changed = photos.clone()
    changed[..., 16:] = -changed[..., 16:]
    torch.testing.assert_close(region_entropy(changed)[..., 0], region_entropy(photos)[..., 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_scored_in_float32(photos, dtype):
    low = photos.to(dtype)
    entropy = region_entropy(low)
    assert entropy.dtype == torch.float32
    assert torch.equal(entropy, region_entropy(low.float()))


def test_autocast_does_not_lower_the_precision(photos):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        entropy = region_entropy(photos)
    torch.testing.assert_close(entropy, region_entropy(photos), rtol=0, atol=2e-5)


def test_a_map_is_no_place_for_a_gradient_to_pass(photos):
    assert not region_entropy(photos.requires_grad_()).requires_grad


def test_channels_last_memory_changes_nothing(photos):
    assert torch.equal(region_entropy(photos.to(memory_format=torch.channels_last)), region_entropy(photos))


@pytest.mark.parametrize(("num_bins", "sigma"), [(50, 0.01), (256, 0.001), (1, 0.5)])
def test_bins_too_far_apart_to_sample_the_kernel_are_refused(photos, num_bins, sigma):
    with pytest.raises(ValueError, match=f"`num_bins` {num_bins} .*`sigma` {sigma}"):
        region_entropy(photos, num_bins=num_bins, sigma=sigma)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 32, 32), r"\(B, 3, H, W\).*\(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"\(B, 3, H, W\).*\(1, 1, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), r"\(1, 4, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), r"\(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating point.*uint8"),
        (torch.zeros(1, 3, 40, 32), "multiples of the region size 16, got 40x32"),
        (torch.zeros(1, 3, 32, 24), "multiples of the region size 16, got 32x24"),
        (torch.full((1, 3, 32, 32), 1.01), r"\[-1, 1\].*1\.01"),
        (torch.full((1, 3, 32, 32), -1.01), r"\[-1, 1\].*-1\.01"),
        (torch.full((1, 3, 32, 32), 255.0), r"\[-1, 1\].*255"),
        (torch.zeros(1, 3, 32, 32).index_fill(3, torch.tensor([5]), math.nan), r"\[-1, 1\].*nan"),
        (torch.zeros(1, 3, 32, 32).index_fill(3, torch.tensor([5]), math.inf), r"\[-1, 1\].*inf"),
    ],
)
def test_pixels_that_are_not_images_in_range_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        region_entropy(pixels)


# ---------------------------------------------------------------------------------------------------------------------
# The map
# ---------------------------------------------------------------------------------------------------------------------


def test_a_region_is_finer_than_every_threshold_it_exceeds():
    entropy = torch.tensor([[[1.0, 2.0, 2.5, 3.0, 9.0]]])
    grain_map = grain_map_from_entropy(entropy, [2.0, 3.0])
    assert grain_map.dtype == torch.int64
    assert grain_map.tolist() == [[[0, 0, 1, 1, 2]]]


def test_infinite_thresholds_give_a_single_grain(photos):
    entropy = region_entropy(photos)
    assert (grain_map_from_entropy(entropy, [-math.inf, -math.inf]) == 2).all()
    assert (grain_map_from_entropy(entropy, [-math.inf, math.inf]) == 1).all()
    assert (grain_map_from_entropy(entropy, [math.inf, math.inf]) == 0).all()


def test_higher_thresholds_never_make_a_region_finer(photos):
    entropy = region_entropy(photos, 8)
    levels = entropy.flatten().quantile(torch.linspace(0, 1, 7)).tolist()
    maps = [grain_map_from_entropy(entropy, [low, high]) for low, high in zip(levels, levels[1:])]
    assert all((coarser <= finer).all() for finer, coarser in zip(maps, maps[1:]))
    shares = [fine_share(grain_map, 3).mean().item() for grain_map in maps]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


def test_finer_regions_have_more_entropy(photos):
    entropy = region_entropy(photos, 8)
    grain_map = grain_map_from_entropy(entropy, [3.0, 4.0])
    assert all((grain_map == grain).any() for grain in range(3))
    assert entropy[grain_map == 0].max() < entropy[grain_map == 1].min()
    assert entropy[grain_map == 1].max() < entropy[grain_map == 2].min()


def test_fine_share_is_the_share_of_the_finest_grain():
    grain_map = torch.tensor([[[0, 1], [2, 2]], [[2, 2], [2, 2]], [[0, 0], [1, 1]]])
    assert fine_share(grain_map, 3).tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("fine_ratio", [0, 1, 0.5, np.float32(0.25)])
def test_numbers_from_0_to_1_are_ratios(fine_ratio):
    check_fine_ratio(fine_ratio)


@pytest.mark.parametrize("fine_ratio", [-0.01, 1.01, math.nan, math.inf, "0.5", None, [0.5], torch.tensor([0.5, 0.5])])
def test_anything_else_is_no_ratio(fine_ratio):
    with pytest.raises(ValueError, match=r"`fine_ratio` must be a number in \[0, 1\]"):
        check_fine_ratio(fine_ratio)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_check_grain_map_accepts_every_valid_map(num_grains):
    check_grain_map(random_maps(num_grains), num_grains)
    check_grain_map(torch.zeros(1, 1, 1, dtype=torch.int64), num_grains)


@pytest.mark.parametrize(
    ("grain_map", "message"),
    [
        ([[[0, 1]]], "torch.Tensor, got list"),
        (torch.zeros(1, 2, 2), "int64, got torch.float32"),
        (torch.zeros(1, 2, 2, dtype=torch.int32), "int64, got torch.int32"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "int64, got torch.bool"),
        (torch.zeros(2, 2, dtype=torch.int64), r"\(B, h, w\), got \(2, 2\)"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), r"\(B, h, w\), got \(1, 1, 2, 2\)"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), r"\(B, h, w\), got \(1, 0, 2\)"),
        (torch.tensor([[[0, 2]]]), "0 .*to 1 .*got values from 0 to 2"),
        (torch.tensor([[[-1, 1]]]), "got values from -1 to 1"),
    ],
)
def test_check_grain_map_refuses_and_says_why(grain_map, message):
    with pytest.raises(ValueError, match=message):
        check_grain_map(grain_map, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Codes and cells
# ---------------------------------------------------------------------------------------------------------------------


def test_cells_per_region_is_the_ratio_of_sides():
    grain_map = torch.zeros(2, 3, 5, dtype=torch.int64)
    assert [cells_per_region(torch.zeros(2, 4, 3 * r, 5 * r), grain_map) for r in (1, 2, 4, 8)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 9, 15), "9x15 cells.*3x5 regions.*power of two"),  # ratio 3
        ((2, 4, 6, 20), "6x20 cells"),  # two ratios
        ((2, 4, 7, 10), "7x10 cells"),
        ((2, 4, 2, 3), "2x3 cells"),  # fewer cells than regions
        ((3, 4, 6, 10), "batch size, got 3 and 2"),
    ],
)
def test_cells_per_region_refuses_latents_of_another_size(shape, message):
    with pytest.raises(ValueError, match=message):
        cells_per_region(torch.zeros(shape), torch.zeros(2, 3, 5, dtype=torch.int64))


@pytest.mark.parametrize("num_grains", [2, 3, 4])
def test_split_inverts_merge(num_grains):
    """Every code that its region's grain selects comes back; merge of the split gives the same latents."""
    grain_map = random_maps(num_grains)
    batch, height, width = grain_map.shape
    generator = torch.Generator().manual_seed(0)
    codes = [
        torch.randn(batch, 2, height * 2**grain, width * 2**grain, generator=generator) for grain in range(num_grains)
    ]
    latents = merge(codes, grain_map)
    assert latents.shape == codes[-1].shape
    recovered = split(latents, grain_map)
    for grain, (code, back) in enumerate(zip(codes, recovered)):
        selected = (grain_map_to_cells(grain_map, 2**grain) == grain)[:, None].expand_as(code)
        assert selected.any() and torch.equal(back[selected], code[selected])
    assert torch.equal(merge(recovered, grain_map), latents)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_merge_ignores_codes_of_other_grains(num_grains):
    grain_map = random_maps(num_grains)
    codes = split(random_latents(grain_map, num_grains), grain_map)
    spoilt = [
        torch.where((grain_map_to_cells(grain_map, 2**grain) == grain)[:, None], code, math.nan)
        for grain, code in enumerate(codes)
    ]
    assert torch.equal(merge(spoilt, grain_map), merge(codes, grain_map))


@pytest.mark.parametrize("num_grains", [2, 3])
def test_an_all_fine_merge_is_the_fine_codes_and_an_all_coarse_one_the_copied_coarse_codes(num_grains):
    shape = (2, 3, 5)
    finest = 2 ** (num_grains - 1)
    codes = [torch.randn(2, 4, 3 * 2**grain, 5 * 2**grain) for grain in range(num_grains)]
    for grain, code in enumerate(codes):
        merged = merge(codes, torch.full(shape, grain))
        expected = F.interpolate(code, scale_factor=finest // 2**grain, mode="nearest")
        assert torch.equal(merged, expected)


def test_grain_map_to_cells_copies_every_entry():
    grain_map = torch.tensor([[[0, 1, 2]]])
    assert grain_map_to_cells(grain_map, 2).tolist() == [[[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]]


@pytest.mark.parametrize("num_grains", [2, 3])
def test_tie_gives_every_code_the_value_of_its_top_left_cell(num_grains):
    grain_map = random_maps(num_grains)
    noise = random_latents(grain_map, num_grains)
    before, after = (code_blocks(x, grain_map, num_grains) for x in (noise, tie(noise, grain_map)))
    assert {grain for grain, _ in after} == set(range(num_grains))
    for (_, old), (_, new) in zip(before, after):
        assert torch.equal(new, old[:, :1, :1].expand_as(new))


@pytest.mark.parametrize("num_grains", [2, 3])
def test_tying_twice_is_tying_once(num_grains):
    grain_map = random_maps(num_grains)
    tied = tie(random_latents(grain_map, num_grains), grain_map)
    assert torch.equal(tie(tied, grain_map), tied)
    check_tied(tied, grain_map)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_tied_noise_keeps_the_variance_of_noise(num_grains):
    """Over 20 000 coarse codes the standard error of the variance is 1 %; averaging instead would give 1/4 or less."""
    grain_map = random_maps(num_grains, (8, 50, 50))
    tied = tie(random_latents(grain_map, num_grains, channels=4), grain_map)
    grains = grain_map_to_cells(grain_map, 2 ** (num_grains - 1))[:, None].expand_as(tied)
    for grain in range(num_grains):
        values = tied[grains == grain]
        assert abs(values.var().item() - 1) < 0.05
        assert abs(values.mean().item()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tie_keeps_the_dtype(dtype):
    grain_map = random_maps(2)
    assert tie(random_latents(grain_map, 2).to(dtype), grain_map).dtype == dtype


@pytest.mark.parametrize("num_grains", [2, 3])
def test_average_takes_the_mean_of_every_code_of_one_grain(num_grains):
    grain_map = random_maps(num_grains)
    latents = random_latents(grain_map, num_grains)
    for averaged_grain in range(num_grains):
        averaged = GrainLayout.from_grain_map(grain_map, num_grains).average(latents, averaged_grain)
        blocks = zip(code_blocks(latents, grain_map, num_grains), code_blocks(averaged, grain_map, num_grains))
        for (grain, old), (_, new) in blocks:
            if grain == averaged_grain:
                torch.testing.assert_close(new, old.mean(dim=(1, 2), keepdim=True).expand_as(new))
                assert torch.equal(new, new[:, :1, :1].expand_as(new))
            else:
                assert torch.equal(new, old)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_average_of_every_grain_is_tied_and_leaves_tied_latents_alone(num_grains):
    grain_map = random_maps(num_grains)
    latents = random_latents(grain_map, num_grains)
    layout = GrainLayout.from_grain_map(grain_map, num_grains)
    tied = layout.tie(latents)
    assert torch.equal(tied, tie(latents, grain_map))
    for grain in range(num_grains):
        latents = layout.average(latents, grain)
        torch.testing.assert_close(layout.average(tied, grain), tied)
    check_tied(latents, grain_map)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_check_tied_notices_one_cell_of_one_coarse_code(num_grains):
    grain_map = random_maps(num_grains)
    cells = 2 ** (num_grains - 1)
    tied = tie(random_latents(grain_map, num_grains), grain_map)
    batch, row, column = (grain_map == num_grains - 2).nonzero()[0].tolist()
    broken = tied.clone()
    broken[batch, 0, row * cells + 1, column * cells + 1] += 1e-3
    with pytest.raises(ValueError, match="coarse region"):
        check_tied(broken, grain_map)


def test_check_tied_lets_fine_cells_differ():
    grain_map = torch.ones(1, 3, 5, dtype=torch.int64)
    check_tied(random_latents(grain_map, 2), grain_map)


@pytest.mark.parametrize("num_grains", [2, 3, 4])
def test_code_weights_sum_to_one_over_the_cells_of_a_code(num_grains):
    grain_map = random_maps(num_grains)
    cells = 2 ** (num_grains - 1)
    weights = code_weights(grain_map_to_cells(grain_map, cells), num_grains)
    assert weights.dtype == torch.float32
    blocks = code_blocks(weights[:, None], grain_map, num_grains)
    assert all(block.sum().item() == 1 for _, block in blocks)
    num_codes = sum((4**grain) * (grain_map == grain).sum().item() for grain in range(num_grains))
    assert weights.sum().item() == num_codes == len(blocks)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_num_tokens_are_those_that_a_model_packs(num_grains, make_content_model):
    grain_map = random_maps(num_grains)
    layout = make_content_model(num_grains).prepare_grain_map(grain_map)
    expected = [sum(4**level for level in range(1, grain + 1)) for grain in range(num_grains)]  # of a region
    for image, of_image in zip(grain_map, layout.num_tokens["refine"].tolist()):
        assert of_image == sum(expected[grain] for grain in image.flatten().tolist())
    assert layout.num_tokens["refine"].sum().item() == sum(len(level.tokens) for level in layout.levels)
    assert layout.num_tokens["backbone"].tolist() == [grain_map[0].numel()] * len(grain_map)


def test_a_layout_refuses_latents_of_another_size():
    layout = GrainLayout.from_grain_map(random_maps(2), 2)
    batch, height, width = layout.grain_map.shape
    for shape in ((batch, 4, height, width), (batch + 1, 4, 2 * height, 2 * width), (batch, 2 * height, 2 * width)):
        for act in (layout.tie, lambda latents: layout.average(latents, 0), layout.check_tied):
            with pytest.raises(ValueError, match="`grain_map`"):
                act(torch.zeros(shape))
