# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a run consists of besides its configuration, as whole tensors and JSON values: no pickle, no shards.

Under FSDP every process holds a part of each tensor. `gather` puts the parts together on the main process, `copy_into`
takes a process's own part of a whole tensor; both leave tensors that are not sharded as they are.
"""

import base64
import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..words import printable


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether the weights are spread over processes, as FSDP does."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def gather(accelerator: Accelerator, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the main process, nothing on the others. All processes call it."""
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # one at a time: memory for one
        if accelerator.is_main_process:
            gathered[name] = whole.detach().cpu().contiguous()
    return gathered


@torch.no_grad()
def copy_into(targets: dict[str, Tensor], wholes: dict[str, Tensor], source: str) -> None:
    """Copy whole tensors into those of the run.

    Raises:
        ValueError: names or shapes differ; `source` says of what.
    """
    _check_names(wholes, targets, source)
    for name, target in targets.items():
        if wholes[name].shape != target.shape:
            shapes = f"{tuple(wholes[name].shape)}, expected {tuple(target.shape)}"
            raise ValueError(f"`{name}` of {source} has shape {shapes}.")
        target.copy_(_part(wholes[name], target))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, such as moments, as "<name of the weight>/<name of the state>"."""
    return {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def optimizer_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of an optimizer's groups, such as the current learning rate."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: dict[Tensor, str],
    tensors: dict[str, Tensor],
    settings: list[dict[str, Any]],
    source: str,
) -> None:
    """Put an optimizer into the state that `optimizer_tensors` and `optimizer_settings` gave.

    Raises:
        ValueError: the state is of other weights, or of an optimizer with other groups; `source` says of what.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [len(group) for group in settings] != [len(group) - 1 for group in groups]:
        raise ValueError(f"{source} has settings of other groups than this optimizer.")
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_name = {names[parameter]: (i, parameter) for i, parameter in enumerate(weights)}
    states: dict[int, dict[str, Tensor]] = {}
    for name, whole in tensors.items():
        weight, _, key = name.rpartition("/")
        if weight not in by_name:
            raise ValueError(f"{source} holds `{printable(name)}`, but this optimizer has no such weight.")
        index, parameter = by_name[weight]
        if whole.ndim and whole.shape != parameter.shape:
            raise ValueError(
                f"`{name}` of {source} has shape {tuple(whole.shape)}, expected {tuple(parameter.shape)}."
            )
        states.setdefault(index, {})[key] = _part(whole, parameter) if whole.ndim else whole
    for group, stored in zip(groups, settings):
        # JSON knows no tuples
        group.update({key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()})
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, NumPy and torch in this process, as JSON values."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [keys.tolist(), position, has_gauss, cached],
        "torch": _to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators of this process into the states of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_text(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _part(whole: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor):
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return whole


def _check_names(found: dict[str, Tensor], expected: dict[str, Tensor], source: str) -> None:
    missing, foreign = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} tensors, such as `{missing[0]}`.")
    if foreign:
        raise ValueError(f"{source} holds {len(foreign)} foreign tensors, such as `{printable(foreign[0])}`.")


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
