# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Runs of the scripts that note every batch they see, and that are struck when they get a chosen one.

They run in forked processes: nothing is imported again, so a run of a few steps takes about a second.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from diffusers import DDIMScheduler
from image_files import encode, photo, write_folder
from injection import in_child
from script_runs import forget_group, load_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_d2it import D2iTPipeline, DCDiTModel
from diffusers_d2it.training import run


BATCHES = "batches.jsonl"
LOSSES = {"train_grain.py": "grain_loss", "train_d2it.py": "content_losses", "train_dvae.py": "dvae_loss"}
LOSSES["train_dcdit.py"] = "dcdit_losses"
STEPS = 10  # eight photographs in batches of two: two epochs and a half


class Inputs:
    """What the scripts read: photographs, an autoencoder, their cache, a grain model, and a DC-DiT to start from.

    Args:
        folder: empty; all of it is put in there.
        components: of 32-pixel images.
        dcdit: of their finest cells, with many tokens: a new one has hardly one, of which a budget takes nothing.
    """

    def __init__(self, folder: Path, components: D2iTPipeline, dcdit: DCDiTModel):
        self.folder = folder
        write_folder(folder / "photos", {f"{i}.png": encode(photo(i, 32)) for i in range(8)})
        components.vae.save_pretrained(folder / "vae")
        components.grain_model.save_pretrained(folder / "grain" / "grain_model")
        dcdit.save_pretrained(folder / "dcdit")
        scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
        scheduler.save_pretrained(folder / "grain" / "grain_scheduler")
        of_cache = {"train_data_dir": folder / "photos", "vae": folder / "vae", "output_dir": folder / "cache"}
        assert in_child(partial(call, load_script("cache_latents.py"), of_cache | {"resolution": 32})) == 0

    def flags(self, script: str) -> dict[str, object]:
        """The flags of a run of `STEPS` steps with a checkpoint after every third."""
        flags = {"resolution": 32, "train_batch_size": 2, "max_train_steps": STEPS, "checkpointing_steps": 3}
        flags |= {"validation_steps": 1000, "seed": 7, "report_to": "tensorboard"}
        if script == "train_dvae.py":
            of_model = {"preset": "dvae-tiny", "perceptual_weight": 0, "gan_start_step": 4}
            return flags | of_model | {"train_data_dir": self.folder / "photos"}
        flags |= {"latent_cache": self.folder / "cache", "vae": self.folder / "vae"}
        if script == "train_grain.py":
            return flags | {"preset": "grain-tiny", "gradient_accumulation_steps": 3}
        if script == "train_dcdit.py":
            flags |= {"init_from": self.folder / "dcdit", "budget_warmup_steps": 2}
            return flags | {"gradient_accumulation_steps": 2}
        return flags | {"preset": "content-tiny", "grain": self.folder / "grain"}


def call(module, flags: dict[str, object]) -> None:
    """Run the main function of a script with flags."""
    forget_group()
    words = (word for name, value in flags.items() for word in (f"--{name}", value))
    module.main(module.parse_args([str(word) for word in words]))


def train(
    script: str,
    output_dir: Path,
    flags: dict[str, object],
    strike: Callable[[dict, int], object] = lambda *_: None,
    change: Callable[[ModuleType], object] = lambda _: None,
) -> int:
    """Run a training script in a forked process; its exit status, as of `in_child`.

    Args:
        script: its name.
        output_dir: of the run. The batches are noted beside it.
        flags: of the script.
        strike: called with every batch and its number in this process before the script gets it; may change the
            batch, or kill.
        change: called with the script's module before it runs; may replace a function in it.
    """
    module = load_script(script)
    module.validate = lambda *_: None  # nobody looks at samples
    change(module)
    real = run.batches_from

    def batches_from(*args) -> Iterator[dict]:
        for i, batch in enumerate(real(*args)):
            note_batch(output_dir.with_name(f"{output_dir.name}-{BATCHES}"), args[1] + i, batch)
            strike(batch, i)
            yield batch

    with mock.patch.object(run, "batches_from", batches_from):
        return in_child(partial(call, module, flags | {"output_dir": output_dir}))


def change_loss(change: Callable[[torch.Tensor], torch.Tensor], module: ModuleType) -> None:
    """Change what the loss function of a script returns."""
    (name,) = (name for name in LOSSES.values() if hasattr(module, name))
    real = getattr(module, name)

    def changed(*args):
        losses = real(*args)
        return losses | {"loss": change(losses["loss"])}

    setattr(module, name, changed)


def note_batch(path: Path, index: int, batch: dict) -> None:
    """Append what is in a batch to a file."""
    digest = hashlib.sha256()
    for value in batch.values():
        for tensor in value if isinstance(value, list) else [value]:
            digest.update(tensor.numpy().tobytes())
    with path.open("a") as file:
        file.write(json.dumps([index, digest.hexdigest()]) + "\n")
        file.flush()
        os.fsync(file.fileno())


def batches_seen(output_dir: Path) -> dict[int, set[str]]:
    """Contents of each batch of the whole run by its number; more than one where it was seen several times, unlike."""
    seen: dict[int, set[str]] = {}
    for line in output_dir.with_name(f"{output_dir.name}-{BATCHES}").read_text().splitlines():
        index, digest = json.loads(line)
        seen.setdefault(index, set()).add(digest)
    return seen


def loss_curve(output_dir: Path) -> dict[int, set[float]]:
    """Loss after each step, as it was logged; more than one where a step was logged several times, unlike."""
    curve: dict[int, set[float]] = {}
    for file in sorted(output_dir.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), {"scalars": 0}).Reload()
        for event in events.Scalars("loss") if "loss" in events.Tags()["scalars"] else []:
            curve.setdefault(event.step, set()).add(event.value)
    return curve
