# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the model_index.json of a pipeline may say: its class, its components, the names of its classes."""

import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging

from ..files.folders import read_json
from ..files.source import public_config
from ..limits import check_values
from ..models.strict import init_parameters
from ..words import listed, shown


logger = logging.get_logger(__name__)

INDEX = "model_index.json"

# Of the many keys of schedulers those that decide how much memory is taken, and whether numbers stay finite
_SCHEDULER = {
    "num_train_timesteps": int,
    "beta_start": float,
    "beta_end": float,
    "trained_betas": tuple[float, ...] | None,
    "solver_order": int,
    "shift": float | None,
    "_class_name": str,
}
_SCHEDULER_LIMITS = {
    "num_train_timesteps": (1, 1_000_000),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "trained_betas": (0, 1),
    "solver_order": (1, 10),
    "shift": (1e-6, 1e6),
}
_LABEL_LENGTH = 10_000


def read_index(cls: type, file: Path) -> dict[str, Any]:
    """model_index.json, which names the components of this pipeline and nothing else. Nothing is imported."""
    index = read_json(file)
    known = _family(cls)
    try:
        if index.get("_class_name") not in known:
            expected = f"`_class_name` must be {' or '.join(known)}"
            if isinstance(index.get("_class_name"), list):
                expected += ", as on the branch main: no code of a repository is run"
            raise ValueError(f"{expected}, got {shown(index.get('_class_name'))}.")
        if "_use_default_values" in index or "_ignore_files" in index:
            raise ValueError("`_use_default_values` and `_ignore_files` must not be in a file.")
        unknown = sorted(map(shown, public_config(index).keys() - init_parameters(cls).keys()))
        if unknown:
            logger.warning("%s: %s is not used, as a %s has no such part.", file, listed(unknown), cls.__name__)
        for name, parameter in init_parameters(cls).items():
            if index.get(name) in (None, [None, None]):
                if parameter.default is parameter.empty and name not in cls._optional_components:
                    raise ValueError(f"`{name}` is missing.")
            elif name in cls._models or name in cls._schedulers or is_component(index[name]):
                _check_component(name, index[name], cls._models.get(name, ()), name in cls._schedulers)
        _check_labels(index.get("id2label"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return index


def _family(cls: type) -> list[str]:
    """The classes of pipelines that are made of the same components, a class and its bases first."""
    bases = [base for base in cls.__mro__ if hasattr(base, "_models")]
    family = [*bases]
    for base in family:
        family += [one for one in base.__subclasses__() if one._models is cls._models and one not in family]
    return [one.__name__ for one in family]


def is_component(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str | None) for part in value)


def _check_component(name: str, value: Any, kinds: tuple[type, ...], is_scheduler: bool) -> None:
    """Raise a ValueError unless `value` is [library, class] of what a component may be. Nothing is imported.

    It may be a model of the classes that are expected, any scheduler of diffusers, or for a component that a
    subclass of the pipeline adds a class of diffusers or transformers; and a class of these kinds of the user's own,
    once its module has been imported.
    """
    expected = [[kind.__module__.partition(".")[0], kind.__name__] for kind in kinds]
    if value in expected:
        return
    library, class_name = value if is_component(value) else (None, None)
    found = None
    if is_scheduler and library == "diffusers" and str(class_name).endswith("Scheduler"):
        if class_name in dir(diffusers.schedulers):  # names are looked up: getattr imports modules of diffusers alone
            found = getattr(diffusers.schedulers, class_name)
    elif library in ("diffusers", "transformers") and not kinds and not is_scheduler:
        return
    elif library != "diffusers":
        found = getattr(sys.modules.get(library), str(class_name), None)
    known = SchedulerMixin if is_scheduler else kinds or torch.nn.Module
    if not (isinstance(found, type) and issubclass(found, known)):
        expected = " or ".join(map(str, expected)) or "known"
        expected = "a scheduler of diffusers" if is_scheduler else expected
        raise ValueError(
            f"`{name}` must be {expected}, or a class of that kind whose module has been imported, got {shown(value)}."
        )


def let_diffusers_load(components: list[list[str | None]]) -> None:
    """Name the bases of models and schedulers in the modules of a user's own: diffusers looks for them there.

    The components have been checked: their modules are imported, and hold what is named.
    """
    for library in {library for library, _ in components} & sys.modules.keys():
        if library not in ("diffusers", "diffusers_d2it", "transformers"):
            for base in (diffusers.ModelMixin, SchedulerMixin):
                vars(sys.modules[library]).setdefault(base.__name__, base)


def _check_labels(id2label: Any) -> None:
    if not isinstance(id2label, dict | None):
        raise ValueError(f"`id2label` must be an object of names by id, got {shown(id2label)}.")
    for key, value in (id2label or {}).items():
        fits = key.isascii() and key.isdigit() and len(key) < 10
        if not (fits and isinstance(value, str) and len(value) <= _LABEL_LENGTH):
            raise ValueError(f"`id2label` must be names by whole numbers, got {shown(key)}: {shown(value)}.")


def check_scheduler_file(file: Path) -> None:
    config = read_json(file)
    try:
        check_values({"_class_name": None} | config, _SCHEDULER, _SCHEDULER_LIMITS)
        if "_use_default_values" in config:
            raise ValueError("`_use_default_values` must not be in a file.")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
