# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pictures to pictures and in-painting: what is kept is kept, what is new is new, at both ends and between."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from grain_maps import check_tied
from peft import LoraConfig
from pipeline_calls import call_with

from diffusers_d2it import D2iTImg2ImgPipeline, D2iTInpaintPipeline, D2iTPipeline


SCHEDULERS = {
    "DDIM": lambda: DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "DDPM": lambda: DDPMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "UniPC": lambda: UniPCMultistepScheduler(),
    "Heun": lambda: HeunDiscreteScheduler(),
    "velocity": lambda: DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
}
EACH_SCHEDULER = pytest.mark.parametrize("scheduler", SCHEDULERS)
CLASSES = [D2iTImg2ImgPipeline, D2iTInpaintPipeline]


call = call_with(num_inference_steps=4, grain_num_inference_steps=3, output_type="pt")


@pytest.fixture
def make(make_pipeline):
    """A pipeline of a class, and another that generates, of the same components."""

    def make(cls, num_grains=2, **components):
        plain = make_pipeline(num_grains, **components)
        edits = cls.from_pipe(plain)
        edits.set_progress_bar_config(disable=True)
        return edits, plain

    return make


@pytest.fixture
def picture(photos):
    """(3, 32, 32) in [0, 1], of 8 bits: the size that the tiny models were made for."""
    return (photos[1, :, 16:48, 16:48] + 1).mul(127.5).round() / 255


def mask_of(*boxes, size=(32, 32)) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def encoded(pipe, picture, grain_map):
    with torch.no_grad():
        return pipe.vae.scale_latents(pipe.vae.encode(2 * picture[None] - 1, grain_map).latent_dist.mode())


def reconstructed(pipe, picture, grain_map):
    return pipe.decode_latents(encoded(pipe, picture, grain_map), "pt")


# ---- Pictures to pictures ----


@EACH_SCHEDULER
def test_strength_one_is_generation_under_the_map_of_the_picture(make, picture, scheduler):
    edits, plain = make(D2iTImg2ImgPipeline, scheduler=SCHEDULERS[scheduler]())
    edited = call(edits, 1, picture, strength=1.0)
    grain_map = plain.grain_map_from_image(picture)
    assert torch.equal(edited.grain_maps, grain_map)
    assert torch.equal(edited.images, call(plain, 1, grain_map=grain_map).images)


def test_strength_one_is_generation_under_any_map(make, picture):
    edits, plain = make(D2iTImg2ImgPipeline)
    for other in ("draw", "fine", torch.zeros(4, 4, dtype=torch.int64), None):
        given = None if isinstance(other, str) and other == "draw" else other
        assert torch.equal(
            call(edits, 1, picture, strength=1.0, grain_map=other).images, call(plain, 1, grain_map=given).images
        )


@pytest.mark.parametrize("num_grains", [2, 3])
@pytest.mark.parametrize("grain_map", ["image", "coarse", "fine"])
def test_strength_zero_is_the_reconstruction(make, photos, picture, caplog, num_grains, grain_map):
    edits, _ = make(D2iTImg2ImgPipeline, num_grains)
    picture = picture if num_grains == 2 else ((photos[1] + 1).mul(127.5).round() / 255)
    caplog.set_level("WARNING")
    output = call(edits, 1, picture, strength=0.0, grain_map=grain_map)
    assert torch.equal(output.images, reconstructed(edits, picture, output.grain_maps))
    assert any("`strength` 0" in message for message in caplog.messages)


@pytest.mark.parametrize("scheduler", ["DDIM", "UniPC", "Heun"])
@pytest.mark.parametrize("cls", CLASSES)
def test_an_edit_of_a_strength_costs_its_share_of_the_steps(make, picture, scheduler, cls):
    edits, _ = make(cls, scheduler=SCHEDULERS[scheduler]())
    passes, per_step = [], 2 if scheduler == "Heun" else 1
    edits.transformer.register_forward_hook(lambda *_: passes.append(1))
    masked = {"mask_image": mask_of((0, 0, 9, 9))} if cls is D2iTInpaintPipeline else {}
    for strength, steps in ((1.0, 10), (0.7, 7), (0.55, 5), (0.1, 1), (0.0, 0)):
        passes.clear()
        call(edits, 1, picture, strength=strength, num_inference_steps=10, guidance_scale=1.0, **masked)
        assert len(passes) == max(steps * per_step - (per_step - 1), 0), strength
    with pytest.raises(ValueError, match="`strength`.*1 / 10.*0.05"):
        call(edits, 1, picture, strength=0.05, num_inference_steps=10, **masked)


