# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""DCDiTPipeline: what it draws is a plain loop of forward passes, within the budget, and it tells where it spent."""

import copy

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForText2Image,
    DDPMScheduler,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipeline_calls import call_with
from safetensors.torch import load_file, save_file

from diffusers_d2it import DCDiTPipeline, visualize_boundary_map
from diffusers_d2it.evaluation.cost import ForwardMeter


call = call_with(num_inference_steps=3, output_type="latent")


@pytest.fixture
def pipe(make_dcdit_pipeline) -> DCDiTPipeline:
    return make_dcdit_pipeline()


# ---- What it computes ----


@torch.no_grad()
def plain_loop(pipe, ids, noise, num_steps, scale, interval, budget, null_budget):
    """Two forward passes a guided step, each with its own budget; and the cells that the first kept."""
    scheduler, kept = copy.deepcopy(pipe.scheduler), []
    scheduler.set_timesteps(num_steps)
    latents, labels = noise * getattr(scheduler, "init_noise_sigma", 1.0), torch.tensor(ids)
    null = torch.full_like(labels, pipe.transformer.config.num_classes)
    for i, t in enumerate(scheduler.timesteps):
        scaled = getattr(scheduler, "scale_model_input", lambda latents, t: latents)
        model_input = scaled(latents, t)
        output = pipe.transformer(model_input, t, labels, budget=budget)
        predicted = output.sample
        if interval[0] <= i / num_steps < interval[1]:
            other = pipe.transformer(model_input, t, null, budget=null_budget).sample
            predicted = other + scale * (predicted - other)
        latents = scheduler.step(predicted, t, latents).prev_sample
        kept.append(output.kept)
    return latents, torch.stack(kept, dim=1)


@pytest.mark.parametrize(
    ("components", "budget", "null_budget"),
    [
        ({}, 1.0, None),
        ({}, 0.5, None),
        ({}, 1.0, 0.1),
        ({"scheduler": UniPCMultistepScheduler()}, 1.0, 0.1),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, 1.0, 0.1),
    ],
)
def test_is_a_plain_loop(make_dcdit_pipeline, components, budget, null_budget):
    pipe = make_dcdit_pipeline(**components)
    noise, budgets = torch.randn(2, 4, 8, 8), {"budget": budget, "null_budget": null_budget}
    settings = {"guidance_scale": 3.0, "guidance_interval": (0.5, 1.0), "return_boundary_maps": "all"}
    output = call(pipe, [1, 7], latents=noise, num_inference_steps=4, **settings, **budgets)
    null_budget = budget if null_budget is None else null_budget
    latents, kept = plain_loop(pipe, [1, 7], noise, 4, 3.0, (0.5, 1.0), budget, null_budget)
    torch.testing.assert_close(output.images, latents, atol=1e-5, rtol=1e-4)
    assert output.boundary_maps.equal(kept)


def test_a_budget_takes_a_share_of_the_tokens_and_the_others_stay(pipe):
    whole, half = (call(pipe, 1, budget=budget, num_inference_steps=1) for budget in (1.0, 0.5))
    number = whole.token_counts.item()
    assert half.token_counts.item() == number - number // 2 and 10 < number < 60
    assert not (half.boundary_maps & ~whole.boundary_maps).any()


def test_several_budgets_of_one_label_have_the_same_noise(pipe):
    together = call(pipe, 1, budget=[1.0, 0.5, 0.1])
    for i, budget in enumerate((1.0, 0.5, 0.1)):
        alone = call(pipe, 1, budget=budget)
        torch.testing.assert_close(together.images[i], alone.images[0], atol=1e-5, rtol=1e-5)
        assert together.token_counts[i].equal(alone.token_counts[0])
    assert together.token_counts.float().mean(dim=1).diff().lt(0).all()


def test_budgets_go_with_their_labels(pipe):
    output = call(pipe, [1, 2], budget=[1.0, 0.3], null_budget=np.array([0.5, 0.1]), num_images_per_prompt=2)
    counts = output.token_counts.float().mean(dim=1)
    assert counts[:2].min() > 2 * counts[2:].max()


def test_an_image_does_not_depend_on_its_batch(pipe):
    together = call(pipe, [1, 2], latents=(noise := torch.randn(2, 4, 8, 8)), budget=[0.4, 1.0], null_budget=0.1)
    alone = call(pipe, [2], latents=noise[1:], budget=1.0, null_budget=0.1)
    torch.testing.assert_close(together.images[1:], alone.images, atol=1e-5, rtol=1e-5)


