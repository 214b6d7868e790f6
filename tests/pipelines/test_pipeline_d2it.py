# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""D2iTPipeline: what it returns, what it does with its arguments, and what it refuses."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    VQDiffusionScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from grain_maps import check_tied
from pipeline_calls import MAP_ALONE, call_with

from diffusers_d2it import D2iTCFGCutoffCallback, D2iTPipeline
from diffusers_d2it.grains import fine_share
from diffusers_d2it.pipelines.grain_sampling import grain_map_from_logits, sample_grain_map


FLOW = FlowMatchEulerDiscreteScheduler
LEARNED = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, variance_type="learned_range", clip_sample=False)


call = call_with(num_inference_steps=3, grain_num_inference_steps=3, guidance_interval=(0.0, 1.0), output_type="pt")


class CountPasses:
    """Counts the images that pass through a model."""

    def __init__(self, model: torch.nn.Module):
        self.batches = []
        model.register_forward_hook(lambda module, args, output: self.batches.append(len(args[0])))


# ---- Results ----


@pytest.mark.parametrize(
    "num_grains, size, sides",
    [(2, {}, (32, 32)), (3, {"height": 32, "width": 80}, (32, 80)), (2, {"width": 40}, (32, 40))],
)
def test_images_and_maps_have_the_size_of_training_or_the_one_asked_for(make_pipeline, num_grains, size, sides):
    pipe = make_pipeline(num_grains)
    output = call(pipe, [1, 2], **size)
    assert output.images.shape == (2, 3, *sides)
    assert output.grain_maps.shape == (2, *(side // pipe.vae.region_size for side in sides))
    assert output.grain_maps.dtype == torch.int64
    assert output.images.min() >= 0 and output.images.max() <= 1


def test_label_forms_mean_the_same_and_seeds_decide(make_pipeline):
    pipe = make_pipeline()
    forms = 3, "class 3", ["synonym 3"], np.int64(3), torch.tensor([3]), (id for id in [3])
    images = [call(pipe, label).images for label in forms]
    assert all(torch.equal(images[0], other) for other in images[1:])
    assert not torch.allclose(images[0], call(pipe, 3, seed=1).images)
    assert not torch.allclose(images[0], call(pipe, 4).images)


def test_output_types_show_the_same_image(make_pipeline):
    pipe = make_pipeline()
    output = call(pipe, 1)
    images, grain_maps = call(pipe, 1, return_dict=False)
    assert torch.equal(images, output.images) and torch.equal(grain_maps, output.grain_maps)
    array = call(pipe, 1, output_type="np").images[0]
    np.testing.assert_allclose(array, images[0].permute(1, 2, 0).numpy(), atol=1e-6)
    picture = call(pipe, 1, output_type="pil").images[0]
    assert isinstance(picture, PIL.Image.Image)
    assert np.abs(np.asarray(picture) / 255 - array).max() < 1 / 255
    assert pipe.visualize_grain_map(picture, grain_maps[0], min_side=1).size == picture.size
    latents = call(pipe, 1, output_type="latent").images
    assert latents.shape == (1, 4, 8, 8)
    torch.testing.assert_close(pipe.decode_latents(latents, "pt"), images)


def test_images_per_prompt_repeat_each_label(make_pipeline):
    pipe = make_pipeline()
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    settings = {"num_inference_steps": 3, "grain_num_inference_steps": 3, "output_type": "pt"}
    images = pipe([1, 2], 2, generator=generators, **settings).images
    for i, label in enumerate([1, 1, 2, 2]):
        alone = pipe(label, generator=torch.Generator().manual_seed(i), **settings).images[0]
        torch.testing.assert_close(images[i], alone, atol=1e-5, rtol=0)


def test_unconditional_model_needs_no_label(make_pipeline):
    pipe = make_pipeline(num_classes=None)
    assert call(pipe, num_images_per_prompt=2).images.shape[0] == 2
    with pytest.raises(ValueError, match="`class_labels`.*1"):
        call(pipe, 1)


def test_factors_8_16_32_from_photographs_to_samples(make_pipeline, make_vae, calibrate, load_photos):
    vae = make_vae(
        downsample_factors=[8, 16, 32],
        block_out_channels=[8, 8, 8, 16, 16, 16],
        decoder_block_out_channels=[8, 8, 8, 16],
        grain_ratios=[0.3, 0.3, 0.4],
        calibration=calibrate(32),
        sample_size=128,
    )
    pipe = make_pipeline(3, vae=vae)
    photos = load_photos(128)
    encoded = vae.encode(photos)
    assert sorted(encoded.grain_map.unique().tolist()) == [0, 1, 2]
    check_tied(encoded.latent_dist.mode(), encoded.grain_map)
    output = call(pipe, [1, 2], grain_map=encoded.grain_map[:2], output_type="pt")
    assert output.images.shape == (2, 3, 128, 128)


def test_latents_are_tied_to_the_map(make_pipeline):
    pipe = make_pipeline(3)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    output = call(pipe, [1, 2], grain_map="random", output_type="latent")
    assert len(output.grain_maps.unique()) == 3
    check_tied(output.images, output.grain_maps)


def test_learned_variance_reaches_the_scheduler(make_pipeline, make_content_model):
    # 2C channels: a scheduler that learns the variance reads them all, any other only the noise.
    pipe = make_pipeline(transformer=make_content_model(out_channels=8))
    fixed = call(pipe, 1, grain_map="fine", output_type="latent").images
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned_range")
    learned = call(pipe, 1, grain_map="fine", output_type="latent").images
    assert fixed.shape == learned.shape == (1, 4, 8, 8)
    with torch.no_grad():
        pipe.transformer.norm_out.proj_out.bias.view(2, 2, 8)[..., 4:] += 3  # more variance
    assert not torch.equal(learned, call(pipe, 1, grain_map="fine", output_type="latent").images)


# ---- Grain maps ----


def test_given_map_is_used_in_every_form(make_pipeline):
    pipe = make_pipeline()
    grain_map = torch.tensor([[0, 1, 0, 1]] * 4)
    outputs = [call(pipe, [1, 2], grain_map=m) for m in (grain_map, grain_map.numpy(), grain_map[None])]
    outputs.append(call(pipe, [1, 2], grain_map=torch.stack([grain_map, grain_map])))
    for output in outputs:
        assert torch.equal(output.grain_maps, grain_map.expand(2, 4, 4))
        assert torch.equal(output.images, outputs[0].images)


def test_named_maps(make_pipeline):
    pipe = make_pipeline(3)
    assert call(pipe, 1, grain_map="coarse", **MAP_ALONE).grain_maps.eq(0).all()
    assert call(pipe, 1, grain_map="fine", **MAP_ALONE).grain_maps.eq(2).all()
    for ratio, expected in ((0.25, [0.375, 0.375, 0.25]), (None, [0.3, 0.3, 0.4])):  # None: that of the autoencoder
        drawn = call(pipe, [1] * 64, grain_map="random", fine_ratio=ratio, **MAP_ALONE).grain_maps
        assert [(drawn == grain).float().mean().item() for grain in range(3)] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("num_grains", [2, 3])
@pytest.mark.parametrize("fine_ratio", [0.0, 0.3, 0.5, 1.0])
def test_fine_ratio_is_met_exactly(make_pipeline, num_grains, fine_ratio):
    grain_maps = call(make_pipeline(num_grains), [1, 2, 3], fine_ratio=fine_ratio, **MAP_ALONE).grain_maps
    share = fine_share(grain_maps, num_grains)
    assert torch.equal(share, torch.full((3,), round(16 * fine_ratio) / 16))


def test_fine_ratio_trims_the_likeliest_regions():
    # Without noise in the network's opinion: fine where it says so, in order of its confidence.
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1] = torch.tensor([[3.0, -1.0], [2.0, 1.0]])
    for number, expected in (
        (None, [[1, 0], [1, 1]]),
        (1, [[1, 0], [0, 0]]),
        (2, [[1, 0], [1, 0]]),
        (4, [[1, 1], [1, 1]]),
    ):
        assert grain_map_from_logits(logits, [number]).tolist() == [expected]
    # Of three grains the others keep the likelier of theirs; confidence is against both together
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.5], [-9.0, -9.0, 0.0]]).T.view(1, 3, 1, 3)
    assert grain_map_from_logits(logits, [1]).tolist() == [[[0, 1, 2]]]
    assert grain_map_from_logits(logits, [2]).tolist() == [[[0, 2, 2]]]


