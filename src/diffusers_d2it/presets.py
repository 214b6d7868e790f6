# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The paper's sizes, each once, as JSON in `presets/`, and fast samplers in `presets/samplers/`."""

import inspect
import json
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin

from .words import close_to, shown


_FOLDER = Path(__file__).parent / "presets"
_CHECKPOINTS = Path(__file__).parent / "checkpoints"

# What a network was trained with. All else in the config of a scheduler belongs to its solver.
_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def list_presets() -> list[str]:
    """Names that `load_preset` knows."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_preset(name: str, model: type | None = None) -> dict:
    """Keyword arguments of a model, by name of a preset or from a JSON file of the same form.

        vae = DynamicAutoencoderKL(**load_preset("dvae-f8f16"))

    Args:
        name: one of `list_presets()`, or the path of a file that ends in `.json`.
        model: class of the model; None for any.

    Raises:
        ValueError: no such preset or file; it holds no JSON object, or an argument that `model` does not have.
    """
    path = Path(name) if name.endswith(".json") else _FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"no preset or JSON file {_listed(name, list_presets())}")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    unknown = [] if model is None else sorted(config.keys() - inspect.signature(model.__init__).parameters.keys())
    if unknown:
        raise ValueError(f"{shown(name)} is no preset of {model.__name__}, which has no {', '.join(unknown)}.")
    return config


def list_samplers() -> list[str]:
    """Names that `load_sampler` knows."""
    return sorted(path.stem for path in (_FOLDER / "samplers").glob("*.json"))


def load_sampler(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """A fast solver of diffusers to replace the scheduler of a pipeline.

        pipe.scheduler = load_sampler("unipc", pipe.scheduler)
        image = pipe("lion", num_inference_steps=20).images[0]

    "unipc" (Zhao et al., arXiv:2302.04867) is meant for 15 to 25 steps, "dpmsolver++" (Lu et al., arXiv:2211.01095)
    for 20 to 25. Both are of order 2, with steps of equal log-SNR; flow matching keeps the steps of its scheduler.

    Args:
        name: one of `list_samplers()`.
        scheduler: the scheduler to be replaced. Its noise schedule and prediction type stay, its other settings do
            not. A variance that the network predicts is not used: these solvers draw no noise.

    Raises:
        ValueError: no such sampler, or one that cannot do what the network was trained for.
    """
    if name not in list_samplers():
        raise ValueError(f"no sampler {_listed(name, list_samplers())}")
    if not isinstance(scheduler, SchedulerMixin):
        raise ValueError(f"`scheduler` must be a scheduler of diffusers, got {type(scheduler).__name__}.")
    preset = json.loads((_FOLDER / "samplers" / f"{name}.json").read_text(encoding="utf-8"))
    solver = getattr(diffusers, preset["scheduler"])
    config = scheduler.config
    # A config made from another scheduler's keeps entries that this one does not know.
    known = inspect.signature(type(scheduler).__init__).parameters
    if "shift" in known or ("use_flow_sigmas" in known and config.use_flow_sigmas):
        for setting in ("use_dynamic_shifting", "invert_sigmas"):
            if config.get(setting):
                raise ValueError(
                    f"`scheduler` {type(scheduler).__name__} has {setting}=True, which samplers do not follow."
                )
        return solver(
            num_train_timesteps=config["num_train_timesteps"],
            prediction_type="flow_prediction",
            flow_shift=config["shift" if "shift" in known else "flow_shift"],
            **preset["settings"],
            **preset["flow_spacing"],
        )
    if "beta_schedule" not in config:
        raise ValueError(f"`scheduler` {type(scheduler).__name__} has no betas and is none of flow matching.")
    if config.get("prediction_type", "epsilon") not in _PREDICTION_TYPES:
        raise ValueError(
            f"samplers need a `scheduler` of prediction_type {', '.join(_PREDICTION_TYPES)}, got"
            f" {config['prediction_type']!r}."
        )
    kept = {key: config[key] for key in _NOISE_SCHEDULE if key in config}
    try:
        replacement = solver(**kept, **preset["settings"], **preset["diffusion_spacing"])
    except NotImplementedError as error:
        raise ValueError(f"sampler {name!r} knows no beta_schedule {config['beta_schedule']!r}.") from error
    # The last step may be written as zero or as almost zero.
    known = getattr(scheduler, "alphas_cumprod", replacement.alphas_cumprod)
    if not torch.allclose(known[:-1].cpu(), replacement.alphas_cumprod[:-1]):
        raise ValueError(
            f"sampler {name!r} cannot follow the noise schedule of `scheduler` {type(scheduler).__name__}."
        )
    return replacement


def list_bundled_checkpoints() -> list[str]:
    """Names that `bundled_checkpoint` knows."""
    return sorted(path.parent.name for path in _CHECKPOINTS.glob("*/model_index.json"))


def bundled_checkpoint(name: str = "tiny-imagenet-20-64") -> str:
    """Folder of a small checkpoint that comes with the package, for `D2iTPipeline.from_pretrained`.

    Its README.md is the model card.

    Args:
        name: one of `list_bundled_checkpoints()`; by default 64x64 images of 20 ImageNet classes.

    Raises:
        ValueError: no such checkpoint.
    """
    if name not in list_bundled_checkpoints():
        raise ValueError(f"no bundled checkpoint {_listed(name, list_bundled_checkpoints())}")
    return str(_CHECKPOINTS / name)


def _listed(name: str, known: list[str]) -> str:
    close = close_to(name, known, most=1)
    return f"{shown(name)}: {f'did you mean {close[0]!r}? There' if close else 'there'} are {', '.join(known)}."
