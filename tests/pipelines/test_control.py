# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every way to a grain map, maps in part, several maps for one image, and what is between two images."""

import copy

import numpy as np
import pandas as pd
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchLCMScheduler
from grain_maps import check_tied
from pipeline_calls import MAP_ALONE, call_with

from diffusers_d2it import (
    D2iTPipeline,
    D2iTPipelineOutput,
    bundled_checkpoint,
    foveated_grain_map,
    grain_map_from_boxes,
    grain_map_from_mask,
    sample_grain_map,
)
from diffusers_d2it.grains import fine_share, tie


call = call_with(num_inference_steps=3, grain_num_inference_steps=3, output_type="pt")


@pytest.fixture(scope="module")
def refusing(make_pipeline) -> D2iTPipeline:
    """For all that a pipeline refuses, after which it is as it was."""
    return make_pipeline()


# ---- Masks ----


def painted(size=(32, 32), corner=(0, 0, 15, 15)) -> PIL.Image.Image:
    """White in the top-left quarter."""
    image = PIL.Image.new("L", size)
    scale = size[0] / 32
    PIL.ImageDraw.Draw(image).rectangle([edge * scale for edge in corner], fill=255)
    return image


QUARTER = torch.zeros(4, 4, dtype=torch.int64)
QUARTER[:2, :2] = 1


@pytest.mark.parametrize(
    "mask",
    [
        painted(),
        painted().convert("1"),
        painted().convert("RGB"),
        painted().convert("P"),
        painted().convert("RGBA"),
        painted().convert("LA"),
        np.asarray(painted().convert("RGBA")),
        PIL.Image.fromarray(np.asarray(painted()).astype(np.uint16) * 257),
        pd.DataFrame(np.asarray(painted()) > 0),
        np.asarray(painted((4, 4), (0, 0, 8, 8))).astype(np.uint16) // 255,
        painted((320, 320), (0, 0, 15.9, 15.9)),
        np.asarray(painted()),
        np.asarray(painted()) > 0,
        np.asarray(painted()) / 255,
        (np.asarray(painted()) > 0).astype(np.uint8),
        np.asarray(painted().convert("RGB")),
        torch.from_numpy(np.array(painted())) > 0,
        torch.from_numpy(np.array(painted()))[None] / 255,
        torch.from_numpy(np.array(painted()))[None, None] / 255,
        (np.asarray(painted((4, 4), (0, 0, 8, 8))) > 0),
        [painted()],
        "file",
    ],
    ids=lambda mask: (
        f"{type(mask).__name__}-{mask.mode if isinstance(mask, PIL.Image.Image) else getattr(mask, 'dtype', '')}"
    ),
)
def test_a_mask_of_any_kind_is_the_map_that_was_painted(make_pipeline, tmp_path, mask):
    if isinstance(mask, str):
        mask = tmp_path / "mask.png"
        painted().save(mask)
    assert torch.equal(call(make_pipeline(), 1, grain_map=mask, **MAP_ALONE).grain_maps[0], QUARTER)
    if not isinstance(mask, pd.DataFrame) and getattr(mask, "dtype", None) != np.uint16:  # of a call alone
        assert torch.equal(grain_map_from_mask(mask, (4, 4)), QUARTER)


def test_a_region_takes_the_grain_of_most_of_its_pixels():
    mask = np.zeros((16, 16))
    for region, white in enumerate((7, 8, 9)):  # of 16 pixels
        block = np.zeros(16)
        block[:white] = 1
        mask[:4, 4 * region : 4 * region + 4] = block.reshape(4, 4)
    assert grain_map_from_mask(mask, (4, 4))[0].tolist() == [0, 1, 1, 0]


