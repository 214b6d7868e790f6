# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The state of a run on disk: sealed whole or absent, found again, loaded.

checkpoint-<step>/
    model, model_ema                    the model and its average, as diffusers folders
    adapters, adapters_ema.safetensors  of a model with adapters these instead, without the model
    <other>.safetensors                 further trained modules
    <optimizer>.safetensors             moments, as <name of the weight>/<name of the moment>
    state.json                          step, flags, settings of optimizers, schedule, scale of float16
    manifest.json                       sizes and hashes of all these; see files/folders.py

No pickle, and whole tensors: torch gathers those of FSDP on the main process, and hands each process its part.

The training waits for a copy of the state in memory, not for the disk: a thread of the main process writes it, and
whoever waits for that writes the rest.
"""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import safetensors
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from ..files import read_json, remove_folder, replace_folder, seal, staging_folder
from ..files.source import public_config
from ..files.tensor_file import TensorFile
from ..files.weights import weight_names
from ..words import counted, differences, printable
from .background import BackgroundWork
from .finding import STATE, found_checkpoints
from .gate import FiniteGate


_ADAPTERS = ("adapters.safetensors", "adapters_ema.safetensors")
_MODELS = tuple(f"{folder}/{weight_names(None)[0]}" for folder in ("model", "model_ema"))
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the main process


def trained_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of a model that are trained, of which an average is kept."""
    return [weight for weight in model.parameters() if weight.requires_grad]


@contextmanager
def use_ema(ema: EMAModel, model: nn.Module) -> Iterator[None]:
    """Run a block with the averaged weights in the model, and the trained ones back afterwards."""
    training, weights = model.training, trained_weights(model)
    ema.store(weights)
    ema.copy_to(weights)
    model.eval()
    try:
        yield
    finally:
        ema.restore(weights)
        model.train(training)


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights are spread over processes, as FSDP does."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