def test_grain_guidance_of_one_is_the_conditional_model(make_grain_model, make_pipeline):
    model, scheduler = make_grain_model(), make_pipeline().grain_scheduler
    labels = torch.tensor([1, 2])

    def draw(scale, labels):
        generator = torch.Generator().manual_seed(0)
        return sample_grain_map(model, scheduler, (8, 8), labels, 2, 5, scale, generator=generator)

    passes = CountPasses(model)
    conditional = draw(1.0, labels)
    assert passes.batches == [2] * 5
    assert torch.equal(draw(1.0, labels), conditional)
    assert len(passes.batches) == 10
    assert torch.equal(draw(0.0, labels), draw(1.0, torch.full_like(labels, 10)))  # 0: the unconditional model
    assert not torch.equal(draw(50.0, labels), conditional)


def test_map_from_image_is_that_of_the_autoencoder(make_pipeline, photos):
    pipe = make_pipeline()
    expected = pipe.vae.encode(photos, fine_ratio=0.3).grain_map
    assert torch.equal(pipe.grain_map_from_image((photos + 1) / 2, 0.3, 64, 64), expected)
    array = ((photos + 1) / 2).permute(0, 2, 3, 1).numpy()
    pictures = pipe.image_processor.postprocess(photos, output_type="pil")
    for images, index in ((array, slice(8)), (array[0], slice(1)), (pictures, slice(8)), (pictures[0], slice(1))):
        assert torch.equal(pipe.grain_map_from_image(images, 0.3, 64, 64), expected[index])
    assert torch.equal(call(pipe, [1] * 8, grain_map=expected, **MAP_ALONE).grain_maps, expected)