@EACH_SCHEDULER
def test_the_start_is_the_picture_with_its_share_of_noise(make, picture, scheduler):
    """A network that knows the noise gives the picture back."""
    edits, _ = make(D2iTImg2ImgPipeline, scheduler=SCHEDULERS[scheduler]())
    grain_map = edits.grain_map_from_image(picture)
    kept = encoded(edits, picture, grain_map)
    noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
    layout = edits.transformer.prepare_grain_map(grain_map)

    def knows(module, args, output):
        sample, timestep = args[:2]
        if scheduler == "flow":
            output.sample = layout.tie(noise) - kept
        else:
            signal = edits.scheduler.alphas_cumprod[int(timestep)]
            found = (sample - signal.sqrt() * kept) / (1 - signal).sqrt()
            output.sample = found
            if scheduler == "velocity":
                output.sample = signal.sqrt() * found - (1 - signal).sqrt() * kept
        return output

    edits.transformer.register_forward_hook(knows)
    settings = {"num_inference_steps": 10, "strength": 0.5, "guidance_scale": 1.0, "output_type": "latent"}
    found = call(edits, 1, picture, latents=noise, **settings).images
    torch.testing.assert_close(found, kept, atol=0.02, rtol=0)


def test_shares_of_the_steps_are_of_all_steps(make, picture):
    edits, _ = make(D2iTImg2ImgPipeline)
    batches = []
    edits.transformer.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    settings = {"strength": 0.5, "num_inference_steps": 10}
    for interval, expected in (((0.0, 0.5), [1] * 5), ((0.5, 1.0), [2] * 5), ((0.7, 1.0), [1, 1, 2, 2, 2])):
        batches.clear()
        call(edits, 1, picture, guidance_interval=interval, **settings)
        assert batches == expected


def test_offloaded_models_and_adapters_edit_alike(make, picture):
    edits, _ = make(D2iTInpaintPipeline)
    given = {"image": picture, "mask_image": mask_of((4, 4, 20, 20)), "strength": 0.5}
    expected = call(edits, 1, **given).images
    edits.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(call(edits, 1, **given).images, expected)
    edits, _ = make(D2iTInpaintPipeline)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    edits.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    off, on = (call(edits, 1, **given, attention_kwargs={"scale": scale}).images for scale in (0.0, 1.0))
    assert torch.equal(off, expected) and not torch.equal(on, expected)


def test_variations_of_one_picture_and_pictures_of_several_labels(make, picture):
    edits, _ = make(D2iTImg2ImgPipeline)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    output = edits([1, 2], [picture, picture.flip(2)], 0.5, 2, 4, generator=generators, output_type="pt")
    assert output.images.shape == (4, 3, 32, 32)
    for i, (label, image) in enumerate(((1, picture), (1, picture), (2, picture.flip(2)), (2, picture.flip(2)))):
        alone = call(edits, label, image, strength=0.5, seed=i)
        assert torch.equal(alone.grain_maps[0], output.grain_maps[i])
        torch.testing.assert_close(alone.images[0], output.images[i], atol=1e-4, rtol=0)
    assert len(call(edits, 1, [picture, picture]).images) == len(call(edits, [1, 2], picture).images) == 2
    with pytest.raises(ValueError, match="`class_labels`.*3.*2"):
        call(edits, [1, 2, 3], [picture, picture])


def test_one_picture_under_several_maps(make, picture):
    edits, _ = make(D2iTImg2ImgPipeline)
    output = call(edits, 1, picture, grain_map=["coarse", "image", "fine"], strength=0.5)
    assert [share.item() for share in output.grain_maps.float().mean((1, 2))][::2] == [0, 1]
    alone = call(edits, 1, picture, grain_map="fine", strength=0.5)
    torch.testing.assert_close(alone.images[0], output.images[2], atol=1e-4, rtol=0)
    shares = call(edits, 1, picture, fine_ratio=[0.1, 0.9], strength=0.5).grain_maps.float().mean((1, 2))
    assert shares[0] < shares[1]


# ---- In-painting ----


@EACH_SCHEDULER
def test_a_white_mask_is_generation(make, picture, scheduler):
    edits, plain = make(D2iTInpaintPipeline, scheduler=SCHEDULERS[scheduler]())
    edited, drawn = call(edits, 1, picture, mask_of((0, 0, 32, 32))), call(plain, 1)
    assert torch.equal(edited.grain_maps, drawn.grain_maps)
    assert torch.equal(edited.images, drawn.images)


