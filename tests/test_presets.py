# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Presets are the paper's sizes; samplers solve the equation of the scheduler that they replace."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from grain_maps import check_tied

from diffusers_d2it import (
    D2iTContentModel,
    D2iTGrainModel,
    DCDiTModel,
    DynamicAutoencoderKL,
    list_presets,
    load_preset,
)
from diffusers_d2it.presets import list_samplers, load_sampler


CLASSES = {"dvae": DynamicAutoencoderKL, "grain": D2iTGrainModel, "content": D2iTContentModel, "dcdit": DCDiTModel}


def build(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return CLASSES[name.split("-")[0]](**load_preset(name))


@pytest.mark.parametrize(
    ("name", "millions", "num_blocks"),
    [("grain-s", 33, 12), ("content-b", 136, 12), ("content-l", 467, 24), ("content-xl", 687, 28)],
)
def test_parameters_are_those_of_the_paper(name, millions, num_blocks):
    model = build(name)
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.005)
    # Refine layers replace layers of the backbone
    assert model.config.num_layers + model.config.get("num_refine_layers", 0) == num_blocks


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_is_a_whole_configuration_of_its_model(name):
    """Every key is an argument of the model, and what is built has the values of the file."""
    model = build(name)
    for key, value in load_preset(name).items():
        stored = model.config[key]
        assert (list(stored) if isinstance(stored, tuple) else stored) == value


@pytest.mark.parametrize("content", ["content-b", "content-l", "content-xl", "content-tiny"])
def test_presets_of_one_family_fit_one_another(content):
    tiny = content == "content-tiny"
    names = ("dvae-tiny", "grain-tiny", content) if tiny else ("dvae-f8f16", "grain-s", content)
    dvae, grain, content = map(build, names)
    side = dvae.config.sample_size
    assert content.config.sample_size == side // dvae.downsample_factor
    assert grain.config.sample_size == side // dvae.region_size
    assert dvae.num_grains == grain.config.num_grains == content.config.num_grains == 2
    assert dvae.config.latent_channels == content.config.in_channels
    assert grain.config.num_classes == content.config.num_classes
    if tiny:
        assert sum(model.num_parameters() for model in (dvae, grain, content)) < 1e6
    else:
        assert (side, content.config.num_classes) == (256, 1000)


def test_a_json_file_is_read_like_a_preset(tmp_path):
    config = load_preset("grain-tiny") | {"num_classes": 7}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    assert load_preset(str(path)) == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("content-xxl", "'content-xxl'.*'content-xl'.*content-b"),
        ("Grain-s", "'Grain-s'.*'grain-s'"),
        ("zzz", "'zzz'.*content-b"),
        ("missing.json", "'missing.json'"),
    ],
)
def test_an_unknown_preset_is_refused_with_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        load_preset(name)


# ---- Samplers ----

PAPER = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
MEAN, STD = 0.7, 0.5  # of normal data, for which the best network and the end of every path are known


def ddim(**config) -> DDIMScheduler:
    return DDIMScheduler(**(PAPER | {"clip_sample": False, "timestep_spacing": "trailing"} | config))


def distance_to_the_end(scheduler, num_inference_steps: int, alpha_sigma, predict) -> float:
    """How far a solver ends from where the paths of normal data end: at MEAN + STD * noise.

    alpha_sigma(t) gives z_t = alpha * data + sigma * noise; predict(alpha, sigma, data, noise) is what the best
    network says, from the expectations of data and noise.
    """
    scheduler.set_timesteps(num_inference_steps)
    start = torch.linspace(-2, 2, 9).view(1, 1, 1, -1)
    sample = start.clone()
    for t in scheduler.timesteps:
        alpha, sigma = alpha_sigma(t)
        deviation = (sample - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        prediction = predict(alpha, sigma, MEAN + alpha * STD**2 * deviation, sigma * deviation)
        sample = scheduler.step(prediction, t, sample, return_dict=False)[0]
    return (sample - (MEAN + STD * start)).abs().max().item()


@pytest.mark.parametrize("name", list_samplers())
@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 1.2e-2},
    ],
    ids=["epsilon", "velocity", "zero-snr", "scaled-linear"],
)
def test_twenty_steps_come_nearer_than_fifty_of_ddim(name, config):
    scheduler = ddim(**config)
    cumulative = scheduler.alphas_cumprod
    predict = {
        "epsilon": lambda alpha, sigma, data, noise: noise,
        "v_prediction": lambda alpha, sigma, data, noise: alpha * noise - sigma * data,
    }[config["prediction_type"]]

    def alpha_sigma(t):
        return cumulative[t].sqrt(), (1 - cumulative[t]).sqrt()

    error = distance_to_the_end(load_sampler(name, scheduler), 20, alpha_sigma, predict)
    assert error < distance_to_the_end(scheduler, 50, alpha_sigma, predict)
    assert error < 0.25 * distance_to_the_end(scheduler, 20, alpha_sigma, predict)