# ---- Guidance and callbacks ----


def test_guidance_interval_decides_which_steps_take_two_passes(make_pipeline):
    pipe = make_pipeline()
    passes = CountPasses(pipe.transformer)
    for arguments, expected in (
        ({"guidance_interval": (0.2, 0.5)}, [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]),
        ({"guidance_scale": 1.0}, [1] * 10),
        ({"guidance_interval": (0.5, 0.5)}, [1] * 10),
        ({"guidance_power": 2.0}, [1] + [2] * 9),  # from 1 at the start
    ):
        passes.batches.clear()
        call(pipe, 1, num_inference_steps=10, **arguments)
        assert passes.batches == expected


def test_guidance_is_linear_between_the_two_predictions(make_pipeline):
    # One DDIM step is linear in the noise, so the latents are too: w = 0 is unconditional, w = 1 conditional.
    pipe = make_pipeline()

    def latents(scale):
        return call(
            pipe, 1, num_inference_steps=1, guidance_scale=scale, grain_map="fine", output_type="latent"
        ).images

    null, conditional, guided = latents(0.0), latents(1.0), latents(3.0)
    torch.testing.assert_close(guided, null + 3 * (conditional - null), atol=1e-2, rtol=1e-3)
    assert not torch.allclose(guided, conditional)


def test_power_cosine_schedule_rises_from_one_to_the_scale(make_pipeline):
    pipe = make_pipeline()
    pipe._guidance_scale = 5.0
    for progress, power, expected in ((0.0, 2.0, 1.0), (0.5, 1.0, 3.0), (0.5, 2.0, 3 - 2**0.5), (0.999, 2.0, 5.0)):
        assert pipe._guidance_at(progress, (0.0, 1.0), power) == pytest.approx(expected, abs=0.01)
    assert pipe._guidance_at(0.5, (0.0, 1.0), None) == 5.0
    assert pipe._guidance_at(0.5, (0.6, 1.0), None) == pipe._guidance_at(0.6, (0.0, 0.6), 2.0) == 1.0


def test_callback_sees_every_step_and_may_change_everything(make_pipeline):
    pipe = make_pipeline()
    seen = []

    def stop_guiding(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tuple(tensors["latents"].shape)))
        pipe._guidance_scale = 1.0
        return {"latents": torch.zeros_like(tensors["latents"])}

    passes = CountPasses(pipe.transformer)
    output = call(pipe, 1, num_inference_steps=4, callback_on_step_end=stop_guiding, output_type="latent")
    assert [step for step, _, _ in seen] == [0, 1, 2, 3] and seen[0][1] > seen[-1][1]
    assert passes.batches == [2, 1, 1, 1]
    assert not output.images.any()


