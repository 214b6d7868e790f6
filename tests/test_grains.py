# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Dynamic Grained Coding: entropy against Eqs. 2-3 written out, and the algebra of split, merge and tie."""

import math
import re

import pytest
import torch
from grain_maps import check_tied, codes, random_latents, random_map

from diffusers_d2it import region_entropy
from diffusers_d2it.grains import (
    GrainLayout,
    check_grain_map,
    code_weights,
    fine_share,
    grain_map_from_entropy,
    grain_map_to_cells,
    tie,
)


KINDS = pytest.mark.parametrize("num_grains", [2, 3])


# ---- Entropy ----


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


@pytest.mark.parametrize(
    ("region_size", "num_bins", "sigma"),
    [
        (8, 256, 0.01),
        (32, 512, 0.005),
        (8, 256, 0.05),
        (16, 100, 0.02),
        (8, 64, 0.01),  # P = S ** 2 of the paper for regions of 8 pixels: most of them lie far from any bin
    ],
)
def test_entropy_of_photos_is_eqs_2_and_3(photos, region_size, num_bins, sigma):
    photos = photos[:3]
    fast = region_entropy(photos, region_size, num_bins, sigma)
    exact = entropy_by_definition(photos, region_size, num_bins, sigma)
    assert fast.dtype == torch.float32
    assert fast.shape == (3, 64 // region_size, 64 // region_size)
    torch.testing.assert_close(fast.double(), exact, rtol=0, atol=2e-5)


def test_entropy_of_any_luma_is_eqs_2_and_3():
    """Between the levels of 8 bit, at the ends of the range, and everywhere between; with the paper's settings."""
    pixels = 2 * torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(0)) - 1
    pixels[1] = pixels[1] * 0.02 - 0.98
    pixels[2] = pixels[2] * 0.02 + 0.98
    pixels[3] = pixels[3].sign()
    exact = entropy_by_definition(pixels, 16, 256, 0.01)
    assert exact.shape == (4, 2, 3)
    torch.testing.assert_close(region_entropy(pixels).double(), exact, rtol=0, atol=2e-5)
    # A flat region is the hardest: nothing averages, and the kernel may be cut by the range
    levels = torch.linspace(-1, 1, 4001).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    exact = entropy_by_definition(levels, 1, 256, 0.01)
    torch.testing.assert_close(region_entropy(levels, 1).double(), exact, rtol=0, atol=2e-5)


