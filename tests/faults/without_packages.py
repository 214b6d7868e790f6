# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Run by test_broken_packages.py, in a process of its own: draws an image, then asks for what needs each package.

    python without_packages.py packages...     prints {"image", "warnings", "errors"} as JSON
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable

import torch


torch.set_num_threads(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    # Before ours, as most people will: its classes must stay what they are
    import diffusers
    from diffusers import DDIMScheduler

    import diffusers_d2it
    from diffusers_d2it import D2iTContentModel, D2iTPipeline, bundled_checkpoint
    from diffusers_d2it.training.arguments import check_training_arguments
    from diffusers_d2it.training.perceptual import load_perceptual_loss
    from diffusers_d2it.training.reconstruction import check_torchmetrics, make_fid


def draw() -> list:
    """A picture, through the loader of diffusers; the scheduler is of the class that was imported first."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(bundled_checkpoint())
    assert type(pipe) is D2iTPipeline and type(pipe.scheduler) is DDIMScheduler
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("lion", num_inference_steps=2, generator=generator, output_type="np").images.tolist()


def train_with_tracker(name: str) -> None:
    flags = {"skip_nonfinite_steps": 0, "overfit_batches": None, "checkpoints_total_limit": None}
    with tempfile.TemporaryDirectory() as folder:
        flags |= {"fine_ratio": None, "output_dir": folder, "resume_from_checkpoint": None, "report_to": name}
        check_training_arguments(argparse.Namespace(**flags))


def content_model(**kwargs) -> D2iTContentModel:
    return D2iTContentModel.from_pretrained(bundled_checkpoint(), subfolder="transformer", **kwargs)


def quantized() -> D2iTContentModel:
    return content_model(quantization_config=diffusers.BitsAndBytesConfig(load_in_8bit=True))


NEEDS: dict[str, Callable] = {
    "bitsandbytes": quantized,
    "flash_attn": lambda: content_model().set_attention_backend("flash"),
    "kornia": lambda: diffusers.guiders.FrequencyDecoupledGuidance(),
    "lpips": load_perceptual_loss,
    "onnxruntime": lambda: diffusers.OnnxRuntimeModel(),
    "peft": lambda: content_model().add_adapter(None),
    "tensorboard": lambda: train_with_tracker("tensorboard"),
    "torch_fidelity": lambda: make_fid("inception"),
    "torchmetrics": check_torchmetrics,
    "torchsde": lambda: diffusers.DPMSolverSDEScheduler(),
    "torchvision": load_perceptual_loss,
    "wandb": lambda: train_with_tracker("wandb"),
    "xformers": lambda: content_model().set_attention_backend("xformers"),
}

errors = {}
image = draw()
for package in sys.argv[1:]:
    try:
        NEEDS[package]()
        errors[package] = None
    except Exception as error:
        errors[package] = f"{type(error).__name__}: {error}"
print(json.dumps({"image": image, "warnings": [str(one.message) for one in caught], "errors": errors}))
