# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Draws an image and asks for what needs a package, in processes that find broken ones, for test_broken_packages.py.

    python without_packages.py '[["folder of broken packages", ["package", ...]], ...]'

It prints a line of JSON for each folder: "image", the SHA-256 of its values, or "error", and "errors" by package.
"""

import hashlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable

import torch


def draw() -> str:
    """The SHA-256 of a picture of the bundled checkpoint."""
    from diffusers_d2it import D2iTPipeline, bundled_checkpoint

    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipe("lion", num_inference_steps=2, generator=generator, output_type="np").images
    return hashlib.sha256(drawn.tobytes()).hexdigest()


def needs() -> dict[str, Callable]:
    """What needs each package."""
    from diffusers_d2it import D2iTContentModel, bundled_checkpoint
    from diffusers_d2it.evaluation import load_features, load_lpips
    from diffusers_d2it.evaluation.reconstruction import check_torchmetrics
    from diffusers_d2it.optional import import_optional
    from diffusers_d2it.training import make_accelerator

    def train_with_tracker(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            make_accelerator(folder, report_to=name)

    def attend_with(backend: str) -> None:
        model = D2iTContentModel.from_pretrained(bundled_checkpoint(), subfolder="transformer")
        model.set_attention_backend(backend)

    return {
        "flash_attn": lambda: attend_with("flash"),
        "lpips": lambda: load_lpips("vgg", "this test"),
        "matplotlib": lambda: import_optional("matplotlib.figure", "a plot", extra="metrics"),
        "tensorboard": lambda: train_with_tracker("tensorboard"),
        "torch_fidelity": lambda: load_features("inception"),
        "torchmetrics": check_torchmetrics,
        "wandb": lambda: train_with_tracker("wandb"),
    }


def error_of(function: Callable) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def try_all(task: tuple[str, list[str]]) -> dict:
    folder, packages = task
    torch.set_num_threads(1)
    sys.path.insert(0, folder)
    found = {"error": error_of(draw), "errors": {}}
    if not found["error"]:
        found["errors"] = {package: error_of(needs()[package]) for package in packages}
        found["image"] = draw()  # also after what was found to be broken on the way
    return found


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # each begins with torch alone
        for found in pool.imap(try_all, json.loads(sys.argv[1]), chunksize=1):
            print(json.dumps(found), flush=True)