class Checkpoints:
    """Saves and restores a run in `output_dir/checkpoint-<step>`.

        checkpoints.save(step)          # copied into memory, and written while the training goes on
        ...
        if checkpoints.failed:          # raises why
            checkpoints.save(step)
        ...
        checkpoints.finish()            # before anything reads the last one, and before the process ends

    Args:
        accelerator: the Accelerator, after `prepare`.
        output_dir: the folder of the run.
        model: the trained model, unwrapped.
        ema: average of its `trained_weights`, made after `prepare`: sharded as the weights are.
        optimizers: by the names of their files.
        lr_scheduler: the schedule of the first of them.
        gate: whose left-out updates are counted over the whole run.
        others: further trained modules by the names of their files, such as a discriminator.
        flags: what must be the same when the run is resumed, as values of JSON: flags that change its weights,
            fingerprints of its data and of the models that it reads. The number of processes is added.
        total_limit: only so many checkpoints are kept, the newest; None for all.

    Raises:
        ValueError: `total_limit` is less than 1, or a model with adapters is sharded.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        model: ModelMixin,
        ema: EMAModel,
        optimizers: dict[str, torch.optim.Optimizer],
        lr_scheduler: LRScheduler,
        gate: FiniteGate,
        *,
        others: dict[str, nn.Module] | None = None,
        flags: dict[str, Any] | None = None,
        total_limit: int | None = None,
    ):
        if total_limit is not None and total_limit < 1:
            raise ValueError(f"`total_limit` must be at least 1, got {total_limit}.")
        self.has_adapters = bool(getattr(model, "_hf_peft_config_loaded", False))
        if self.has_adapters and is_sharded(model):
            raise ValueError("adapters are not trained with FSDP: there is too little to shard.")
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.model = model
        self.ema = ema
        self.optimizers = {name: getattr(optimizer, "optimizer", optimizer) for name, optimizer in optimizers.items()}
        self.lr_scheduler = lr_scheduler
        self.gate = gate
        self.others = others or {}
        self.flags = json.loads(json.dumps(flags or {}))
        self.total_limit = total_limit
        self.last: Path | None = None  # the checkpoint that was saved or resumed last
        self._writing: BackgroundWork | None = None
        self._files: dict[str, TensorFile] = {}  # of the one that is being written, on the main process
        self._trained = nn.ModuleDict({"model": model, **self.others})  # gives every weight of an optimizer its name

    def scalars(self) -> dict[str, int | float | str | bool]:
        """The flags as a tracker takes them, to tell runs from one another."""
        return {
            name: value if isinstance(value, (int, float, bool)) else str(value) for name, value in self.flags.items()
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Saving
    # -----------------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Copy the state into memory; `checkpoint-<step>` is written meanwhile. All processes call it.

        The one before is waited for: there is memory for one copy, which is kept. Once the new one stands, the oldest
        over the limit are dropped.

        Raises:
            OSError: the one before could not be written. Earlier checkpoints are still there.
            ValueError: what it holds could not be loaded again.
        """
        self._wait()
        final = self.output_dir / f"checkpoint-{step}"
        if final == self.last:
            return
        self._copy()
        state = json.dumps(self._state(step), indent=2, allow_nan=False)
        if self.accelerator.is_main_process:
            self._writing = BackgroundWork(self._write(final, state))
        else:
            self.last = final

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written, as far as this process knows; `save` raises why."""
        return self._writing is not None and self._writing.failed

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk. All processes call it.

        Raises:
            OSError, ValueError: as from `save`.
        """
        self._wait()
        self.accelerator.wait_for_everyone()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    def _copy(self) -> None:
        """Copy all tensors, sharded ones gathered by all processes, into the files that the main one has in memory."""
        keeps = self.accelerator.is_main_process
        for path, tensors in self._tensors().items():
            if keeps and not (path in self._files and self._files[path].fits(tensors)):
                self._files[path] = TensorFile(tensors)  # kept: new memory takes many times as long as to fill it
            for name, tensor in tensors.items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if keeps:
                    self._files[path].tensors[name].copy_(whole.detach())

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that is saved, by file and name."""
        if self.has_adapters:
            files = dict(zip(_ADAPTERS, (self._adapters(), self._averages())))
        else:
            weights = self.model.state_dict()
            files = dict(zip(_MODELS, (weights, weights | self._averages())))
        files |= {f"{name}.safetensors": module.state_dict() for name, module in self.others.items()}
        return files | {f"{name}.safetensors": self._moments(optimizer) for name, optimizer in self.optimizers.items()}

    def _write(self, final: Path, state: str) -> Iterator[None]:
        """Write what lies in memory, a piece at a time."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with staging_folder(final) as staging:
                written = {}
                for name, file in self._files.items():
                    if name in _MODELS:
                        self._begin_model(Path(staging, name).parent, file)
                    written[staging / name] = yield from file.write(staging / name)
                Path(staging, STATE).write_text(state + "\n", encoding="utf-8")
                seal(staging, written=written)
                replace_folder(staging, final)
        except OSError as error:
            raise OSError(f"{final} could not be written, earlier checkpoints are untouched: {error}") from error
        if self.total_limit is not None:
            others = [path for path in found_checkpoints(self.output_dir) if path != final]
            for path in others[: max(0, len(others) + 1 - self.total_limit)]:
                remove_folder(path)
        self.last = final

    def _begin_model(self, folder: Path, weights: TensorFile) -> None:
        """Begin the folder of a model with its configuration, once that and the weights are fit to be loaded again."""
        self.model.check_config(self.model.config)
        if (name := weights.first_not_finite()) is not None:
            raise ValueError(f"`{name}` of `{folder.name}` must be finite: the checkpoint could not be loaded again.")
        self.model.save_config(folder)

    def _averaged(self) -> ModelMixin:
        """A model of the averages, and where nothing is trained of the weights as they are; none of them is a copy."""
        with torch.device("meta"):
            model = type(self.model).from_config(self.model.config)
        model.load_state_dict(self.model.state_dict() | self._averages(), assign=True)
        return model

    def _adapters(self) -> dict[str, Tensor]:
        """The weights that are trained, by their names."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def _averages(self) -> dict[str, Tensor]:
        return dict(zip(self._adapters(), self.ema.shadow_params, strict=True))

    def _moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        if not optimizer.state:  # torch would take a step, to have a state
            return {}
        states = get_optimizer_state_dict(self._trained, optimizer)["state"]
        return {f"{weight}/{key}": value for weight, state in states.items() for key, value in state.items()}

    def _state(self, step: int) -> dict:
        scaler = self.accelerator.scaler
        return {
            "step": step,
            "flags": self.flags,
            "average_steps": self.ema.optimization_step,
            "optimizers": {
                name: [{key: value for key, value in group.items() if key != "params"} for group in groups]
                for name, groups in ((name, optimizer.param_groups) for name, optimizer in self.optimizers.items())
            },
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "skipped_steps": self.gate.num_skipped_steps,
            "versions": {
                "python": platform.python_version(),
                **{module.__name__: module.__version__ for module in (torch, diffusers, accelerate, safetensors)},
            },
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
        found, expected = dict(state["flags"]), dict(self.flags)
        of_data = found.pop("data", None), expected.pop("data", None)
        _refuse_changes(f"{checkpoint} is of another run", found, expected)
        _refuse_other_data(checkpoint, *of_data)  # last: flags change it too
        if not self.has_adapters:
            stored = type(self.model).from_pretrained(checkpoint / "model")
            configs = (json.loads(model.to_json_string()) for model in (stored, self.model))  # no tuples in JSON
            _refuse_changes(f"{checkpoint} holds another model", *map(public_config, configs))
        for name, optimizer in self.optimizers.items():  # first: to load it, torch takes a step of length 0
            self._load_optimizer(optimizer, state["optimizers"][name], checkpoint / f"{name}.safetensors")
        if self.has_adapters:
            for file, weights in zip(_ADAPTERS, (self._adapters(), self._averages())):
                _copy_weights(weights, load_file(checkpoint / file), checkpoint / file)
        else:
            _load_weights(self.model, stored.state_dict(), checkpoint / "model")
            stored = type(self.model).from_pretrained(checkpoint / "model_ema")
            _load_weights(self._averaged(), stored.state_dict(), checkpoint / "model_ema")
        self.ema.optimization_step = state["average_steps"]
        for name, module in self.others.items():
            path = checkpoint / f"{name}.safetensors"
            _load_weights(module, load_file(path), path)
        self.lr_scheduler.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.gate.num_skipped_steps = state["skipped_steps"]
        self.last = checkpoint
        return state["step"]

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, settings: list[dict], path: Path) -> None:
        groups = optimizer.param_groups
        if [{*stored, "params"} for stored in settings] != [set(group) for group in groups]:
            raise ValueError(f"{path} has other parameter groups than this optimizer.")
        names = {weight: name for name, weight in self._trained.named_parameters()}
        weights = {names[weight]: weight for group in groups for weight in group["params"]}
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(path).items():
            weight, _, key = name.rpartition("/")
            if weight not in weights:
                raise ValueError(f"{path} holds `{printable(name)}`, but this optimizer has no such weight.")
            if tensor.ndim and tensor.shape != weights[weight].shape:
                raise ValueError(
                    f"`{name}` of {path} has shape {tuple(tensor.shape)}, not {tuple(weights[weight].shape)}."
                )
            states.setdefault(weight, {})[key] = tensor
        if states:
            of_weights = [{"params": [names[weight] for weight in group["params"]]} for group in groups]
            try:
                whole = {"state": states, "param_groups": of_weights}
                set_optimizer_state_dict(self._trained, optimizer, whole, options=_WHOLE)
            except RuntimeError as error:
                raise ValueError(f"{path} cannot be loaded: {error}") from error
        _lay_out_like_weights(optimizer)
        for group, stored in zip(optimizer.param_groups, settings):
            # JSON knows no tuples
            group.update({key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()})

    def averaged_model(self) -> ModelMixin:
        """The average of the last checkpoint as a model of its own, in eval mode, on the device of this process."""
        model = type(self.model).from_pretrained(self.last / "model_ema")
        return model.eval().to(self.accelerator.device)


def _lay_out_like_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give what an optimizer keeps of a weight the strides of the weight.

    A fused AdamW runs through the memory of both side by side: of a channels-last weight, and a state that was read
    from a file, it would mix up the values without a word.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _refuse_other_data(checkpoint: Path, found: dict[str, Any] | None, expected: dict[str, Any] | None) -> None:
    """`_refuse_changes` of the data of `identity_of`, in words: two fingerprints say nothing."""
    if found == expected or None in (found, expected):
        return
    before, now = found["num_images"], expected["num_images"]
    change = "files, sizes, columns or classes are others"
    if before != now and None not in (before, now):
        change = f"{counted(abs(now - before), 'image')} {'more' if now > before else 'fewer'}"
    raise ValueError(f"the data set is not what it was when the run of {checkpoint} began: {change}.")


def _refuse_changes(what: str, found: dict, expected: dict) -> None:
    changed = differences(found, expected)
    if changed:
        raise ValueError(f"{what}: {'; '.join(changed)}.")


def _load_weights(module: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    missing = sorted(module.state_dict().keys() - weights.keys())
    if missing:  # torch would leave them as they are
        raise ValueError(f"{source} lacks {counted(len(missing), 'tensor')}, such as `{missing[0]}`.")
    try:
        set_model_state_dict(module, weights, options=_WHOLE)
    except RuntimeError as error:
        raise ValueError(f"{source} cannot be loaded: {printable(error)}") from error


def _copy_weights(weights: dict[str, Tensor], stored: dict[str, Tensor], source: Path) -> None:
    shapes = [{(name, tensor.shape) for name, tensor in tensors.items()} for tensors in (weights, stored)]
    if changed := shapes[0] ^ shapes[1]:
        raise ValueError(f"{source} holds other adapters, such as `{min(changed)[0]}`.")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(stored[name])
