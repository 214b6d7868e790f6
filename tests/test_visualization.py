# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Grain maps over pictures: red where fine, blue where coarse."""

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_d2it import D2iTPipeline, visualize_boundary_map, visualize_grain_map


def redness(picture: PIL.Image.Image) -> np.ndarray:
    """Red minus blue, (H, W)."""
    pixels = np.asarray(picture).astype(int)
    return pixels[..., 0] - pixels[..., 2]


def grey(height: int, width: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (width, height), (128, 128, 128))


@pytest.mark.filterwarnings("error")
def test_an_array_that_cannot_be_written_is_taken_without_a_warning(photo):
    pixels = np.asarray(photo)
    assert not pixels.flags.writeable
    grain_map = torch.zeros(2, 2, dtype=torch.int64)
    assert visualize_grain_map(pixels, grain_map).tobytes() == visualize_grain_map(photo, grain_map).tobytes()


@pytest.fixture
def photo(photos) -> PIL.Image.Image:
    return PIL.Image.fromarray(((photos[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def test_fine_regions_are_red_and_coarse_ones_blue_where_the_map_says():
    """On a map and a picture that are not square, so rows and columns cannot be exchanged."""
    grain_map = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 1]])
    picture = visualize_grain_map(grey(16, 32), grain_map, min_side=1)
    assert picture.size == (32, 16) and picture.mode == "RGB"
    fine = grain_map.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy() == 1
    assert (redness(picture)[fine] > 40).all()
    assert (redness(picture)[~fine] < -40).all()


def test_three_grains_go_from_blue_to_red():
    red = redness(visualize_grain_map(grey(8, 24), torch.tensor([[0, 1, 2]]), num_grains=3, min_side=1))
    coarse, middle, fine = red[0, 0], red[0, 12], red[0, 20]
    assert coarse < middle < fine
    assert abs(middle - (coarse + fine) / 2) <= 1
    assert all((red[:, i * 8 + 2 : (i + 1) * 8] == red[0, i * 8 + 4]).all() for i in range(3))


def test_a_grain_has_its_colour_whatever_other_grains_the_map_holds():
    """The middle of three grains is not red for being the finest one present."""
    alone = redness(visualize_grain_map(grey(8, 16), torch.tensor([[0, 1]]), 3, min_side=1))
    among = redness(visualize_grain_map(grey(8, 24), torch.tensor([[0, 1, 2]]), 3, min_side=1))
    assert np.array_equal(alone, among[:, :16])


def test_as_many_grains_are_assumed_as_the_map_shows():
    for grain_map, num_grains in (([[0, 0]], 2), ([[0, 1]], 2), ([[0, 2]], 3)):
        given = visualize_grain_map(grey(8, 16), torch.tensor(grain_map), num_grains=num_grains)
        assert visualize_grain_map(grey(8, 16), torch.tensor(grain_map)).tobytes() == given.tobytes()


def test_the_picture_shows_through(photo):
    """Inside a region the overlay shifts all pixels alike and keeps most of their contrast."""
    before = np.asarray(photo).astype(float)[:30, :30]
    drawn = visualize_grain_map(photo, torch.tensor([[1, 0], [0, 1]]), min_side=1)
    after = np.asarray(drawn).astype(float)[:30, :30]
    shift = after - 0.7 * before
    assert before.std() > 20
    assert np.ptp(shift, axis=(0, 1)).max() <= 1.01


def test_arrays_tensors_and_a_batch_of_one_give_the_same_picture(photo):
    before = np.asarray(photo).copy()
    grain_map = torch.randint(2, (8, 8), generator=torch.Generator().manual_seed(0))
    pictures = [
        np.asarray(visualize_grain_map(photo, given))
        for given in (grain_map, grain_map[None], grain_map.numpy(), grain_map.int().numpy())
    ]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    assert np.array_equal(np.asarray(D2iTPipeline.visualize_grain_map(photo, grain_map)), pictures[0])
    assert np.array_equal(np.asarray(photo), before), "the given picture is left as it was"


@pytest.mark.parametrize(
    ("grain_map", "message"),
    [
        (torch.full((2, 2), 0.5), "`grain_map`.*float32"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"shape \(2, 2, 2\)"),
        (torch.zeros(4, dtype=torch.int64), r"shape \(4,\)"),
        (torch.zeros(3, 4, dtype=torch.int64), "3x4.*16x32"),
        (torch.zeros(4, 5, dtype=torch.int64), "4x5.*16x32"),
        (torch.full((4, 4), -1), "`grain_map`.*0 to 1.*-1 to -1"),
    ],
)
def test_maps_that_are_no_map_of_the_picture_are_refused(grain_map, message):
    with pytest.raises(ValueError, match=message):
        visualize_grain_map(grey(16, 32), grain_map)


@pytest.mark.parametrize(
    ("boundary_map", "message"),
    [
        (torch.full((4, 4), 1.5), "`boundary_map`.*float32"),
        (torch.full((4, 4), -0.5), "`boundary_map`.*float32"),
        (torch.full((4, 4), float("nan")), "`boundary_map`.*float32"),
        (np.full((4, 4), "much"), "`boundary_map`.*<U4"),
        (torch.zeros(1, 4, 4), r"`boundary_map`.*\(1, 4, 4\)"),
        (torch.zeros(3, 4), "`boundary_map`.*3x4.*16x32"),
    ],
)
def test_boundaries_that_are_none_of_the_picture_are_refused(boundary_map, message):
    visualize_boundary_map(grey(16, 32), torch.zeros(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        visualize_boundary_map(grey(16, 32), boundary_map)
    with pytest.raises(ValueError, match="`boundary_map`.*2.*1"):
        visualize_boundary_map([grey(16, 32)] * 2, [boundary_map])


@pytest.mark.parametrize("dtype", [int, bool, np.int32])
@pytest.mark.parametrize("visualize", [visualize_grain_map, visualize_boundary_map])
def test_pixels_are_uint8_or_from_0_to_1(photo, visualize, dtype):
    pixels = np.asarray(photo)
    drawn = visualize(photo, torch.ones(2, 2, dtype=torch.int64))
    for same in (pixels, torch.tensor(pixels).movedim(-1, 0), (pixels / 255).astype(np.float32)):
        assert visualize(same, torch.ones(2, 2, dtype=torch.int64)).tobytes() == drawn.tobytes()
    for wrong in (pixels.astype(dtype), torch.tensor(pixels.astype(dtype)).movedim(-1, 0)):
        with pytest.raises(ValueError, match=f"`image`.*{wrong.dtype}"):
            visualize(wrong, torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("visualize", [visualize_grain_map, visualize_boundary_map])
def test_the_smallest_side_is_a_whole_number(visualize):
    grain_map = torch.ones(2, 2, dtype=torch.int64)
    for side in (32, np.int64(32), torch.tensor(32)):
        assert visualize(grey(16, 16), grain_map, min_side=side).size == (32, 32)
    for side in (None, 256.0, "256", 0, -1, True):
        with pytest.raises(ValueError, match=f"`min_side`.*{side}"):
            visualize(grey(16, 16), grain_map, min_side=side)


def test_grains_beyond_those_of_the_model_are_refused():
    with pytest.raises(ValueError, match="`grain_map`.*0 to 1.*0 to 2"):
        visualize_grain_map(grey(8, 16), torch.tensor([[0, 2]]), num_grains=2)


def test_small_pictures_are_enlarged_by_a_whole_number_and_large_ones_stay():
    for size, expected in (((64, 64), (256, 256)), ((64, 40), (448, 280)), ((300, 512), (300, 512))):
        assert visualize_grain_map(grey(*size), torch.tensor([[0, 1]])).size == expected[::-1]


def test_fine_areas_have_an_outline_and_nothing_else_has():
    grain_map = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 1]])
    red = redness(visualize_grain_map(grey(96, 96), grain_map, min_side=1))
    strong = red > 150
    assert strong[32:, 32].all() and strong[32, 32:].all()  # its left and upper edge
    assert not strong[:32].any() and not strong[:, :32].any() and not strong[40:, 40:].any()
    assert not (redness(visualize_grain_map(grey(96, 96), torch.ones(3, 3, dtype=torch.int64))) > 150).any()
