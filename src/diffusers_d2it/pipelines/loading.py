# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How a pipeline is loaded: what its files name is checked before anything is imported, and all is one commit."""

import os
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from huggingface_hub import hf_hub_download

from ..files.folders import read_json
from ..files.source import check_source, pin, refuse_code
from ..files.weights import check_sealed, sealed_files
from ..limits import Items, Number, Optional, Text, Whole, check_keys, check_ranges
from ..optional import naming_what_is_broken
from ..words import shown


INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"

_MODELS = {"vae": "DynamicAutoencoderKL", "grain_model": "D2iTGrainModel", "transformer": "D2iTContentModel"}
_SCHEDULERS = ("scheduler", "grain_scheduler")
_OPTIONAL = ("grain_model", "grain_scheduler")
_LABEL = Text(10_000)
# Of the many keys of schedulers those that decide how much memory is taken, and whether numbers stay finite
_SCHEDULER_RANGES = {
    "num_train_timesteps": Whole(1, 1_000_000),
    "beta_start": Number(0, 1),
    "beta_end": Number(0, 1),
    "trained_betas": Optional(Items(Number(0, 1), 1, 1_000_000)),
    "solver_order": Whole(1, 10),
    "shift": Optional(Number(1e-6, 1e6)),
}


class PipelineLoadingMixin:
    """`from_pretrained` and `download` of a pipeline that trust no file.

    It stands before `DiffusionPipeline`, which imports what model_index.json names.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a pipeline, as `diffusers.DiffusionPipeline.from_pretrained` does, from safetensors and JSON only.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hub, of which one commit is loaded.
            **kwargs: as diffusers documents them; a component by its name replaces the one in the folder.

        Raises:
            ValueError: an argument would run code or read pickled weights; the name is a URL; model_index.json names
                other components than those of this pipeline, or other classes than those of diffusers-d2it and the
                schedulers of diffusers; a file is missing or damaged; a model is refused by its own
                `from_pretrained`. The file is named.
            OSError: the Hub does not have it or cannot be reached.
            ImportError: a package that diffusers imports for it is broken; it is named.
        """
        refuse_code(kwargs)
        check_source(pretrained_model_name_or_path, None, kwargs.get("variant"))
        given = {name for name in (*_MODELS, *_SCHEDULERS) if name in kwargs}
        folder = pretrained_model_name_or_path
        if not os.path.isdir(folder):
            folder = cls.download(folder, **kwargs)
        check_pipeline_folder(cls, Path(folder), given)
        for name in ("revision", "cache_dir", "force_download", "local_files_only", "token"):
            kwargs.pop(name, None)  # what was to be fetched lies in the folder
        with naming_what_is_broken("loading a pipeline"):  # diffusers imports all that a component might be
            pipe = super().from_pretrained(str(folder), **kwargs | {"use_safetensors": True})
        pipe.register_to_config(_name_or_path=pretrained_model_name_or_path)
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Download a pipeline from the Hub, as `diffusers.DiffusionPipeline.download` does, and return its folder.

        All files come from one commit, which is asked for once.

        Raises:
            ValueError: an argument would run code or read pickled weights; the name is none of the Hub;
                model_index.json names what this pipeline does not have.
            OSError: the Hub does not have it or cannot be reached.
        """
        refuse_code(kwargs)
        check_source(pretrained_model_name, None, kwargs.get("variant"))
        hub = pin(pretrained_model_name, kwargs)
        index = hf_hub_download(pretrained_model_name, INDEX, **hub)
        check_index(cls, Path(index))
        return super().download(pretrained_model_name, **kwargs | hub | {"use_safetensors": True})


def check_pipeline_folder(cls: type, folder: Path, given: set[str]) -> None:
    """Check the files of a pipeline but those of its models, which check their own.

    Args:
        cls: the pipeline.
        folder: where it lies.
        given: components that are not loaded from there.

    Raises:
        ValueError: a file is missing, damaged, or names something that the pipeline does not have.
    """
    records = sealed_files(folder)
    check_sealed([folder / INDEX], records)
    index = check_index(cls, folder / INDEX)
    for name in (*_MODELS, *_SCHEDULERS):
        library, class_name = index.get(name, (None, None))
        if library is None or name in given:
            continue
        part = folder / name
        if not part.is_dir():
            raise ValueError(f"{part} is missing: {folder / INDEX} says that it holds a {class_name}.")
        if (code := part / f"{library}.py").exists():
            raise ValueError(f"{code} must not be there: no code is run.")
        if name in _SCHEDULERS:
            check_sealed([part / SCHEDULER_CONFIG], records)
            _check_scheduler(part / SCHEDULER_CONFIG)


def check_index(cls: type, file: Path) -> dict[str, Any]:
    """Read a model_index.json, and check that it names the components of a pipeline and nothing else.

    Raises:
        ValueError: it is missing or damaged, of another pipeline, a component is missing or unknown, or of a class
            that it cannot be of. Nothing has been imported then.
    """
    index = read_json(file)
    try:
        known = [base.__name__ for base in cls.__mro__ if issubclass(base, PipelineLoadingMixin)][:-1]
        if index.get("_class_name") not in known:
            raise ValueError(f"`_class_name` must be {' or '.join(known)}, got {shown(index.get('_class_name'))}.")
        public = {key: value for key, value in index.items() if not key.startswith("_")}
        if "_use_default_values" in index or "_ignore_files" in index:
            raise ValueError("`_use_default_values` and `_ignore_files` must not be in a file.")
        check_keys(public, {*_MODELS, *_SCHEDULERS, "id2label"})
        for name, class_name in _MODELS.items():
            _check_component(name, index.get(name), ["diffusers_d2it", class_name])
        for name in _SCHEDULERS:
            library, class_name = _check_component(name, index.get(name), ["diffusers", None])
            if library is not None and not _is_scheduler(class_name):
                raise ValueError(f"`{name}` must be a scheduler of diffusers, got {shown(index[name])}.")
        _check_labels(index.get("id2label"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return index


def _check_component(name: str, value: Any, expected: list) -> list:
    """The [library, class] of a component, both null where it may be left out; an expected null is any string."""
    if name in _OPTIONAL and value in (None, [None, None]):
        return [None, None]
    fits = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    if not fits or any(part not in (None, found) for part, found in zip(expected, value)):
        words = "a scheduler of diffusers" if expected[1] is None else shown(expected)
        raise ValueError(f"`{name}` must be {words}, got {shown(value)}.")
    return value


def _is_scheduler(class_name: str) -> bool:
    # The names of diffusers are looked up, not imported: getattr imports its own modules alone
    if not class_name.endswith("Scheduler") or class_name not in dir(diffusers.schedulers):
        return False
    found = getattr(diffusers.schedulers, class_name)
    return isinstance(found, type) and issubclass(found, SchedulerMixin)


def _check_labels(id2label: Any) -> None:
    if id2label is None:
        return
    if not isinstance(id2label, dict):
        raise ValueError(f"`id2label` must be an object of names by id, got {shown(id2label)}.")
    for key, value in id2label.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10) or not _LABEL.allows(value):
            raise ValueError(f"`id2label` must be names by whole numbers, got {shown(key)}: {shown(value)}.")


def _check_scheduler(file: Path) -> None:
    config = read_json(file)
    try:
        if not isinstance(config.get("_class_name"), str):
            raise ValueError(f"`_class_name` must be a string, got {shown(config.get('_class_name'))}.")
        if "_use_default_values" in config:
            raise ValueError("`_use_default_values` must not be in a file.")
        check_ranges(config, _SCHEDULER_RANGES)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