def test_a_black_mask_is_the_picture(make, picture, caplog):
    edits, _ = make(D2iTInpaintPipeline)
    caplog.set_level("WARNING")
    output = call(edits, 1, picture, mask_of())
    torch.testing.assert_close(output.images[0], picture, atol=1e-6, rtol=0)
    assert any("`mask_image`" in message for message in caplog.messages)
    output = call(edits, 1, picture, mask_of(), paste_back=False)
    assert torch.equal(output.images, reconstructed(edits, picture, output.grain_maps))
    assert torch.equal(output.grain_maps, edits.grain_map_from_image(picture))


MASKS = {
    "quarter": [(0, 0, 16, 16)],
    "off the grid": [(5, 3, 22, 13)],
    "narrower than a region": [(13, 4, 15, 28)],
    "one pixel": [(17, 18, 18, 19)],
    "two": [(0, 0, 5, 5), (20, 24, 31, 32)],
}


@pytest.mark.parametrize(
    "scheduler, boxes, strength",
    [
        *((scheduler, "two", strength) for scheduler in SCHEDULERS for strength in (0.5, 1.0)),
        *(("DDIM", boxes, 1.0) for boxes in MASKS if boxes != "two"),
    ],
)
def test_what_the_mask_does_not_touch_keeps_its_code_its_grain_and_its_pixels(
    make, picture, scheduler, boxes, strength
):
    edits, _ = make(D2iTInpaintPipeline, scheduler=SCHEDULERS[scheduler]())
    mask = mask_of(*MASKS[boxes])
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())

    settings = {"strength": strength, "callback_on_step_end": look}
    output = call(edits, 1, picture, mask, **settings, output_type="latent")
    for latents in seen:
        check_tied(latents, output.grain_maps)
    kept = encoded(edits, picture, output.grain_maps)
    cells = torch.nn.functional.max_pool2d(mask[None, None].float(), 4)  # the tiny autoencoder has 4 pixels a cell
    regions = torch.nn.functional.max_pool2d(mask[None].float(), 8)
    codes = torch.where(
        output.grain_maps == 1, 0.0, regions
    )  # of a coarse region all cells are one code, of a fine one each
    new = (cells[0] + codes.repeat_interleave(2, 1).repeat_interleave(2, 2)) > 0
    changed = (output.images != kept).any(dim=1)
    assert torch.equal(changed, new)
    own = edits.grain_map_from_image(picture)
    assert torch.equal(output.grain_maps[regions == 0], own[regions == 0])

    pixels = call(edits, 1, picture, mask, **settings).images[0]
    torch.testing.assert_close(pixels[:, ~mask], picture[:, ~mask], atol=1e-6, rtol=0)
    assert not torch.equal(pixels[:, mask], picture[:, mask])


def test_pictures_outside_are_kept_to_the_last_bit_in_a_file(make, picture, tmp_path):
    edits, _ = make(D2iTInpaintPipeline)
    image = PIL.Image.fromarray((picture * 255).round().byte().movedim(0, -1).numpy())
    image.save(tmp_path / "photo.png")
    mask = mask_of((4, 4, 12, 20))
    PIL.Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    [out] = call(edits, 1, tmp_path / "photo.png", tmp_path / "mask.png", output_type="pil").images
    assert np.array_equal(np.asarray(out)[~mask], np.asarray(image)[~mask])
    assert not np.array_equal(np.asarray(out), np.asarray(image))


@pytest.mark.parametrize("grain_map", ["image", "fine", "coarse"])
def test_the_map_inside_may_be_given(make, picture, grain_map):
    edits, _ = make(D2iTInpaintPipeline)
    expected = edits.grain_map_from_image(picture) if grain_map == "image" else None
    output = call(edits, 1, picture, mask_of((0, 0, 16, 16)), grain_map=grain_map)
    if expected is not None:
        assert torch.equal(output.grain_maps, expected)
    else:
        assert output.grain_maps.eq(grain_map == "fine").all()


def test_a_crop_around_the_mask_is_drawn_and_put_back_at_its_place(make):
    edits, _ = make(D2iTInpaintPipeline)
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8))
    mask = mask_of((150, 60, 170, 90), size=(120, 200))
    output = call(edits, [1, 2], image, mask, padding_mask_crop=4, output_type="pil")
    assert output.grain_maps.shape == (2, 4, 4)
    for out in output.images:
        assert out.size == image.size
        assert np.array_equal(np.asarray(out)[~mask], np.asarray(image)[~mask])
        assert (np.asarray(out)[mask] != np.asarray(image)[mask]).any(axis=-1).mean() > 0.9
    for wrong in ({"output_type": "pt"}, {"output_type": "pil", "paste_back": False}):
        with pytest.raises(ValueError, match="`padding_mask_crop`"):
            call(edits, 1, image, mask, padding_mask_crop=4, **wrong)
    with pytest.raises(ValueError, match="`mask_image`.*`padding_mask_crop`"):
        call(edits, 1, image, mask & False, padding_mask_crop=4, output_type="pil")


