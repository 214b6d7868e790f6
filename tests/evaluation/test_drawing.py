# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Maps and images of a report: what is compared differs, and nothing else does."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from metric_inputs import refused

from diffusers_d2it import D2iTPipeline
from diffusers_d2it.evaluation import Drawing


LABELS = torch.tensor([1, 1, 2, 3, 5, 8, 9, 0])


def drawing_of(pipe: D2iTPipeline, labels: torch.Tensor | None = LABELS, **settings) -> Drawing:
    return Drawing(
        pipe, labels, **{"num_inference_steps": 2, "grain_num_inference_steps": 3, "batch_size": 3} | settings
    )


@pytest.fixture(scope="module")
def drawing(make_pipeline) -> Drawing:
    pipe = make_pipeline()
    with torch.no_grad():  # the tiny models hardly look at labels
        pipe.grain_model.label_embed.weight *= 100
        pipe.transformer.label_embed.weight *= 10
    return drawing_of(pipe)


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """The numbers of the images that differ."""
    return (before != after).flatten(1).any(dim=1).nonzero().flatten().tolist()


def test_true_maps_are_those_that_the_autoencoder_encodes(drawing, images, true_maps):
    assert torch.equal(true_maps, drawing.pipe.vae.encode(images / 127.5 - 1).grain_map)
    assert torch.equal(drawing.maps("true", true_maps), true_maps)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_uniform_maps_and_random_ones_with_the_share_of_the_true_ones(make_pipeline, num_grains):
    true_maps = torch.zeros(400, 4, 4, dtype=torch.int64)
    true_maps[:, :1] = num_grains - 1  # a quarter of the regions
    drawing = drawing_of(make_pipeline(num_grains=num_grains), LABELS.repeat(50))
    assert drawing.maps("coarse", true_maps).unique().tolist() == [0]
    assert drawing.maps("fine", true_maps).unique().tolist() == [num_grains - 1]
    maps = drawing.maps("random", true_maps)
    shares = torch.bincount(maps.flatten(), minlength=num_grains) / maps.numel()
    expected = torch.tensor([0.75 / (num_grains - 1)] * (num_grains - 1) + [0.25])
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)
    assert maps.flatten(1).unique(dim=0).shape[0] > 300  # no map for all of them


def test_predicted_maps_belong_to_image_seed_and_label(drawing, true_maps):
    maps = drawing.maps("predicted", true_maps)
    assert torch.equal(maps, replace(drawing, batch_size=8).maps("predicted", true_maps))
    assert torch.equal(maps[:5], replace(drawing, labels=LABELS[:5]).maps("predicted", true_maps[:5]))
    assert changed(maps, replace(drawing, seed=1).maps("predicted", true_maps))
    other = LABELS.clone()
    other[4] = 7
    assert changed(maps, replace(drawing, labels=other).maps("predicted", true_maps)) == [4]


def test_noise_is_that_of_the_image(drawing, true_maps):
    images = drawing.images(true_maps)
    assert images.dtype == torch.uint8 and images.shape == (8, 3, 32, 32)
    whole = replace(drawing, batch_size=8).images(true_maps)
    assert (images.int() - whole.int()).abs().max() <= 1  # batches differ by rounding alone
    assert torch.equal(images[:6], replace(drawing, labels=LABELS[:6]).images(true_maps[:6]))
    maps = true_maps.clone()
    maps[4] = 1 - maps[4]
    assert changed(images, drawing.images(maps)) == [4]


def test_images_are_those_of_the_pipeline(drawing, true_maps):
    latents = torch.randn(1, 4, 8, 8, generator=drawing.generators(0, slice(5, 6))[0])
    how = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pil"}
    expected = drawing.pipe(LABELS[5:6].tolist(), grain_map=true_maps[5:6], latents=latents, **how).images[0]
    image = drawing.images(true_maps)[5]
    difference = image.int() - torch.tensor(list(expected.tobytes())).view(32, 32, 3).movedim(-1, 0)
    assert difference.abs().max() <= 1


def test_noise_of_a_scheduler_is_that_of_the_image_too(make_pipeline, true_maps):
    drawing = drawing_of(make_pipeline(scheduler=DDPMScheduler(clip_sample=False)))
    images = drawing.images(true_maps)
    assert torch.equal(images, drawing.images(true_maps))
    assert changed(images, replace(drawing, seed=1).images(true_maps))


def test_unconditional_and_oblong(make_pipeline):
    drawing = drawing_of(make_pipeline(num_classes=None), None)
    maps = torch.randint(2, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    assert drawing.images(maps).shape == (3, 3, 16, 40) and drawing.maps("predicted", maps).shape == (3, 2, 5)


def test_no_two_images_have_the_same_noise(drawing):
    seeds = [g.initial_seed() for purpose in range(3) for g in drawing.generators(purpose, slice(0, 2000))]
    assert len(set(seeds)) == len(seeds)
    few, many = drawing.generators(1, slice(5, 9)), drawing.generators(1, slice(0, 9))
    assert few[2].initial_seed() == many[7].initial_seed()


def test_batches_are_handed_out_once(drawing):
    seen = []

    def count(images: slice) -> torch.Tensor:
        seen.append((images.start, images.stop))
        return torch.arange(images.start, images.stop) + 1.0

    found = replace(drawing, labels=LABELS[:7]).over_images(count, torch.zeros(7))
    assert found.tolist() == [1, 2, 3, 4, 5, 6, 7] and seen == [(0, 3), (3, 6), (6, 7)]


def test_what_is_wrong_is_named(drawing, make_pipeline, images, true_maps):
    refused("`source`.*true, predicted, random, coarse, fine.*'real'", drawing.maps, "real", true_maps)
    refused("`labels`", drawing_of, drawing.pipe, None)
    refused("`labels`.*None", drawing_of, make_pipeline(num_classes=None))
    for draw in (lambda few: few.maps("random", true_maps), lambda few: few.images(true_maps)):
        refused(r"`labels`.* 8 .*\(7,\)", draw, replace(drawing, labels=LABELS[:7]))
    without = drawing_of(make_pipeline(grain_model=None, grain_scheduler=None))
    refused("`pipe`.*grain model", without.maps, "predicted", true_maps)
    for wrong in (images.float(), images[0], images[:0]):
        refused("`images`.*uint8", drawing.true_maps, wrong)