@pytest.mark.parametrize(
    "cutoff", [{"cutoff_step_ratio": 0.5}, {"cutoff_step_ratio": None, "cutoff_step_index": 2}], ids=["ratio", "index"]
)
@pytest.mark.parametrize("several", [False, True])
def test_guidance_ends_where_a_callback_cuts_it_off(make_pipeline, cutoff, several):
    pipe = make_pipeline()
    callback = D2iTCFGCutoffCallback(**cutoff)  # step 2 is the last that is guided
    if several:
        callback = MultiPipelineCallbacks([callback])
    steps = {"num_inference_steps": 4, "output_type": "latent"}
    cut = call(pipe, 1, guidance_interval=(0, 1), callback_on_step_end=callback, **steps).images
    assert torch.equal(cut, call(pipe, 1, guidance_interval=(0, 0.75), **steps).images)
    assert not torch.equal(cut, call(pipe, 1, guidance_interval=(0, 1), **steps).images)


def test_a_callback_for_other_tensors_is_refused(make_pipeline):
    with pytest.raises(ValueError, match="`callback_on_step_end_tensor_inputs`.*prompt_embeds"):
        call(make_pipeline(), 1, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))


def test_untied_latents_of_a_callback_are_tied_again_and_it_may_interrupt(make_pipeline):
    def scatter(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {"latents": torch.randn_like(tensors["latents"])}

    pipe = make_pipeline()
    passes = CountPasses(pipe.transformer)
    output = call(
        pipe, 1, num_inference_steps=5, grain_map="coarse", callback_on_step_end=scatter, output_type="latent"
    )
    check_tied(output.images, output.grain_maps)
    assert len(passes.batches) == 2


def test_latents_fix_the_noise(make_pipeline):
    pipe = make_pipeline()
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    grain_map = torch.tensor([[0, 1, 1], [1, 0, 1]]).repeat(2, 2)
    first = call(pipe, [1, 2], latents=noise, grain_map=grain_map, seed=0)
    second = call(pipe, [1, 2], latents=noise, grain_map=grain_map, seed=1)
    assert torch.equal(first.images, second.images)
    assert call(pipe, [1, 2], latents=noise).grain_maps.shape == (2, 4, 6)


def test_bf16_pipeline_is_close_to_fp32(make_pipeline):
    exact = call(make_pipeline(), [1, 2], grain_map="random").images
    rough = call(make_pipeline().to(torch.bfloat16), [1, 2], grain_map="random").images
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.02


# ---- Bad input ----


MAP = torch.zeros(4, 4, dtype=torch.int64)


@pytest.fixture(scope="module")
def refusing(make_pipeline) -> D2iTPipeline:
    return make_pipeline()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": "clas 3"}, "`class_labels`.*'clas 3'.*'class 3'"),
        ({"class_labels": 11}, "`class_labels`.*11.*9 .class 9"),
        ({"class_labels": [1.5]}, "`class_labels`.*1.5"),
        ({"class_labels": None}, "`class_labels`"),
        ({"guidance_interval": (0.8, 0.2)}, "`guidance_interval`.*0.8, 0.2"),
        ({"guidance_interval": (-0.1, 0.5)}, "`guidance_interval`.*-0.1"),
        ({"grain_map": "fine", "fine_ratio": 0.5}, "`fine_ratio`.*`grain_map`"),
        ({"grain_map": MAP, "fine_ratio": 0.5}, "`fine_ratio`.*`grain_map`"),
        ({"grain_map": MAP.expand(3, 4, 4)}, "`grain_map`.*2 images.*3"),
        ({"grain_map": MAP, "height": 40, "width": 32}, "grain_map 4x4.*5x4"),
        ({"height": 36, "width": 32}, "`height`.*8.*36"),
        ({"width": 36}, "`width`.*8.*36"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"`latents`.*\(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"`latents`.*\(2, 3, 8, 8\)"),
        ({"latents": torch.zeros(2, 4, 8, 7)}, r"`latents`.*\(2, 4, 8, 7\)"),
        ({"latents": torch.zeros(2, 4, 8)}, r"`latents`.*\(2, 4, 8\)"),
        ({"latents": torch.zeros(2, 4, 8, 8).long()}, "`latents`.*int64"),
        ({"latents": torch.full((2, 4, 8, 8), float("nan"))}, "`latents`.*finite"),
        ({"latents": torch.zeros(2, 4, 8, 8), "height": 64, "width": 64}, "height and width 8x8.*latents 4x4"),
        ({"generator": [torch.Generator() for _ in range(3)]}, "`generator`.*2"),
        ({"generator": 3}, r"`generator` must be torch\.Generator .*, got 3"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`.*'noise'"),
    ],
)
def test_bad_argument_is_named(refusing, arguments, message):
    with pytest.raises(ValueError, match=message):
        refusing(**({"class_labels": [1, 2], "num_inference_steps": 2} | arguments))


def test_only_named_classes_can_be_asked_for(make_pipeline):
    pipe = make_pipeline(id2label={2: "cat", 5: "dog, hound", 7: "cat"})
    assert pipe.get_label_ids("hound") == [5]
    assert pipe.get_label_ids(["dog", "dog, hound"]) == [5, 5]
    with pytest.raises(ValueError, match=r"`class_labels`.*'cat'.*\[2, 7\]"):
        pipe.get_label_ids("cat")
    with pytest.raises(ValueError, match="`class_labels`.*3.*2 .cat"):
        call(pipe, 3)
    without = make_pipeline(id2label=None)
    with pytest.raises(ValueError, match="`class_labels`.*'cat'.*`id2label`"):
        without.get_label_ids("cat")
    assert call(without, 3).images.shape[0] == 1  # without names every id of the model is valid


def test_images_for_maps_are_checked(make_pipeline, photos):
    pipe, unit = make_pipeline(), (photos + 1) / 2
    for image, message in (
        (PIL.Image.new("RGB", (60, 15)), "`image`.*60x15"),
        (unit[..., :15], "`image`.*15x64"),
        (unit * 3, r"`image`.*\[0, 1\]"),
        (unit - 0.5, r"`image`.*\[0, 1\]"),
        (unit * float("nan"), r"`image`.*\[0, 1\].*nan"),
        (np.zeros((1, 64, 64, 3), dtype=np.int32), "`image`.*int32"),
        ([], "`image`.*list"),
        ("photo.png", "`image` photo.png.*no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.grain_map_from_image(image)
    with pytest.raises(ValueError, match="`fine_ratio`.*-0.1"):
        pipe.grain_map_from_image(unit, fine_ratio=-0.1)


@pytest.mark.parametrize(
    "components, message",
    [
        (lambda vae, grain, content: {"transformer": content(in_channels=3)}, "in_channels"),
        (lambda vae, grain, content: {"transformer": content(num_grains=3)}, "num_grains"),
        (lambda vae, grain, content: {"grain_model": grain(num_grains=3)}, "grain_model.num_grains"),
        (lambda vae, grain, content: {"grain_model": grain(num_classes=7)}, "grain_model.num_classes"),
        (lambda vae, grain, content: {"grain_scheduler": DDPMScheduler()}, "`grain_scheduler`.*'epsilon'"),
        (lambda vae, grain, content: {"grain_scheduler": FLOW()}, "`grain_scheduler`.*FlowMatchEulerDiscrete.*None"),
        (
            # The configuration keeps what the scheduler does not have
            lambda vae, grain, content: {"grain_scheduler": FLOW.from_config({"prediction_type": "sample"})},
            "`grain_scheduler`.*FlowMatchEulerDiscrete",
        ),
        (lambda vae, grain, content: {"grain_model": None}, "`grain_model`.*`grain_scheduler`"),
        (lambda vae, grain, content: {"scheduler": VQDiffusionScheduler(8)}, "`scheduler`.*VQDiffusionScheduler"),
        (lambda vae, grain, content: {"scheduler": LEARNED}, "`scheduler`.*'learned_range'"),
        (
            lambda vae, grain, content: {
                "scheduler": DPMSolverMultistepScheduler.from_config(LEARNED.config, variance_type="learned"),
                "transformer": content(out_channels=8),
            },
            "`scheduler` DPMSolverMultistepScheduler.*'learned'",
        ),
        (lambda vae, grain, content: {"id2label": {10: "beyond"}}, "`id2label`.*10"),
        (lambda vae, grain, content: {"id2label": {-1: "before"}}, "`id2label`.*-1"),
    ],
)
def test_components_must_fit(make_pipeline, make_vae, make_grain_model, make_content_model, components, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**components(make_vae, make_grain_model, make_content_model))


def test_without_a_grain_model_a_map_is_required(make_pipeline):
    pipe = make_pipeline(grain_model=None, grain_scheduler=None)
    assert call(pipe, 1, grain_map="random").images.shape[0] == 1
    with pytest.raises(ValueError, match="`grain_map`"):
        call(pipe, 1)