@pytest.mark.parametrize("sides", [(80, 400), (300, 60), (40, 40)])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
@pytest.mark.parametrize("corner", [0.0, 0.5, 1.0])
def test_a_crop_has_the_form_of_the_image_that_is_drawn(sides, size, corner):
    from diffusers_d2it.pipelines.inpainting import crop_around

    height, width = sides
    top, left = round(corner * (height - 10)), round(corner * (width - 12))
    mask = np.zeros(sides, np.uint8)
    mask[top : top + 10, left : left + 12] = 255
    picture = torch.rand(3, *sides, generator=torch.Generator().manual_seed(0)) * 2 - 1
    box, part, part_mask = crop_around(picture, PIL.Image.fromarray(mask), size, padding=6)
    assert part.size == part_mask.size == size[::-1]
    crop_width, crop_height = box[2] - box[0], box[3] - box[1]
    assert abs(crop_width / size[1] - crop_height / size[0]) < 0.05 and crop_width >= size[1] / 2
    assert 0 <= box[0] <= left and box[2] <= width and 0 <= box[1] <= top and box[3] <= height
    assert box[2] >= left + 12 and box[3] >= top + 10
    mask[:] = 255
    if sides[0] / size[0] != sides[1] / size[1]:
        with pytest.raises(ValueError, match="`padding_mask_crop`"):
            crop_around(picture, PIL.Image.fromarray(mask), size, padding=0)


def test_a_line_thinner_than_a_pixel_is_new(make, photos):
    edits, _ = make(D2iTInpaintPipeline)
    image = torch.nn.functional.interpolate((photos[1:2] + 1) / 2, scale_factor=8)[0].clamp(0, 1)
    mask = mask_of((100, 0, 102, 512), size=(512, 512))
    grain_map = edits.grain_map_from_image(image)
    output = call(edits, 1, image, mask, output_type="latent")
    assert (output.images != encoded(edits, call(edits, 1, image, mask & False).images[0], output.grain_maps)).any()
    assert grain_map.shape == output.grain_maps.shape


def test_a_line_thinner_than_a_pixel_is_new_in_a_crop_too(make, photos, caplog):
    from diffusers_d2it.pipelines.inpainting import crop_around

    edits, _ = make(D2iTInpaintPipeline)
    image = torch.nn.functional.interpolate((photos[1:2] + 1) / 2, scale_factor=8)[0].clamp(0, 1)
    mask = mask_of((100, 0, 102, 512), size=(512, 512))
    _, _, part_mask = crop_around(2 * image - 1, PIL.Image.fromarray(mask.numpy()).convert("L"), (32, 32), 200)
    white = mask_of((6, 0, 7, 32)).numpy()
    assert np.array_equal(np.asarray(part_mask), 255 * white)
    point = PIL.Image.new("L", (2048, 2048))
    point.putpixel((1000, 1000), 255)
    _, _, part_mask = crop_around(torch.zeros(3, 2048, 2048), point, (32, 32), 1000)
    assert (np.asarray(part_mask) == 255).sum() == 1
    caplog.set_level("WARNING")
    call(edits, 1, image, mask, padding_mask_crop=200, output_type="pil")
    assert not [message for message in caplog.messages if "`mask_image`" in message]


