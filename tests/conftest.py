# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Real photographs and real, tiny components, the same in every test: all of it built from fixed seeds.

    photos                  (8, 3, 64, 64) in [-1, 1], float32
    load_photos(resolution) the same photographs at another size
    calibrate(region_size)  entropy calibration counted on them, as it stands in a DVAE's config
    make_vae(num_grains=2, seed=0, **overrides)                                 calibrated, in eval mode as all models
    make_grain_model(num_grains=2, num_classes=10, randomize=True, seed=1, **overrides)
    make_content_model(num_grains=2, num_classes=10, randomize=True, seed=2, **overrides)
    make_dcdit(num_classes=10, randomize=True, seed=1, **overrides)              keeps 2 of 5 cells
    make_pipeline(num_grains=2, num_classes=10, id2label=..., **components)     of them and DDIM schedulers
    make_autoencoder_kl(seed=0, **overrides)                                    of diffusers, four pixels a cell
    make_dcdit_pipeline(num_classes=10, id2label=..., **components)             of these two and a DDIM scheduler

Two grains see 32 px images, 8x8 latents and 4x4 maps; three grains 64 px images, 16x16 latents and 4x4 maps.
"""

import gc
import signal
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from photographs import load_photographs

from diffusers_d2it import (
    D2iTContentModel,
    D2iTGrainModel,
    D2iTPipeline,
    DCDiTModel,
    DCDiTPipeline,
    DynamicAutoencoderKL,
    load_preset,
)
from diffusers_d2it.entropy import EntropyCalibration


torch.set_num_threads(1)  # components are tiny: more threads only wait for one another
# Under nohup, and behind & in a script, these are ignored, in every process that a test starts too: what is ignored is
# not handled by a run
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_ID2LABEL = {id: f"class {id}, synonym {id}" for id in range(10)}


@cache
def _calibrate(region_size: int) -> dict:
    calibration = EntropyCalibration(region_size=region_size)
    calibration.update(load_photographs(64))
    return calibration.to_config(source="photographs of scikit-image, 64x64 centre crops")


def _make_transformer(cls: type, config: dict, randomize: bool, seed: int) -> torch.nn.Module:
    """Every parameter normal with std 0.05 if asked, so that no path is dead because adaLN-Zero starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**config).eval()
    if randomize:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.05, generator=generator)
    return model


def _make_vae(num_grains: int = 2, seed: int = 0, **overrides) -> DynamicAutoencoderKL:
    config = load_preset("dvae-tiny")
    if num_grains == 3:
        config.update(
            downsample_factors=[4, 8, 16],
            block_out_channels=[8, 8, 16, 16, 16],
            grain_ratios=[0.3, 0.3, 0.4],
            sample_size=64,
        )
    config.update(calibration=_calibrate(config["downsample_factors"][-1]))
    config.update(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DynamicAutoencoderKL(**config).eval()


def _make_grain_model(
    num_grains: int = 2, num_classes: int | None = 10, randomize: bool = True, seed: int = 1, **overrides
) -> D2iTGrainModel:
    config = load_preset("grain-tiny") | {"num_grains": num_grains, "num_classes": num_classes}
    return _make_transformer(D2iTGrainModel, config | overrides, randomize, seed)


def _make_content_model(
    num_grains: int = 2, num_classes: int | None = 10, randomize: bool = True, seed: int = 2, **overrides
) -> D2iTContentModel:
    config = load_preset("content-tiny") | {"num_grains": num_grains, "num_classes": num_classes}
    if num_grains == 3:
        config["sample_size"] = 16
    return _make_transformer(D2iTContentModel, config | overrides, randomize, seed)


def _make_dcdit(num_classes: int | None = 10, randomize: bool = True, seed: int = 1, **overrides) -> DCDiTModel:
    config = load_preset("dcdit-tiny") | {"num_classes": num_classes}
    return _make_transformer(DCDiTModel, config | overrides, randomize, seed)


def _make_autoencoder_kl(seed: int = 0, **overrides) -> AutoencoderKL:
    config = {
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**config | overrides).eval()


def _make_dcdit_pipeline(
    num_classes: int | None = 10, id2label: dict[int, str] | None = _ID2LABEL, **components
) -> DCDiTPipeline:
    """A pipeline of tiny components, whose router keeps about two cells of five; `components` replaces any of them."""
    defaults = {
        "vae": _make_autoencoder_kl(),
        "transformer": _make_dcdit(num_classes),
        "scheduler": DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        "id2label": id2label if num_classes is not None else None,
    }
    pipe = DCDiTPipeline(**(defaults | components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _make_pipeline(
    num_grains: int = 2, num_classes: int | None = 10, id2label: dict[int, str] | None = _ID2LABEL, **components
) -> D2iTPipeline:
    """A pipeline of tiny components; `components` replaces any of them. An unconditional one has no names."""
    defaults = {
        "vae": _make_vae(num_grains),
        "grain_model": _make_grain_model(num_grains, num_classes),
        "transformer": _make_content_model(num_grains, num_classes),
        "scheduler": DDIMScheduler(
            beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing"
        ),
        "grain_scheduler": DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing"),
        "id2label": id2label if num_classes is not None else None,
    }
    pipe = D2iTPipeline(**(defaults | components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _fixture(make):
    return pytest.fixture(scope="session")(lambda: make)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now is no garbage: no collection searches it again


@pytest.fixture
def photos() -> torch.Tensor:
    return load_photographs(64).clone()


@pytest.fixture
def fresh_compiler():
    """Nothing that was compiled before or in a test is left."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


load_photos = _fixture(lambda resolution: load_photographs(resolution).clone())
calibrate = _fixture(lambda region_size: dict(_calibrate(region_size)))
make_vae = _fixture(_make_vae)
make_grain_model = _fixture(_make_grain_model)
make_content_model = _fixture(_make_content_model)
make_dcdit = _fixture(_make_dcdit)
make_pipeline = _fixture(_make_pipeline)
make_autoencoder_kl = _fixture(_make_autoencoder_kl)
make_dcdit_pipeline = _fixture(_make_dcdit_pipeline)
