# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The state of a run on disk: written aside and renamed, found again, loaded."""

import argparse
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


# Flags that may change when a run is continued: where things lie, how long and how often, what changes no weight.
_FREE_FLAGS = frozenset(
    "output_dir resume_from_checkpoint max_train_steps checkpointing_steps checkpoints_total_limit validation_steps"
    " report_to dataloader_num_workers gradient_checkpointing compile push_to_hub hub_model_id hub_private_repo"
    " license train_data_dir latent_cache vae grain init_from repa_model calibration_images fid_model".split()
)


class Checkpoints:
    """Saves and restores a run: weights, EMA, optimizer, schedule, flags, in `output_dir/checkpoint-<step>`.

    A checkpoint is written aside and renamed, so a folder of that name is whole.

    Args:
        accelerator: the Accelerator, after `prepare`.
        args: flags of the run; those that change its weights are kept, and compared when it is resumed.
        model: the trained model, unwrapped; saved as a diffusers folder `model`, so each checkpoint can be loaded.
        ema: its moving average; saved as `model_ema`.
        others: further trained modules by name, such as a discriminator; saved as `<name>.safetensors`.
        identity: what else must be the same when the run is resumed, as JSON values: fingerprints of its data and of
            the models that it reads.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: argparse.Namespace,
        model: ModelMixin,
        ema: EMAModel,
        others: dict[str, torch.nn.Module] | None = None,
        identity: dict | None = None,
    ):
        self.accelerator = accelerator
        self.output_dir = Path(args.output_dir)
        self.total_limit = args.checkpoints_total_limit
        self.model = model
        self.ema = ema
        self.others = others or {}
        flags = {name: value for name, value in vars(args).items() if name not in _FREE_FLAGS}
        if args.streaming:  # its order depends on who reads which part
            flags["dataloader_num_workers"] = args.dataloader_num_workers
        if args.lr_scheduler not in ("constant", "constant_with_warmup"):  # the others end where the run ends
            flags["max_train_steps"] = args.max_train_steps
        flags |= {"num_processes": accelerator.num_processes, **(identity or {})}
        self.flags = json.loads(json.dumps(flags))  # as they will be read back
        accelerator.register_save_state_pre_hook(self._save_models)
        accelerator.register_load_state_pre_hook(self._load_models)

    def scalars(self) -> dict[str, int | float | str | bool]:
        """The flags as a tracker takes them, to tell runs from one another."""
        return {
            name: value if isinstance(value, (int, float, bool)) else str(value) for name, value in self.flags.items()
        }

    def _save_models(self, models, weights, folder: str) -> None:
        if self.accelerator.is_main_process:
            self.model.save_pretrained(os.path.join(folder, "model"))
            self.ema.save_pretrained(os.path.join(folder, "model_ema"))
            for name, module in self.others.items():
                save_file(module.state_dict(), os.path.join(folder, f"{name}.safetensors"))
            Path(folder, "flags.json").write_text(json.dumps(self.flags, indent=2), encoding="utf-8")
        weights.clear()  # saved above, in a format that from_pretrained reads

    def _load_models(self, models, folder: str) -> None:
        flags = json.loads(Path(folder, "flags.json").read_text(encoding="utf-8"))
        _refuse_changes(f"checkpoint {folder} is of another run", flags, self.flags)
        loaded = type(self.model).from_pretrained(os.path.join(folder, "model"))
        configs = (json.loads(model.to_json_string()) for model in (loaded, self.model))  # no tuples in JSON
        found, expected = ({k: v for k, v in config.items() if not k.startswith("_")} for config in configs)
        _refuse_changes(f"checkpoint {folder} holds another model", found, expected)
        self.model.load_state_dict(loaded.state_dict())
        with warnings.catch_warnings(), _only_errors():  # its own files surprise it
            warnings.simplefilter("ignore", FutureWarning)
            average = EMAModel.from_pretrained(os.path.join(folder, "model_ema"), type(self.model))
        self.ema.load_state_dict(average.state_dict())
        self.ema.to(self.accelerator.device)
        for name, module in self.others.items():
            module.load_state_dict(load_file(os.path.join(folder, f"{name}.safetensors")))
        models.clear()

    def save(self, step: int) -> None:
        """Write `checkpoint-<step>` and drop the oldest ones over the limit."""
        final = self.output_dir / f"checkpoint-{step}"
        staging = self.output_dir / f".staging-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(staging), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _replace_folder(staging, final)
            if self.total_limit is not None:
                for path in found_checkpoints(self.output_dir)[: -self.total_limit]:
                    shutil.rmtree(path)

    def resume(self, checkpoint: Path | None) -> int:
        """Load a checkpoint, from `find_checkpoint`, and return its step; 0 without one.

        Raises:
            ValueError: the checkpoint was written with other flags or holds another model.
        """
        if checkpoint is None:
            return 0
        self.accelerator.load_state(str(checkpoint))
        return int(_CHECKPOINT.fullmatch(checkpoint.name)[1])


def found_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, a path or "latest"; None without the flag.

    Raises:
        ValueError: the path is no checkpoint, or `latest` finds none.
    """
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "latest":
        found = found_checkpoints(Path(args.output_dir))
        if not found:
            raise ValueError(f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}.")
        return found[-1]
    path = Path(args.resume_from_checkpoint)
    if _CHECKPOINT.fullmatch(path.name) is None or not path.is_dir():
        raise ValueError(f"--resume_from_checkpoint {path} is not a folder named checkpoint-<step>.")
    return path


def _refuse_changes(what: str, found: dict, expected: dict) -> None:
    changed = {
        key: (found.get(key), expected.get(key))
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    }
    if changed:
        listed = "; ".join(f"{key}: found {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise ValueError(f"{what}: {listed}.")


def check_output_dir(args: argparse.Namespace) -> None:
    """Raise a ValueError if --output_dir holds anything and the run is not asked to continue what it holds."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint is None and folder.is_dir():
        held = sorted(path.name for path in folder.iterdir())
        if held:
            raise ValueError(
                f"--output_dir {folder} is not empty, it holds {', '.join(held[:5])}: pass another folder, or"
                + (" --resume_from_checkpoint latest to continue." if found_checkpoints(folder) else " remove it.")
            )


@contextmanager
def _only_errors() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def save_aside(save: Callable[[str], None], folder: str | Path) -> None:
    """Call `save(path)` with a path beside `folder` and put the result in its place once it is complete."""
    folder = Path(folder)
    staging = folder.parent / f".staging-{folder.name}-{uuid.uuid4().hex[:8]}"
    save(str(staging))
    _replace_folder(staging, folder)


def _replace_folder(staging: Path, final: Path) -> None:
    if final.exists():
        old = final.parent / f".old-{final.name}-{uuid.uuid4().hex[:8]}"
        final.rename(old)
        staging.rename(final)
        shutil.rmtree(old)
    else:
        final.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(final)


@contextmanager
def use_ema(ema: EMAModel, model: torch.nn.Module) -> Iterator[None]:
    """Run a block with the averaged weights in the model, and the trained ones back afterwards."""
    training = model.training
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        ema.restore(model.parameters())
        model.train(training)