def test_a_pipeline_of_the_users_own_draws_crops(make):
    class Own(D2iTInpaintPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    edits, plain = make(D2iTInpaintPipeline)
    own = Own(**plain.components)
    own.set_progress_bar_config(disable=True)
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    settings = {"padding_mask_crop": 4, "output_type": "pil"}
    mask = mask_of((20, 20, 40, 40), size=(64, 64))
    [found], [expected] = (call(pipe, 1, image, mask, **settings).images for pipe in (own, edits))
    assert found.tobytes() == expected.tobytes()


def test_the_share_of_a_map_that_is_drawn_whole(make, picture):
    edits, plain = make(D2iTInpaintPipeline)
    white = mask_of((0, 0, 32, 32))
    for ratio in (0.25, 0.75):
        edited, drawn = call(edits, 1, picture, white, fine_ratio=ratio), call(plain, 1, fine_ratio=ratio)
        assert torch.equal(edited.grain_maps, drawn.grain_maps) and torch.equal(edited.images, drawn.images)


# ---- Both ----


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_sizes_that_are_not_square_and_pictures_that_are_fitted(make, cls, size):
    edits, _ = make(cls)
    values = np.random.default_rng(0).integers(0, 256, (*(2 * side for side in size), 3), dtype=np.uint8)
    masked = {"mask_image": mask_of((4, 4, 20, 20), size=values.shape[:2])} if cls is D2iTInpaintPipeline else {}
    output = call(edits, 1, values, height=size[0], width=size[1], strength=0.5, **masked)
    assert output.images.shape[2:] == size and output.grain_maps.shape[1:] == (size[0] // 8, size[1] // 8)
    assert call(edits, 1, values, strength=0.5, **masked).images.shape[2:] == (32, 32)


@pytest.mark.parametrize("cls", CLASSES)
def test_one_family(make, picture, tmp_path, cls):
    edits, plain = make(cls)
    masked = {"mask_image": mask_of((4, 4, 20, 20))} if cls is D2iTInpaintPipeline else {}
    expected = call(edits, 1, picture, strength=0.5, **masked).images
    again = D2iTPipeline.from_pipe(edits)
    assert all(getattr(again, name) is part for name, part in plain.components.items() if name != "id2label")
    assert again.id2label == plain.id2label
    edits.save_pretrained(tmp_path / "edits")
    plain.save_pretrained(tmp_path / "plain")
    assert isinstance(D2iTPipeline.from_pretrained(tmp_path / "edits"), D2iTPipeline)
    auto = AutoPipelineForInpainting if cls is D2iTInpaintPipeline else AutoPipelineForImage2Image
    for pipe in (
        cls.from_pretrained(tmp_path / "plain"),
        cls(**plain.components),
        DiffusionPipeline.from_pretrained(tmp_path / "edits"),
        auto.from_pretrained(tmp_path / "plain"),
        auto.from_pipe(again),
    ):
        assert type(pipe) is cls
        assert torch.equal(call(pipe, 1, picture, strength=0.5, **masked).images, expected)


def test_a_pipeline_made_of_another_keeps_its_dtype(make_pipeline):
    plain = make_pipeline()
    plain.transformer.to(torch.bfloat16)
    edits = D2iTImg2ImgPipeline.from_pipe(plain)
    assert plain.transformer.dtype == torch.bfloat16 and edits.vae.dtype == plain.grain_model.dtype == torch.float32
    assert D2iTImg2ImgPipeline.from_pipe(plain, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("cls", CLASSES)
def test_an_edit_without_an_encoder_or_a_picture_is_refused(make, picture, cls):
    edits, _ = make(cls)
    with pytest.raises(ValueError, match="`image`.*None"):
        call(edits, 1)
    edits.vae = None
    with pytest.raises(ValueError, match="`vae`"):
        call(edits, 1, picture, output_type="latent")


@pytest.fixture(scope="module")
def refusing(make_pipeline):
    return D2iTInpaintPipeline.from_pipe(make_pipeline())


GREY = PIL.Image.new("L", (32, 32), 200)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strength": -0.1}, "`strength`.*-0.1"),
        ({"strength": 1.1}, "`strength`.*1.1"),
        ({"image": "photo.png"}, "`image` photo.png"),
        ({"image": torch.full((3, 32, 32), 2.0)}, r"`image`.*\[0, 1\]"),
        ({"image": PIL.Image.new("RGB", (15, 64))}, "`image`.*15x64"),
        ({"image": []}, "`image`"),
        ({"mask_image": None}, "`mask_image`.*None"),
        ({"mask_image": mask_of(size=(32, 31))}, "`mask_image`.*32x32.*31x32"),
        ({"mask_image": [GREY] * 2}, "`mask_image`.*2"),
        ({"mask_image": PIL.Image.new("RGBA", (32, 32))}, "`mask_image`.*transparent"),
        ({"mask_image": "mask.png"}, "`mask_image` mask.png"),
        ({"mask_image": torch.full((32, 32), -1.0)}, "`mask_image`.*-1"),
        ({"mask_image": torch.full((32, 32), float("nan"))}, "`mask_image`.*nan"),
        ({"grain_map": torch.full((4, 4), 2)}, "`grain_map`.*2"),
        ({"grain_map": "images"}, "`grain_map`.*'images'"),
        ({"grain_map": torch.zeros(4, 4, dtype=torch.int64), "fine_ratio": 0.5}, "`fine_ratio`"),
        ({"height": 36}, "`height`.*36"),
        ({"padding_mask_crop": -1}, "`padding_mask_crop`.*-1"),
    ],
)
def test_bad_input_is_named(refusing, picture, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(refusing, 1, **({"image": picture, "mask_image": mask_of((0, 0, 8, 8))} | arguments))