@pytest.mark.parametrize("name", list_samplers())
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("flow", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flows_are_solved_too(name, shift, flow):
    def alpha_sigma(t):
        return 1 - t / 1000, t / 1000

    def predict(alpha, sigma, data, noise):
        return noise - data

    sampler = load_sampler(name, flow(shift=shift))
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    error = distance_to_the_end(sampler, 20, alpha_sigma, predict)
    assert error < 0.25 * distance_to_the_end(euler, 20, alpha_sigma, predict)
    assert load_sampler(name, sampler).config == sampler.config


@pytest.mark.parametrize("name", list_samplers())
def test_a_sampler_takes_over_what_was_trained_and_nothing_else(name):
    trained = PAPER | {"beta_end": 1.5e-2, "num_train_timesteps": 500, "prediction_type": "v_prediction"}
    expected = load_sampler(name, DDPMScheduler(**trained))
    assert {key: expected.config[key] for key in trained} == trained
    for scheduler in (
        DDPMScheduler(**trained, variance_type="learned_range", clip_sample=True),
        EulerDiscreteScheduler(**trained, use_karras_sigmas=True, timestep_spacing="leading", steps_offset=1),
        *(load_sampler(other, DDPMScheduler(**trained)) for other in list_samplers()),
    ):
        assert load_sampler(name, scheduler).config == expected.config


@pytest.mark.parametrize("name", list_samplers())
def test_a_pipeline_runs_with_it_and_keeps_it(name, make_pipeline, make_content_model, tmp_path):
    """Also with a network that predicts the variance, which is then left unused."""
    pipe = make_pipeline(
        transformer=make_content_model(out_channels=8),
        scheduler=DDPMScheduler(**PAPER, variance_type="learned_range", clip_sample=False),
    )
    pipe.scheduler = load_sampler(name, pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(pipe.scheduler)
    outputs = [
        one([3, 5], num_inference_steps=4, generator=torch.manual_seed(0), output_type="latent")
        for one in (pipe, loaded)
    ]
    assert torch.equal(outputs[0].images, outputs[1].images)
    check_tied(outputs[0].images, outputs[0].grain_maps)


@pytest.mark.parametrize(
    ("name", "scheduler", "message"),
    [
        ("unipx", ddim(), "'unipx'.*'unipc'"),
        ("content-b", ddim(), r"'content-b'.*dpmsolver\+\+, unipc"),
        ("unipc", "ddim", "`scheduler`.*str"),
        ("unipc", EDMEulerScheduler(), "`scheduler` EDMEulerScheduler"),
        ("unipc", ddim(prediction_type="flow"), "epsilon, v_prediction, sample.*'flow'"),
        ("unipc", DDPMScheduler(beta_schedule="sigmoid"), "'unipc'.*'sigmoid'"),
        ("unipc", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
        ("unipc", FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
    ],
)
def test_what_a_sampler_cannot_follow_is_refused(name, scheduler, message):
    with pytest.raises(ValueError, match=message):
        load_sampler(name, scheduler)


def test_a_noise_schedule_that_its_config_does_not_tell_is_refused():
    scheduler = ddim()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    with pytest.raises(ValueError, match="'unipc'.*`scheduler` DDIMScheduler"):
        load_sampler("unipc", scheduler)


@pytest.mark.parametrize(
    "content, named",
    [("{", "preset.json"), ("[]", "preset.json.*list"), ('{"downsample_factors": [8, 16]}', "downsample_factors")],
)
def test_a_file_that_is_no_preset_of_the_model_is_named(content, named, tmp_path):
    (tmp_path / "preset.json").write_text(content)
    with pytest.raises(ValueError, match=named):
        load_preset(str(tmp_path / "preset.json"), D2iTContentModel)


@pytest.mark.parametrize("name, model", [("dvae-tiny", D2iTGrainModel), ("content-b", D2iTGrainModel)])
def test_a_preset_of_another_model_is_refused(name, model):
    with pytest.raises(ValueError, match=f"{name}.*{model.__name__}"):
        load_preset(name, model)