def test_grey_levels_are_split_evenly_among_three_grains():
    grey = np.array([[0, 84, 85, 169, 170, 255]], dtype=np.uint8)
    assert grain_map_from_mask(grey, (1, 6), num_grains=3).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_the_centre_of_a_mask_of_another_form_is_taken_and_said(caplog):
    mask = np.zeros((32, 64), dtype=bool)
    mask[:, 16:32] = True
    assert grain_map_from_mask(mask, (4, 4)).tolist() == [[1, 1, 0, 0]] * 4
    assert "64x32" in caplog.text


@pytest.mark.parametrize(
    "grain_map, message",
    [
        ("finest", "'finest'"),
        (PIL.Image.new("LA", (8, 8)), "transparent"),
        (np.zeros((8, 8, 4), np.uint8), "transparent"),
        (np.zeros((8, 8, 2), np.uint8), "transparent"),
        (PIL.Image.new("RGB", (8, 8), "red"), "colours"),
        (np.asarray(PIL.Image.new("RGB", (8, 8), "lime")), "colours"),
        (torch.zeros(3, 8, 8), "three masks"),
        (np.zeros((8, 8, 3)), "has colours"),
        (PIL.Image.new("F", (8, 8), 1.0), "mode 'F'"),
        (np.full((8, 8), 1.5), "1.5"),
        (-np.ones((8, 8)), "-1"),
        (np.full((8, 8), np.nan), "nan"),
        (np.zeros((4, 4, 4, 4)), "4, 4, 4, 4"),
        (np.full((4, 4), 3), "3"),
        (np.full((4, 4), 255), "255"),
        ([[0, 1], [1]], ""),
        (["finest"], "finest"),
        (1j, "1j"),
        (np.full((4, 4), -2), "-2"),
        ([], "empty"),
        (["fine", "coarse", "fine"], "3"),
        (np.zeros((3, 4, 4), int), "3"),
    ],
)
def test_what_is_no_map_is_refused(refusing, grain_map, message):
    with pytest.raises(ValueError, match=f"`grain_map`.*{message}"):
        call(refusing, [1, 2], grain_map=grain_map)