def test_tokens_are_told_step_by_step(pipe):
    last, whole = (call(pipe, [1, 2], return_boundary_maps=which) for which in ("last", "all"))
    assert whole.boundary_maps.shape == (2, 3, 8, 8) and whole.boundary_maps.dtype == torch.bool
    assert whole.boundary_maps[:, -1].equal(last.boundary_maps)
    assert whole.boundary_maps.flatten(2).sum(dim=2).equal(whole.token_counts) and whole.images.equal(last.images)
    images, maps, counts = call(pipe, [1, 2], return_dict=False)
    assert images.equal(last.images) and maps.equal(last.boundary_maps) and counts.equal(last.token_counts)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert call(pipe, 1).token_counts.shape == (1, 5)  # a scheduler of second order asks the model twice


def test_both_models_by_one_argument(pipe, make_pipeline):
    """What draws and measures a model asks it for its budget, and knows nothing else of it."""
    for one in (pipe, make_pipeline()):
        spent = []
        for budget in (1.0, 0.5):
            with ForwardMeter(one.transformer, counts_macs=True) as meter:
                images = call(one, [1, 2], output_type="np", **one.transformer.budget_argument.at(budget)).images
            assert images.shape == (2, 32, 32, 3)
            spent.append((sum(meter.tokens.values()), meter.macs))
        assert spent[0] > spent[1] and spent[0][1] > spent[1][1]


def test_pictures_of_it(pipe):
    output = call(pipe, ["class 1", "class 2"], output_type="pil")
    pictures = visualize_boundary_map(output.images, output.boundary_maps)
    assert [picture.size for picture in pictures] == [(256, 256)] * 2
    assert pipe.visualize_boundary_map(output.images[0], output.boundary_maps[0]) == pictures[0]
    share = (output.token_counts / 64).mean().item()
    assert f"{share:.2f}" in repr(output) and "2 images 32x32" in repr(output) and output._repr_png_()


def test_other_sizes_and_a_learned_variance(make_dcdit_pipeline, make_dcdit):
    scheduler = DDPMScheduler(clip_sample=False, variance_type="learned_range")
    pipe = make_dcdit_pipeline(transformer=make_dcdit(out_channels=8), scheduler=scheduler)
    output = call(pipe, 1, height=24, width=40, output_type="pt")
    assert output.images.shape == (1, 3, 24, 40) and output.boundary_maps.shape == (1, 6, 10)


def test_an_unconditional_model(make_dcdit_pipeline):
    pipe = make_dcdit_pipeline(num_classes=None)
    assert call(pipe, num_images_per_prompt=2, budget=0.5).images.shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="`null_budget`.*0.5"):
        call(pipe, null_budget=0.5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"budget": 0}, "`budget`.* 0"),
        ({"budget": 1.5}, "`budget`.*1.5"),
        ({"budget": [1.0, 0.5]}, "`budget`.*3.*2"),
        ({"null_budget": [0.1, 0.1]}, "`null_budget`.*3.*2"),
        ({"null_budget": 0.0}, "`null_budget`.*0.0"),
        ({"return_boundary_maps": "first"}, "`return_boundary_maps`.*first"),
        ({"height": 30}, "`height`.*4.*30"),
        ({"height": 24, "latents": torch.randn(3, 4, 8, 8)}, "height and width 6x8.*latents 8x8"),
        ({"latents": torch.randn(3, 3, 8, 8)}, r"`latents`.*\(3, 3, 8, 8\)"),
        ({"grain_map": "fine"}, "`grain_map`.*DCDiTPipeline"),
        ({"fine_ratio": 0.5}, "`fine_ratio`.*budget"),
    ],
)
def test_bad_input_is_named(pipe, arguments, named):
    with pytest.raises((ValueError, TypeError), match=named):
        call(pipe, [1, 2, 3], **arguments)


def test_components_that_do_not_fit_are_named(make_dcdit_pipeline, make_dcdit, make_content_model):
    with pytest.raises(ValueError, match="in_channels is 3.*latent_channels is 4"):
        make_dcdit_pipeline(transformer=make_dcdit(in_channels=3))
    with pytest.raises(ValueError, match="12"):
        make_dcdit_pipeline(id2label={12: "beyond"})
    pipe = make_dcdit_pipeline()
    pipe.transformer = make_content_model()
    with pytest.raises(ValueError, match="`transformer`.*DCDiTModel.*D2iTContentModel"):
        pipe.save_pretrained("nowhere")


# ---- As any pipeline of diffusers ----


