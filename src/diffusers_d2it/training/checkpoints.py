# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The state of a run on disk: sealed whole or absent, found again, loaded.

checkpoint-<step>/
    model, model_ema                    the model and its average, as diffusers folders
    <other>.safetensors                 further trained modules
    <optimizer>.safetensors             moments
    state.json                          step, flags, settings of optimizers, schedule, scale of float16
    random_state_<process>.json
    manifest.json                       sizes and hashes of all these; see `saving`
"""

import argparse
import json
import platform
import re
import warnings
from contextlib import nullcontext
from pathlib import Path

import accelerate
import diffusers
import safetensors
import torch
from accelerate.utils import broadcast_object_list
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LRScheduler

from ..files.folders import read_json, remove_folder, replace_folder, seal, staging_folder, verify
from .averaging import WeightAverage
from .gate import GatedAccelerator
from .states import (
    copy_into,
    gather,
    load_optimizer,
    optimizer_settings,
    optimizer_tensors,
    random_state,
    set_random_state,
)


STATE = "state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# Flags that may change when a run is continued: where things lie, how long and how often, what changes no weight.
_FREE_FLAGS = frozenset(
    "output_dir resume_from_checkpoint max_train_steps checkpointing_steps checkpoints_total_limit validation_steps"
    " report_to dataloader_num_workers gradient_checkpointing compile push_to_hub hub_model_id hub_private_repo"
    " license train_data_dir latent_cache vae grain init_from repa_model calibration_images fid_model"
    " skip_nonfinite_steps".split()
)


class Checkpoints:
    """Saves and restores a run in `output_dir/checkpoint-<step>`.

    Args:
        accelerator: the Accelerator, after `prepare`.
        args: flags of the run; those that change its weights are kept, and compared when it is resumed.
        model: the trained model, unwrapped.
        ema: its moving average.
        optimizers: by the names of their files.
        lr_scheduler: the schedule of the first of them.
        others: further trained modules by the names of their files, such as a discriminator.
        identity: what else must be the same when the run is resumed, as JSON values: fingerprints of its data and of
            the models that it reads.
    """

    def __init__(
        self,
        accelerator: GatedAccelerator,
        args: argparse.Namespace,
        model: ModelMixin,
        ema: WeightAverage,
        optimizers: dict[str, torch.optim.Optimizer],
        lr_scheduler: LRScheduler,
        others: dict[str, torch.nn.Module] | None = None,
        identity: dict | None = None,
    ):
        self.accelerator = accelerator
        self.output_dir = Path(args.output_dir)
        self.total_limit = args.checkpoints_total_limit
        self.model = model
        self.ema = ema
        self.optimizers = optimizers
        self.lr_scheduler = lr_scheduler
        self.others = others or {}
        self.last: Path | None = None  # the checkpoint that was saved or resumed last
        flags = {name: value for name, value in vars(args).items() if name not in _FREE_FLAGS}
        if args.streaming:  # its order depends on who reads which part
            flags["dataloader_num_workers"] = args.dataloader_num_workers
        if args.lr_scheduler not in ("constant", "constant_with_warmup"):  # the others end where the run ends
            flags["max_train_steps"] = args.max_train_steps
        flags |= {"num_processes": accelerator.num_processes, **(identity or {})}
        self.flags = json.loads(json.dumps(flags))  # as they will be read back

    def scalars(self) -> dict[str, int | float | str | bool]:
        """The flags as a tracker takes them, to tell runs from one another."""
        return {
            name: value if isinstance(value, (int, float, bool)) else str(value) for name, value in self.flags.items()
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Saving
    # -----------------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Write `checkpoint-<step>`, then drop the oldest ones over the limit. All processes call it.

        Raises:
            OSError: it could not be written. The earlier checkpoints are still there.
        """
        final = self.output_dir / f"checkpoint-{step}"
        if final == self.last:
            return
        is_main = self.accelerator.is_main_process
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with staging_folder(final) if is_main else nullcontext() as staging:
                (staging,) = broadcast_object_list([staging])
                self._write(staging, step)
                self.accelerator.wait_for_everyone()
                if is_main:
                    seal(staging)
                    replace_folder(staging, final)
        except (OSError, safetensors.SafetensorError) as error:
            raise OSError(f"{final} could not be written, earlier checkpoints are untouched: {error}") from error
        self.last = final
        if is_main and self.total_limit is not None:
            others = [path for path in found_checkpoints(self.output_dir) if path != final]
            for path in others[: max(0, len(others) + 1 - self.total_limit)]:
                remove_folder(path)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path, step: int) -> None:
        process = self.accelerator.process_index
        Path(folder, f"random_state_{process}.json").write_text(json.dumps(random_state()), encoding="utf-8")
        # Gathered by all processes, written by the main one, a part at a time
        weights = self.model.state_dict()
        self._write_model(folder / "model", gather(self.accelerator, weights))
        self._write_model(folder / "model_ema", gather(self.accelerator, weights | self._averages()))
        tensors = {name: module.state_dict() for name, module in self.others.items()}
        tensors |= {name: optimizer_tensors(optimizer, self._names()) for name, optimizer in self.optimizers.items()}
        for name, part in tensors.items():
            whole = gather(self.accelerator, part)
            if self.accelerator.is_main_process:
                save_file(whole, folder / f"{name}.safetensors")
        if self.accelerator.is_main_process:
            text = json.dumps(self._state(step), indent=2, allow_nan=False)
            Path(folder, STATE).write_text(text + "\n", encoding="utf-8")

    def _write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        if self.accelerator.is_main_process:
            with torch.device("meta"):
                whole = type(self.model).from_config(self.model.config)
            whole.load_state_dict(weights, assign=True)
            whole.save_pretrained(folder)

    def _state(self, step: int) -> dict:
        scaler = self.accelerator.scaler
        return {
            "step": step,
            "flags": self.flags,
            "average_steps": self.ema.optimization_step,
            "optimizers": {name: optimizer_settings(optimizer) for name, optimizer in self.optimizers.items()},
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "skipped_steps": self.accelerator.num_skipped_steps,
            "versions": {
                "python": platform.python_version(),
                **{module.__name__: module.__version__ for module in (torch, diffusers, accelerate, safetensors)},
            },
        }

    def _averages(self) -> dict[str, torch.Tensor]:
        return dict(zip((name for name, _ in self.model.named_parameters()), self.ema.shadow_params, strict=True))

    def _names(self) -> dict[torch.Tensor, str]:
        modules = {"model": self.model, **self.others}
        return {
            parameter: f"{module_name}.{name}"
            for module_name, module in modules.items()
            for name, parameter in module.named_parameters()
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Loading
    # -----------------------------------------------------------------------------------------------------------------

    def resume(self, checkpoint: Path | None) -> int:
        """Load a checkpoint, from `find_checkpoint`, and return its step; 0 without one. All processes call it.

        Raises:
            ValueError: the checkpoint was written with other flags, or holds another model or other weights.
        """
        if checkpoint is None:
            return 0
        state = read_json(checkpoint / STATE)
        _refuse_changes(f"checkpoint {checkpoint} is of another run", state["flags"], self.flags)
        loaded = type(self.model).from_pretrained(checkpoint / "model")
        configs = (json.loads(model.to_json_string()) for model in (loaded, self.model))  # no tuples in JSON
        found, expected = ({k: v for k, v in config.items() if not k.startswith("_")} for config in configs)
        _refuse_changes(f"checkpoint {checkpoint} holds another model", found, expected)
        copy_into(self.model.state_dict(), loaded.state_dict(), f"{checkpoint}/model")
        averages = dict(type(self.model).from_pretrained(checkpoint / "model_ema").named_parameters())
        copy_into(self._averages(), averages, f"{checkpoint}/model_ema")
        self.ema.optimization_step = state["average_steps"]
        for name, module in self.others.items():
            path = checkpoint / f"{name}.safetensors"
            copy_into(module.state_dict(), load_file(path), str(path))
        for name, optimizer in self.optimizers.items():
            path = checkpoint / f"{name}.safetensors"
            load_optimizer(optimizer, self._names(), load_file(path), state["optimizers"][name], str(path))
        self.lr_scheduler.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.accelerator.num_skipped_steps = state["skipped_steps"]
        set_random_state(read_json(checkpoint / f"random_state_{self.accelerator.process_index}.json"))
        self.last = checkpoint
        return state["step"]

    def averaged_model(self) -> ModelMixin:
        """The average of the last checkpoint as a model of its own, in eval mode, on the device of this process."""
        model = type(self.model).from_pretrained(self.last / "model_ema")
        return model.eval().to(self.accelerator.device)


def found_checkpoints(folder: Path) -> list[Path]:
    """Folders of a run that are named like its checkpoints, oldest first."""
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def find_checkpoint(accelerator: GatedAccelerator, args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names, verified; None without the flag. All processes call it.

    "latest" is the one of the highest step that is whole; a warning names those that are not.

    Raises:
        ValueError: the path is no checkpoint or a damaged one, or `latest` finds none.
    """
    found, error = None, None
    if accelerator.is_main_process:
        try:
            found = _find(args)
        except ValueError as caught:
            error = str(caught)
    found, error = broadcast_object_list([found, error])
    if error is not None:
        raise ValueError(error)
    return found


def _find(args: argparse.Namespace) -> Path | None:
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint != "latest":
        path = Path(args.resume_from_checkpoint)
        if _CHECKPOINT.fullmatch(path.name) is None or not path.is_dir():
            raise ValueError(f"--resume_from_checkpoint {path} is not a folder named checkpoint-<step>.")
        _verify(path)
        return path
    damaged = []
    for path in reversed(found_checkpoints(Path(args.output_dir))):
        try:
            _verify(path)
        except ValueError as error:
            damaged.append(str(error))
            warnings.warn(f"checkpoint {path} is skipped: {error}", stacklevel=3)
        else:
            return path
    raise ValueError(
        f"--resume_from_checkpoint latest: no checkpoint in {args.output_dir}"
        + (f" is whole: {' '.join(damaged)}" if damaged else ".")
    )


def _verify(checkpoint: Path) -> None:
    verify(checkpoint)
    step = read_json(checkpoint / STATE).get("step")
    if checkpoint.name != f"checkpoint-{step}":
        raise ValueError(f"{checkpoint} holds the state after step {step}: it was renamed or mixed up.")


def _refuse_changes(what: str, found: dict, expected: dict) -> None:
    changed = {
        key: (found.get(key), expected.get(key))
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    }
    if changed:
        listed = "; ".join(f"{key}: found {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise ValueError(f"{what}: {listed}.")