def test_small_whole_numbers_of_eight_bits_may_be_two_things_for_three_grains(make_pipeline):
    ones = np.ones((4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="`grain_map`.*uint8.*int64"):
        call(make_pipeline(3), 1, grain_map=ones)
    assert call(make_pipeline(3), 1, grain_map=ones.astype(int), **MAP_ALONE).grain_maps.eq(1).all()
    assert call(make_pipeline(3), 1, grain_map=ones * 255, **MAP_ALONE).grain_maps.eq(2).all()


# ---- Shapes ----


def test_boxes_are_fine_in_every_region_that_they_touch():
    grain_map = grain_map_from_boxes([(0, 0, 8, 8), (17, 9, 23.5, 31)], (4, 4), (32, 32))
    assert grain_map.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    assert torch.equal(
        grain_map_from_boxes((0, 0, 8, 8), (4, 4), (32, 32)), grain_map_from_boxes([(0, 0, 8, 8)], (4, 4), (32, 32))
    )
    for box in (torch.tensor([0, 0, 8, 8]), np.array([[0, 0, 8, 8]]), [torch.tensor([0.0, 0, 8, 8])]):
        assert grain_map_from_boxes(box, (4, 4), (32, 32)).nonzero().tolist() == [[0, 0]]
    assert grain_map_from_boxes([(0, 0, 64, 16)], (2, 4), (32, 64), num_grains=3).tolist() == [[2] * 4, [0] * 4]
    for box in ((0, 0, 0, 8), (0, 0, 8), (-1, 0, 8, 8), (0, 0, 33, 8)):
        with pytest.raises(ValueError, match="`boxes`"):
            grain_map_from_boxes([box], (4, 4), (32, 32))


@pytest.mark.parametrize("num_grains", [2, 3])
@pytest.mark.parametrize("fine_ratio", [0.0, 0.3, 1.0])
def test_a_fovea_is_fine_around_its_point(num_grains, fine_ratio):
    size, image_size, center = (8, 6), (64, 48), (40.0, 12.0)
    grain_map = foveated_grain_map(center, size, image_size, fine_ratio, num_grains)
    assert fine_share(grain_map, num_grains).item() == pytest.approx(round(fine_ratio * 48) / 48)
    rows, columns = torch.meshgrid(torch.arange(8) * 8 + 4, torch.arange(6) * 8 + 4, indexing="ij")
    order = ((rows - center[1]) ** 2 + (columns - center[0]) ** 2).flatten().argsort(stable=True)
    along = grain_map.flatten()[order]
    assert (along.diff() <= 0).all()  # never finer farther out
    counts = torch.bincount(along, minlength=num_grains)[:-1]
    assert counts.max() - counts.min() <= 1


def test_a_fovea_lies_in_the_image():
    with pytest.raises(ValueError, match="`center`.*65"):
        foveated_grain_map((65, 0), (4, 4), (64, 64))
    for ratio in (1.5, "0.3"):
        with pytest.raises(ValueError, match=f"`fine_ratio`.*{ratio}"):
            foveated_grain_map((0, 0), (4, 4), (64, 64), fine_ratio=ratio)


def test_the_size_of_a_map(make_pipeline):
    pipe = make_pipeline()
    assert pipe.grain_map_size() == (4, 4)
    assert pipe.grain_map_size(64, np.int64(40)) == (8, 5)
    with pytest.raises(ValueError, match="`height`.*8.*36"):
        pipe.grain_map_size(36)
    assert call(pipe, 1, grain_map=torch.zeros(pipe.grain_map_size(width=40), dtype=int)).images.shape[2:] == (32, 40)


# ---- Maps in part ----


@pytest.mark.parametrize("num_grains", [2, 3])
@pytest.mark.parametrize("scheduler", [None, DDPMScheduler(prediction_type="sample", clip_sample=False)])
def test_held_regions_are_held(make_pipeline, num_grains, scheduler):
    pipe = make_pipeline(num_grains, **({} if scheduler is None else {"grain_scheduler": scheduler}))
    held = torch.full((4, 4), -1)
    held[:, :2] = torch.arange(8).view(4, 2) % num_grains
    drawn = call(pipe, [1] * 8, grain_map=held, **MAP_ALONE).grain_maps
    assert torch.equal(drawn[:, :, :2], held[:, :2].expand(8, 4, 2))
    free = call(pipe, [1] * 8, **MAP_ALONE).grain_maps
    assert torch.equal(call(pipe, [1] * 8, grain_map=torch.full((4, 4), -1), **MAP_ALONE).grain_maps, free)


def test_the_rest_is_drawn_given_what_is_held():
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    shares = []
    for grain in (0, 1):
        held = torch.full(pipe.grain_map_size(), -1)
        held[:, :4] = grain
        drawn = call(pipe, [207] * 8, grain_map=held, grain_num_inference_steps=10, **MAP_ALONE).grain_maps
        shares.append(drawn[:, :, 4:].float().mean().item())
    assert shares[1] > shares[0] + 0.1  # what is beside fine regions is rather fine


def test_holding_costs_no_pass_more(make_pipeline):
    pipe, passes = make_pipeline(), []
    pipe.grain_model.register_forward_hook(lambda *_: passes.append(1))
    for grain_map in (None, [[1, -1, -1, 0]] * 4, [[1, 0, 1, 0]] * 4):
        call(pipe, 1, grain_num_inference_steps=5, grain_map=grain_map, **MAP_ALONE)
    assert len(passes) == 10


def test_a_share_holds_for_the_whole_map_or_says_why_not(make_pipeline):
    pipe, held = make_pipeline(), torch.full((4, 4), -1)
    held[0], held[1] = 1, 0
    for ratio in (0.25, 0.5, 0.75):
        grain_maps = call(pipe, [1, 2], grain_map=held, fine_ratio=ratio, **MAP_ALONE).grain_maps
        assert fine_share(grain_maps, 2).tolist() == [ratio] * 2
        assert torch.equal(grain_maps[:, :2], held[:2].expand(2, 2, 4))
    for ratio in (0.1, 0.8):
        with pytest.raises(ValueError, match=f"`fine_ratio`.*0.25, 0.75.*{ratio}"):
            call(pipe, 1, grain_map=held, fine_ratio=ratio)


def test_without_a_grain_model_all_of_a_map_is_required(make_pipeline):
    pipe = make_pipeline(grain_model=None, grain_scheduler=None)
    with pytest.raises(ValueError, match="`grain_map`"):
        call(pipe, 1, grain_map=[[1, -1, -1, 0]] * 4)


def test_the_held_state_is_that_of_every_step(make_grain_model, make_pipeline):
    # The network reads held regions as their grain noised by noise of its own sign
    model, scheduler = make_grain_model(), make_pipeline().grain_scheduler
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    held = torch.tensor([[[1, -1], [0, -1]]])
    generator = torch.Generator().manual_seed(0)
    sample_grain_map(model, scheduler, (2, 2), torch.tensor([1]), 1, 5, generator=generator, held=held)
    start = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    clean = model.state_from_grain_map(held.clamp_min(0), 2)
    scheduler.set_timesteps(5)
    for t, state in zip(scheduler.timesteps, seen):
        expected = scheduler.add_noise(clean, clean * start.abs(), t[None])
        torch.testing.assert_close(state[..., 0], expected[..., 0])
        assert (state[..., 0] * clean[..., 0] > 0).all()
    assert torch.equal(seen[0][..., 1], start[..., 1])


# ---- Several maps ----


@pytest.mark.parametrize("scheduler", [None, DDPMScheduler(clip_sample=False)])
def test_several_maps_for_one_label_have_the_same_noise(make_pipeline, scheduler):
    pipe = make_pipeline(**({} if scheduler is None else {"scheduler": scheduler}))
    maps = ["coarse", "fine", painted(), QUARTER, None, [[1, -1, -1, 0]] * 4, "random"]
    output = call(pipe, 1, grain_map=maps)
    assert len(output.images) == 7
    assert torch.equal(output.grain_maps[2], QUARTER)
    for i, one in enumerate(maps):
        assert torch.equal(call(pipe, 1, grain_map=one).grain_maps[0], output.grain_maps[i])
        alone = call(pipe, 1, grain_map=output.grain_maps[i])
        torch.testing.assert_close(alone.images[0], output.images[i], atol=1e-4, rtol=0)
    assert torch.equal(output.images[2], output.images[3])


def test_several_shares_for_one_label(make_pipeline):
    pipe = make_pipeline()
    output = call(pipe, 1, fine_ratio=[0.0, 0.25, 1.0])
    assert fine_share(output.grain_maps, 2).tolist() == [0.0, 0.25, 1.0]
    for i, ratio in enumerate((0.0, 0.25, 1.0)):
        assert torch.equal(call(pipe, 1, fine_ratio=ratio).grain_maps[0], output.grain_maps[i])
        alone = call(pipe, 1, grain_map=output.grain_maps[i])
        torch.testing.assert_close(alone.images[0], output.images[i], atol=1e-4, rtol=0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    assert len(call(pipe, 1, fine_ratio=[0.0, 0.5], latents=noise).images) == 2


def test_one_map_a_label_and_one_an_image(make_pipeline):
    pipe = make_pipeline()
    two = call(pipe, [1, 2], 2, grain_map=["coarse", "fine"], **MAP_ALONE).grain_maps
    assert two.float().mean((1, 2)).tolist() == [0, 0, 1, 1]
    four = call(pipe, [1, 2], 2, grain_map=["coarse", "fine"] * 2, **MAP_ALONE).grain_maps
    assert four.float().mean((1, 2)).tolist() == [0, 1, 0, 1]
    one = call(pipe, 1, num_images_per_prompt=2, grain_map=["coarse", "fine"]).images
    assert not torch.equal(one[0], one[1])
    with pytest.raises(ValueError, match="`grain_map`.*4 images.*3"):
        call(pipe, [1, 2], num_images_per_prompt=2, grain_map=["fine"] * 3)
    with pytest.raises(ValueError, match="`fine_ratio`.*2 images.*3"):
        call(pipe, [1, 2], fine_ratio=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="`fine_ratio`.*image 0.*0.2"):
        call(pipe, 1, grain_map=["fine", None], fine_ratio=[0.2, None])
    with pytest.raises(ValueError, match="`fine_ratio`.*3 images.*2"):
        call(pipe, 1, grain_map=["random"] * 3, fine_ratio=[0.1, 0.2])


def test_the_generator_goes_on_after_several_maps(make_pipeline):
    pipe, generator = make_pipeline(), torch.Generator().manual_seed(0)
    first, second = (pipe(1, grain_map=["fine"] * 2, num_inference_steps=2, generator=generator) for _ in range(2))
    assert first.images[0].tobytes() != second.images[0].tobytes()


# ---- Between images ----


@pytest.mark.parametrize(
    "scheduler, own",
    [
        *((None, own) for own in ({}, {"grain_map": "random"}, {"fine_ratio": 0.25}, {"grain_map": QUARTER})),
        *((DDPMScheduler(clip_sample=False), own) for own in ({}, {"grain_map": "random"})),
        (FlowMatchLCMScheduler(), {"grain_map": "random"}),
    ],
)
def test_the_ends_of_the_way_between_two_images_are_these_images(make_pipeline, scheduler, own):
    pipe = make_pipeline(**({} if scheduler is None else {"scheduler": scheduler}))
    settings = {"num_inference_steps": 3, "class_labels": 1}
    between = pipe.interpolate(3, 5, 4, **settings, **own)
    assert len(between) == 4 and all(image.size == (32, 32) for image in between)
    first = pipe(generator=torch.Generator().manual_seed(3), **settings, **own)
    assert between[0].tobytes() == first.images[0].tobytes()
    if scheduler is None:
        generator = torch.Generator().manual_seed(5)
        noises = []
        prepare, pipe.prepare_latents = pipe.prepare_latents, lambda *args: noises.append(prepare(*args)) or noises[-1]
        pipe(generator=generator, **settings, **own)
        last = pipe(latents=noises[0], grain_map=first.grain_maps, **settings)
        assert np.abs(np.asarray(between[-1], int) - np.asarray(last.images[0], int)).max() <= 1
        pipe.prepare_latents = prepare
    assert len({image.tobytes() for image in pipe.interpolate(3, 3, 3, **settings, **own)}) == 1


def test_the_way_between_two_images_takes_numbers_as_a_call_does(make_pipeline):
    pipe = make_pipeline()
    plain = pipe.interpolate(0, 1, 2, 1, num_inference_steps=2, guidance_interval=(0.5, 1.0))
    written = {"num_inference_steps": torch.tensor(2), "guidance_interval": np.array([0.5, 1.0])}
    found = pipe.interpolate(np.int64(0), torch.tensor(1), np.uint8(2), np.array([1]), **written)
    assert [image.tobytes() for image in found] == [image.tobytes() for image in plain]


def test_there_is_no_way_between_two_images_without_a_transformer(make_pipeline):
    pipe = make_pipeline(transformer=None)
    for draw in (lambda: pipe(1), lambda: pipe.interpolate(0, 1, 3, 1)):
        with pytest.raises(ValueError, match="`transformer`.*None"):
            draw()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 1}, "`steps`.*1"),
        ({"a": "x"}, "`a`.*'x'"),
        ({"b": np.zeros((1, 4, 8, 8))}, "`b`"),
        ({"a": torch.zeros(2, 4, 8, 8)}, r"`latents`.*\(2, 4, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "`latents`"),
        ({"return_dict": False}, "`return_dict`"),
        ({"class_labels": [1, 2]}, "`class_labels`.*2"),
        ({"grain_map": ["fine", "coarse"]}, "`grain_map`.*2"),
        ({"strength": 0.5}, "strength"),
    ],
)
def test_what_is_no_way_between_two_images(refusing, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        refusing.interpolate(**({"a": 0, "b": 1, "steps": 3, "class_labels": 1, "num_inference_steps": 1} | arguments))


def test_the_way_is_on_the_sphere_and_tied():
    from diffusers_d2it.pipelines.pipeline_d2it import slerp

    generator = torch.Generator().manual_seed(0)
    a, b = (tie(torch.randn(1, 4, 8, 8, generator=generator), QUARTER[None]) for _ in range(2))
    way = slerp(a, b, 5)
    check_tied(way, QUARTER.expand(5, 4, 4))
    assert torch.equal(way[:1], a) and torch.allclose(way[-1:], b)
    norms = way.flatten(1).norm(dim=1)
    assert ((norms - norms[0]).abs() < (norms[0] - norms[-1]).abs() + 0.5).all()
    middle = torch.nn.functional.cosine_similarity(way[2:3].flatten(1), (a + b).flatten(1))
    assert middle.item() == pytest.approx(1, abs=1e-3)


# ---- What a person types, and sees ----


@pytest.mark.parametrize(
    "name, instead",
    [
        ("prompt", "class_labels"),
        ("negative_prompt", "guidance_scale"),
        ("seed", "generator"),
        ("image", "D2iTImg2ImgPipeline"),
        ("strength", "D2iTImg2ImgPipeline"),
        ("mask_image", "D2iTInpaintPipeline"),
        ("num_inference_step", "num_inference_steps"),
    ],
)
def test_an_argument_of_other_pipelines_is_told_what_to_use_instead(refusing, name, instead):
    with pytest.raises(TypeError, match=f"`{name}`.*{instead}"):
        refusing(1, **{name: 1})


def test_names_are_found_in_any_case_and_close_ones_are_close(make_pipeline):
    names = {
        0: "aardvark",
        1: "tabby, tabby cat",
        2: "Egyptian cat",
        3: "abacus",
        4: "cattle",
        5: "cab",
        6: "A",
        7: "a",
    }
    pipe = make_pipeline(id2label=names)
    assert pipe.get_label_ids(["EGYPTIAN CAT", "Tabby", "A", "a"]) == [2, 1, 6, 7]
    with pytest.raises(ValueError, match="unknown class name 'cat'.*'tabby cat'.*'Egyptian cat'"):
        pipe.get_label_ids("cat")
    with pytest.raises(ValueError, match="'zebu'. Names: 'A', 'Egyptian cat', 'a', 'aardvark', 'abacus' and 5 more"):
        pipe.get_label_ids("zebu")


def test_an_output_is_one_line_and_a_picture(make_pipeline):
    output = call(make_pipeline(), [1, 2, 3], grain_map=QUARTER, output_type="pil")
    assert repr(output) == "3 images 32x32, fine share 0.25"
    assert output._repr_png_().startswith(b"\x89PNG")
    for grain_map, share in (([[0, 1, 1, 2]] * 4, "0.25"), ([[0, 1, 1, 1]] * 4, "0.00")):
        output = call(make_pipeline(3), 1, grain_map=grain_map)
        assert repr(output).endswith(f"fine share {share}") and repr(copy.deepcopy(output)) == repr(output)
    assert repr(D2iTPipelineOutput(output.images, QUARTER[None])).endswith("fine share 0.25")
    output = call(make_pipeline(), 1, grain_map="coarse")
    assert "\n" not in repr(output) and output._repr_png_() is None
