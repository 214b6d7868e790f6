# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Draws an image, then asks for what needs each of some packages: test_broken_packages.py runs it.

    python without_packages.py packages...

It prints a JSON object of "image", the SHA-256 of its values, "warnings", and "errors" by package.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable

import torch


torch.set_num_threads(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    # Before ours, as users do: its classes must stay what they are
    import diffusers
    from diffusers import DDIMScheduler

    from diffusers_d2it import D2iTContentModel, D2iTPipeline, bundled_checkpoint
    from diffusers_d2it.evaluation.features import load_features
    from diffusers_d2it.evaluation.reconstruction import check_torchmetrics
    from diffusers_d2it.training.arguments import check_training_arguments
    from diffusers_d2it.training.perceptual import load_perceptual_loss

    def draw() -> str:
        """The SHA-256 of a picture, drawn by what the loader of diffusers loads."""
        pipe = diffusers.DiffusionPipeline.from_pretrained(bundled_checkpoint())
        assert type(pipe) is D2iTPipeline and type(pipe.scheduler) is DDIMScheduler
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn = pipe("lion", num_inference_steps=2, generator=generator, output_type="np").images
        return hashlib.sha256(drawn.tobytes()).hexdigest()

    def train_with_tracker(name: str) -> None:
        flags = {"skip_nonfinite_steps": 0, "overfit_batches": None, "checkpoints_total_limit": None}
        flags |= {"fine_ratio": None, "resume_from_checkpoint": None, "report_to": name}
        with tempfile.TemporaryDirectory() as folder:
            check_training_arguments(argparse.Namespace(output_dir=folder, **flags))

    def content_model() -> D2iTContentModel:
        return D2iTContentModel.from_pretrained(bundled_checkpoint(), subfolder="transformer")

    needs: dict[str, Callable] = {
        "flash_attn": lambda: content_model().set_attention_backend("flash"),
        "kornia": lambda: diffusers.guiders.FrequencyDecoupledGuidance(),
        "lpips": load_perceptual_loss,
        "onnxruntime": lambda: diffusers.OnnxRuntimeModel(),
        "peft": lambda: content_model().add_adapter(None),
        "tensorboard": lambda: train_with_tracker("tensorboard"),
        "torch_fidelity": lambda: load_features("inception"),
        "torchmetrics": check_torchmetrics,
        "torchsde": lambda: diffusers.DPMSolverSDEScheduler(),
        "wandb": lambda: train_with_tracker("wandb"),
        "xformers": lambda: content_model().set_attention_backend("xformers"),
    }

    image, errors = draw(), {}
    for package in sys.argv[1:]:
        try:
            needs[package]()
        except Exception as error:
            errors[package] = f"{type(error).__name__}: {error}"
    assert draw() == image  # also after the packages that were found to be broken on the way

print(json.dumps({"image": image, "warnings": [str(one.message) for one in caught], "errors": errors}))