@pytest.mark.parametrize("kind", ["make_autoencoder_kl", "make_vae", None])
def test_saved_it_draws_the_same(make_dcdit_pipeline, make_dcdit, request, tmp_path, kind):
    vae = None if kind is None else request.getfixturevalue(kind)()
    pipe = make_dcdit_pipeline(vae=vae)
    settings = {"output_type": "latent" if vae is None else "pt", "null_budget": 0.1}
    expected = call(pipe, 1, **settings).images
    assert pipe.transformer.config.sample_size * 4 == 32 and (vae is None or expected.shape[-1] == 32)
    pipe.save_pretrained(tmp_path)
    for cls in (DCDiTPipeline, DiffusionPipeline, AutoPipelineForText2Image):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is DCDiTPipeline and type(loaded.vae) is type(vae)
        loaded.set_progress_bar_config(disable=True)
        # Convolutions round by where weights lie in memory
        torch.testing.assert_close(call(loaded, "class 1", **settings).images, expected, atol=1e-3, rtol=1e-4)
    again, drawn = DCDiTPipeline.from_pipe(loaded), call(loaded, 1, **settings).images
    assert again.transformer is loaded.transformer and call(again, 1, **settings).images.equal(drawn)


def test_an_autoencoder_of_diffusers_is_whole_and_tells_no_path(make_dcdit_pipeline, make_autoencoder_kl, tmp_path):
    make_autoencoder_kl().save_pretrained(tmp_path / "vae")
    make_dcdit_pipeline(vae=AutoencoderKL.from_pretrained(tmp_path / "vae")).save_pretrained(tmp_path / "pipe")
    config, weights = (
        tmp_path / "pipe" / "vae" / name for name in ("config.json", "diffusion_pytorch_model.safetensors")
    )
    assert str(tmp_path) not in config.read_text()
    (tmp_path / "pipe" / "manifest.json").unlink()
    tensors = load_file(weights)
    name = next(iter(tensors))
    for changed in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name: tensors[name] * torch.nan},
        tensors | {"foreign": tensors[name].clone()},
    ):
        save_file(changed, weights)
        with pytest.raises(ValueError, match=str(tmp_path / "pipe" / "vae")):
            DCDiTPipeline.from_pretrained(tmp_path / "pipe")
    save_file(tensors, weights)
    DCDiTPipeline.from_pretrained(tmp_path / "pipe")


def test_weights_that_lie_elsewhere(pipe, make_dcdit_pipeline, tmp_path):
    expected = call(pipe, [1, 2], output_type="pt", null_budget=0.3).images
    cpu = torch.device("cpu")
    for i, offload in enumerate(
        (
            lambda model: accelerate.cpu_offload(model, execution_device=cpu),
            lambda model: accelerate.disk_offload(model, tmp_path, execution_device=cpu),
            lambda model: model.enable_group_offload(cpu, cpu, offload_type="leaf_level"),
            lambda model: model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1),
        )
    ):
        one = make_dcdit_pipeline()
        offload(one.transformer)
        for _ in range(2):
            assert call(one, [1, 2], output_type="pt", null_budget=0.3).images.equal(expected), i


def test_adapters(pipe, make_dcdit_pipeline, tmp_path):
    plain = call(pipe, 1).images
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
    )
    pipe.transformer.add_adapter(config, "mine")
    expected = call(pipe, 1).images
    assert not expected.equal(plain) and call(pipe, 1, attention_kwargs={"scale": 0.0}).images.equal(plain)
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="mine")
    DCDiTPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    other = make_dcdit_pipeline()
    other.load_lora_weights(tmp_path, adapter_name="mine")
    torch.testing.assert_close(call(other, 1).images, expected)


def test_attention_by_a_backend_of_diffusers(pipe):
    expected = call(pipe, [1, 2], budget=[1.0, 0.3]).images
    pipe.transformer.set_attention_backend("native")
    torch.testing.assert_close(call(pipe, [1, 2], budget=[1.0, 0.3]).images, expected, atol=1e-5, rtol=1e-4)


def test_caches_are_refused(pipe):
    with pytest.raises(ValueError, match="FirstBlockCacheConfig"):
        pipe.transformer.enable_cache(FirstBlockCacheConfig())


def test_half_precision_and_callbacks(make_dcdit_pipeline):
    pipe = make_dcdit_pipeline().to(torch.bfloat16)
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {"latents": tensors["latents"] * 0.5}

    output = call(pipe, 1, callback_on_step_end=stop, num_inference_steps=5)
    assert steps == [0, 1] and output.token_counts.shape == (1, 2) and output.images.isfinite().all()


def test_is_known_to_diffusers():
    assert diffusers.DCDiTPipeline is DCDiTPipeline