def test_entropy_lies_between_one_level_and_all_levels(photos):
    """A single level has the least entropy; every level equally often comes close to ln(num_bins), and stays below."""
    ramp = torch.linspace(-1, 1, 64 * 64).view(1, 1, 64, 64).expand(-1, 3, -1, -1)
    lowest, highest = (region_entropy(image, 64, 64, 0.02).item() for image in (torch.ones(1, 3, 64, 64), ramp))
    assert 0 < lowest < math.log(64) - 0.05 < highest <= math.log(64)
    entropy = region_entropy(photos, 16, 64, 0.02)
    assert lowest - 2e-5 <= entropy.min() and entropy.max() <= math.log(64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_entropy_is_float32_whatever_comes_in(photos, dtype):
    low = photos.to(dtype)
    expected = region_entropy(low.float())
    assert torch.equal(region_entropy(low), expected)
    assert torch.equal(region_entropy(low.float().to(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", dtype=dtype):
        entropy = region_entropy(low.float().requires_grad_())
    assert entropy.dtype == torch.float32 and not entropy.requires_grad
    torch.testing.assert_close(entropy, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("num_bins", "sigma"), [(50, 0.01), (256, 0.001), (1, 0.5)])
def test_bins_too_far_apart_to_sample_the_kernel_are_refused(photos, num_bins, sigma):
    with pytest.raises(ValueError, match=f"`num_bins` {num_bins} .*`sigma` {sigma}"):
        region_entropy(photos, num_bins=num_bins, sigma=sigma)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 32, 32), r"\(B, 3, H, W\).*\(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"\(B, 3, H, W\).*\(1, 1, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), r"\(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 40, 32), "16.*40 and 32"),
        (torch.zeros(1, 3, 32, 24), "16.*32 and 24"),
        (torch.full((1, 3, 32, 32), 1.01), r"\[-1, 1\].*1\.01"),
        (torch.full((1, 3, 32, 32), -1.01), r"\[-1, 1\].*-1\.01"),
        (torch.zeros(1, 3, 32, 32).index_fill(3, torch.tensor([5]), math.nan), r"\[-1, 1\].*nan"),
        (torch.zeros(1, 3, 32, 32).index_fill(3, torch.tensor([5]), math.inf), r"\[-1, 1\].*inf"),
    ],
)
def test_pixels_that_are_not_images_in_range_are_refused(pixels, message):
    with pytest.raises(ValueError, match="`pixels`.*" + message):
        region_entropy(pixels)


# ---- The map ----


def test_a_region_is_finer_than_every_threshold_it_exceeds():
    entropy = torch.tensor([[[1.0, 2.0, 2.5, 3.0, 9.0]]])
    grain_map = grain_map_from_entropy(entropy, [2.0, 3.0])
    assert grain_map.dtype == torch.int64
    assert grain_map.tolist() == [[[0, 0, 1, 1, 2]]]
    for thresholds, grain in (([-math.inf, -math.inf], 2), ([-math.inf, math.inf], 1), ([math.inf, math.inf], 0)):
        assert (grain_map_from_entropy(entropy, thresholds) == grain).all()


def test_fine_share_is_the_share_of_the_finest_grain():
    grain_map = torch.tensor([[[0, 1], [2, 2]], [[2, 2], [2, 2]], [[0, 0], [1, 1]]])
    assert fine_share(grain_map, 3).tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parametrize(
    ("grain_map", "message"),
    [
        ([[[0, 1]]], "list"),
        (torch.zeros(1, 2, 2), "int64.*float32"),
        (torch.zeros(1, 2, 2, dtype=torch.int32), "int64.*int32"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "int64.*bool"),
        (torch.zeros(2, 2, dtype=torch.int64), r"\(B, h, w\).*\(2, 2\)"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), r"\(1, 1, 2, 2\)"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), r"\(1, 0, 2\)"),
        (torch.tensor([[[0, 2]]]), "0 .*1 .*0 to 2"),
        (torch.tensor([[[-1, 1]]]), "-1 to 1"),
    ],
)
def test_maps_are_int64_with_grains_in_range(grain_map, message):
    check_grain_map(random_map(2), 2)
    check_grain_map(torch.zeros(1, 1, 1, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="`grain_map`.*" + message):
        check_grain_map(grain_map, 2)


# ---- Codes and cells ----


def test_grain_map_to_cells_copies_every_entry():
    grain_map = torch.tensor([[[0, 1, 2]]])
    assert grain_map_to_cells(grain_map, 2).tolist() == [[[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]]


@pytest.mark.parametrize("num_grains", [2, 3, 4])
def test_merge_copies_each_code_of_its_grain_and_split_gives_it_back(num_grains):
    grain_map = random_map(num_grains)
    layout = GrainLayout.from_grain_map(grain_map, num_grains)
    batch, height, width = grain_map.shape
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(batch, 2, height << grain, width << grain, generator=generator) for grain in range(num_grains)
    ]
    chosen = [(grain_map_to_cells(grain_map, 1 << grain) == grain)[:, None] for grain in range(num_grains)]
    # Codes of other grains are never looked at, and it does not matter how the codes lie in memory
    only_chosen = [torch.where(mask, code, math.nan) for mask, code in zip(chosen, given)]
    latents = layout.merge([code.contiguous(memory_format=torch.channels_last) for code in only_chosen])
    assert latents.shape == given[-1].shape and latents.is_contiguous()
    for image, grain, row, column, block in codes(latents, grain_map, num_grains):
        assert (block == given[grain][image, :, row, column, None, None]).all()
    recovered = layout.split(latents)
    for mask, code, back in zip(chosen, given, recovered, strict=True):
        assert torch.equal(back.where(mask, 0), code.where(mask, 0))
    assert torch.equal(layout.merge(recovered), latents)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@KINDS
def test_tie_gives_every_code_the_value_of_its_top_left_cell(num_grains, dtype):
    """So the variance of noise stays; a mean would shrink it."""
    grain_map = random_map(num_grains)
    noise = random_latents(grain_map, num_grains).to(dtype)
    tied = tie(noise, grain_map)
    assert tied.dtype == dtype
    for (*_, old), (*_, new) in zip(codes(noise, grain_map, num_grains), codes(tied, grain_map, num_grains)):
        assert torch.equal(new, old[:, :1, :1].expand_as(new))
    assert torch.equal(tie(tied, grain_map), tied)
    assert torch.equal(GrainLayout.from_grain_map(grain_map, num_grains).tie(noise), tied)


@KINDS
def test_average_takes_the_mean_of_every_code_of_one_grain(num_grains):
    grain_map = random_map(num_grains)
    latents = random_latents(grain_map, num_grains)
    layout = GrainLayout.from_grain_map(grain_map, num_grains)
    all_averaged, tied = latents, layout.tie(latents)
    for averaged_grain in range(num_grains):
        averaged = layout.average(latents, averaged_grain)
        for (_, grain, *_, old), (*_, new) in zip(
            codes(latents, grain_map, num_grains), codes(averaged, grain_map, num_grains)
        ):
            expected = old.mean(dim=(1, 2), keepdim=True).expand_as(old) if grain == averaged_grain else old
            torch.testing.assert_close(new, expected)
        all_averaged = layout.average(all_averaged, averaged_grain)
        torch.testing.assert_close(layout.average(tied, averaged_grain), tied)
    check_tied(all_averaged, grain_map)


@KINDS
def test_check_tied_notices_one_cell_of_one_coarse_code(num_grains):
    grain_map = random_map(num_grains)
    cells = 2 ** (num_grains - 1)
    tied = tie(random_latents(grain_map, num_grains), grain_map)
    check_tied(tied, grain_map)
    image, row, column = (grain_map == num_grains - 2).nonzero()[0].tolist()
    broken = tied.clone()
    broken[image, 0, row * cells + 1, column * cells + 1] += 1e-3
    with pytest.raises(ValueError, match="tie"):
        check_tied(broken, grain_map)
    check_tied(torch.full_like(tied, math.nan), grain_map)  # another fault
    check_tied(random_latents(grain_map, num_grains), torch.full_like(grain_map, num_grains - 1))


@pytest.mark.parametrize("num_grains", [2, 3, 4])
def test_code_weights_sum_to_one_over_the_cells_of_a_code(num_grains):
    grain_map = random_map(num_grains)
    weights = code_weights(grain_map_to_cells(grain_map, 2 ** (num_grains - 1)), num_grains)
    assert weights.dtype == torch.float32
    assert all(block.sum() == 1 for *_, block in codes(weights[:, None], grain_map, num_grains))


@KINDS
def test_num_tokens_are_those_that_a_model_packs(num_grains, make_content_model):
    grain_map = random_map(num_grains)
    layout = make_content_model(num_grains).prepare_grain_map(grain_map)
    expected = [sum(4**level for level in range(1, grain + 1)) for grain in range(num_grains)]  # of a region
    for image, of_image in zip(grain_map, layout.num_tokens["refine"].tolist()):
        assert of_image == sum(expected[grain] for grain in image.flatten().tolist())
    assert layout.num_tokens["refine"].sum().item() == sum(len(level.tokens) for level in layout.levels)
    assert layout.num_tokens["backbone"].tolist() == [grain_map[0].numel()] * len(grain_map)


def test_a_layout_refuses_latents_of_another_size():
    layout = GrainLayout.from_grain_map(random_map(2), 2)
    batch, height, width = layout.grain_map.shape
    for shape in ((batch, 4, height, width), (batch + 1, 4, 2 * height, 2 * width), (batch, 2 * height, 2 * width)):
        for act in (layout.tie, lambda latents: layout.average(latents, 0), layout.check_tied, layout.split):
            with pytest.raises(ValueError, match="`grain_map`"):
                act(torch.zeros(shape))
        with pytest.raises(ValueError, match="`grain_map`"):
            layout.merge([torch.zeros(shape)] * 2)


def test_a_single_use_finds_the_cells_of_a_region_or_refuses():
    grain_map = torch.zeros(2, 3, 5, dtype=torch.int64)
    for cells in (1, 2, 4, 8):
        latents = torch.randn(2, 4, 3 * cells, 5 * cells, generator=torch.Generator().manual_seed(0))
        top_left = latents[..., ::cells, ::cells].repeat_interleave(cells, -1).repeat_interleave(cells, -2)
        assert torch.equal(tie(latents, grain_map), top_left)
    for wrong in ([[[0, 1], [1, 0]]], grain_map[:, :0, :0], grain_map[0], grain_map.float(), grain_map - 1):
        with pytest.raises(ValueError, match="`grain_map`"):
            tie(torch.zeros(2, 4, 6, 10), wrong)
    # Ratio 3, two ratios, no whole ratio, fewer cells than regions, another batch
    for shape in ((2, 4, 9, 15), (2, 4, 6, 20), (2, 4, 7, 10), (2, 4, 2, 3), (3, 4, 6, 10)):
        with pytest.raises(ValueError, match=f"{re.escape(str(shape))}.*3x5"):
            tie(torch.zeros(shape), grain_map)
