# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Maps and images of a report: what is compared differs, and nothing else does."""

import pytest
import torch
from diffusers import DDPMScheduler
from photographs import load_photographs

from diffusers_d2it import D2iTPipeline
from diffusers_d2it.evaluation.map_sources import (
    Sampling,
    draw_grain_maps,
    image_generators,
    over_images,
    sample_images,
    true_grain_maps,
)
from diffusers_d2it.pixels import to_uint8


SAMPLING = Sampling(num_inference_steps=2, grain_num_inference_steps=3, batch_size=3)
LABELS = torch.tensor([1, 1, 2, 3, 5, 8, 9, 0])


@pytest.fixture(scope="module")
def pipe(make_pipeline) -> D2iTPipeline:
    pipe = make_pipeline()
    with torch.no_grad():  # the tiny models hardly look at labels
        pipe.grain_model.label_embed.weight *= 100
        pipe.transformer.label_embed.weight *= 10
    return pipe


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Eight photographs, uint8 (8, 3, 32, 32)."""
    return to_uint8(load_photographs(32))


@pytest.fixture(scope="module")
def true_maps(pipe, images) -> torch.Tensor:
    return true_grain_maps(pipe, images, batch_size=3)


def draw(pipe, source, true_maps, labels=LABELS, **sampling) -> torch.Tensor:
    return draw_grain_maps(pipe, source, true_maps, labels, Sampling(**(vars(SAMPLING) | sampling)))


# ---------------------------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------------------------


def test_true_maps_are_those_that_the_autoencoder_encodes(pipe, images, true_maps):
    assert torch.equal(true_maps, pipe.vae.encode(images / 127.5 - 1).grain_map)
    assert torch.equal(draw(pipe, "true", true_maps), true_maps)


def test_uniform_maps(make_pipeline, true_maps):
    pipe = make_pipeline(num_grains=3)
    assert draw(pipe, "coarse", true_maps).unique().tolist() == [0]
    assert draw(pipe, "fine", true_maps).unique().tolist() == [2]


@pytest.mark.parametrize("num_grains", [2, 3])
def test_random_maps_have_the_share_of_the_true_ones(make_pipeline, num_grains):
    true_maps = torch.zeros(400, 4, 4, dtype=torch.int64)
    true_maps[:, :1] = num_grains - 1  # a quarter of the regions
    pipe = make_pipeline(num_grains=num_grains)
    maps = draw(pipe, "random", true_maps, labels=LABELS.repeat(50))
    shares = torch.bincount(maps.flatten(), minlength=num_grains) / maps.numel()
    expected = torch.tensor([0.75 / (num_grains - 1)] * (num_grains - 1) + [0.25])
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)
    assert maps.flatten(1).unique(dim=0).shape[0] > 300  # no map for all of them


def test_predicted_maps_belong_to_image_and_seed(pipe, true_maps):
    maps = draw(pipe, "predicted", true_maps)
    assert torch.equal(maps, draw(pipe, "predicted", true_maps, batch_size=8))
    assert torch.equal(maps[:5], draw(pipe, "predicted", true_maps[:5], labels=LABELS[:5]))
    assert not torch.equal(maps, draw(pipe, "predicted", true_maps, seed=1))
    ratio = draw_grain_maps(pipe, "predicted", true_maps, LABELS, SAMPLING, fine_ratio=0.25)
    assert ratio.flatten(1).sum(dim=1).tolist() == [4] * 8


def test_predicted_maps_are_of_their_label(pipe, true_maps):
    other = LABELS.clone()
    other[4] = 7
    differs = (draw(pipe, "predicted", true_maps) != draw(pipe, "predicted", true_maps, other)).flatten(1).any(dim=1)
    assert differs.nonzero().flatten().tolist() == [4]


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_image(pipe, true_maps):
    images = sample_images(pipe, true_maps, LABELS, SAMPLING)
    assert images.dtype == torch.uint8 and images.shape == (8, 3, 32, 32)
    whole = sample_images(pipe, true_maps, LABELS, Sampling(**(vars(SAMPLING) | {"batch_size": 8})))
    assert (images.int() - whole.int()).abs().max() <= 1  # batches differ by rounding alone
    assert torch.equal(images[:6], sample_images(pipe, true_maps[:6], LABELS[:6], SAMPLING))
    maps = true_maps.clone()
    maps[4] = 1 - maps[4]  # changes one image
    differs = (images != sample_images(pipe, maps, LABELS, SAMPLING)).flatten(1).any(dim=1)
    assert differs.nonzero().flatten().tolist() == [4]


def test_images_are_those_of_the_pipeline(pipe, true_maps):
    latents = torch.randn(1, 4, 8, 8, generator=image_generators(SAMPLING.seed, 0, slice(5, 6))[0])
    expected = pipe(
        LABELS[5:6].tolist(),
        grain_map=true_maps[5:6],
        latents=latents,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="pil",
    ).images[0]
    image = sample_images(pipe, true_maps, LABELS, SAMPLING)[5]
    difference = image.int() - torch.tensor(list(expected.tobytes())).view(32, 32, 3).movedim(-1, 0)
    assert difference.abs().max() <= 1


def test_noise_of_a_scheduler_is_that_of_the_image_too(make_pipeline, true_maps):
    pipe = make_pipeline(scheduler=DDPMScheduler(clip_sample=False))
    images = sample_images(pipe, true_maps, LABELS, SAMPLING)
    assert torch.equal(images, sample_images(pipe, true_maps, LABELS, SAMPLING))
    assert not torch.equal(images, sample_images(pipe, true_maps, LABELS, Sampling(**(vars(SAMPLING) | {"seed": 1}))))


def test_unconditional_and_oblong(make_pipeline):
    pipe = make_pipeline(num_classes=None)
    maps = torch.randint(2, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    assert sample_images(pipe, maps, None, SAMPLING).shape == (3, 3, 16, 40)
    assert draw(pipe, "predicted", maps, labels=None).shape == (3, 2, 5)


def test_no_two_images_have_the_same_noise():
    seeds = [g.initial_seed() for purpose in range(3) for g in image_generators(7, purpose, slice(0, 2000))]
    assert len(set(seeds)) == len(seeds)
    assert (
        image_generators(7, 1, slice(5, 9))[2].initial_seed() == image_generators(7, 1, slice(0, 9))[7].initial_seed()
    )


def test_batches_are_handed_out_once():
    seen = []

    def count(images: slice) -> torch.Tensor:
        seen.append((images.start, images.stop))
        return torch.arange(images.start, images.stop) + 1.0

    assert over_images(count, torch.zeros(7), batch_size=3).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert seen == [(0, 3), (3, 6), (6, 7)]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_named(pipe, make_pipeline, images, true_maps):
    with pytest.raises(ValueError, match="`source` must be one of true, predicted, random, coarse, fine, got 'real'"):
        draw(pipe, "real", true_maps)
    with pytest.raises(ValueError, match="has classes and needs `labels`"):
        sample_images(pipe, true_maps, None, SAMPLING)
    with pytest.raises(ValueError, match=r"one for each of 8 images, got \(7,\)"):
        draw(pipe, "random", true_maps, labels=LABELS[:7])
    with pytest.raises(ValueError, match="is unconditional: `labels` must be None"):
        draw(make_pipeline(num_classes=None), "random", true_maps)
    with pytest.raises(ValueError, match="`pipe` has no grain model"):
        draw(make_pipeline(grain_model=None, grain_scheduler=None), "predicted", true_maps)
    for wrong in (images.float(), images[0], images[:0]):
        with pytest.raises(ValueError, match=r"`images` must be uint8 \(N, 3, H, W\)"):
            true_grain_maps(pipe, wrong)
