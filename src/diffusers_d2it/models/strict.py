# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Loading that checks everything first and replaces nothing silently, saving that is whole or absent."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin

from ..files.folders import STAGING, read_json, save_folder
from ..files.source import (
    check_source,
    download_model,
    forget_origin,
    refuse_code,
)
from ..files.weights import (
    check_finite,
    check_fits,
    check_floating,
    check_sealed,
    read_headers,
    sealed_files,
    weight_files,
)
from ..limits import Flag, Number, Object, Optional, Rule, Whole, check_keys, check_ranges
from ..words import shown


CONFIG = "config.json"

# Keys beside those of a constructor: what quantisation notes, and diffusers' EMAModel when it saves a model
_FURTHER_KEYS: dict[str, Rule] = {
    "quantization_config": Optional(Object()),
    "decay": Number(0, 1),
    "min_decay": Number(0, 1),
    "optimization_step": Whole(0, 10**15),
    "update_after_step": Whole(0, 10**15),
    "use_ema_warmup": Flag(),
    "inv_gamma": Number(0, 1e15),
    "power": Number(0, 1e3),
}


class StrictModelMixin(ModelMixin):
    """A `ModelMixin` that loads what was saved or nothing, and saves everything or nothing.

    diffusers ignores keys of a configuration that it does not know, initialises weights that are missing at random,
    drops what is foreign and reads pickled files. It saves file by file over what is there.
    """

    # Raises a ValueError unless a whole configuration, with a value for each key, is in range; see `config_ranges`.
    check_config: Callable[[Mapping[str, Any]], None]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a model, as `diffusers.ModelMixin.from_pretrained` does, from safetensors only.

        Everything is checked before anything of the model's size is allocated: the configuration key by key, the
        headers of the files, the manifest if there is one, names and shapes of the weights, and their values.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hub, of which one commit is loaded.
            **kwargs: as diffusers documents them; keys of the configuration replace those in the file.

        Raises:
            ValueError: an argument would read anything else than safetensors or run code; the name is a URL; a key of
                the configuration is unknown or out of range; a file is missing, damaged or not what the manifest
                lists; weights are missing, foreign to the model, of another shape or not finite. The file is named.
            OSError: the Hub does not have it or cannot be reached.
        """
        refuse_code(kwargs)
        subfolder, variant = str(kwargs.pop("subfolder", None) or "") or None, kwargs.pop("variant", None)
        check_source(pretrained_model_name_or_path, subfolder, variant)
        if os.path.isdir(pretrained_model_name_or_path):
            folder = Path(pretrained_model_name_or_path, subfolder or "")
        else:
            folder = download_model(pretrained_model_name_or_path, subfolder, variant, kwargs)
        cls._check_folder(folder, variant, kwargs)
        return_info = kwargs.pop("output_loading_info", False)
        for name in ("use_safetensors", "revision", "cache_dir", "force_download", "local_files_only", "token"):
            kwargs.pop(name, None)  # what was to be fetched lies in the folder
        model, info = super().from_pretrained(
            str(folder), variant=variant, use_safetensors=True, output_loading_info=True, **kwargs
        )
        model.register_to_config(_name_or_path=pretrained_model_name_or_path)
        _check_info(info, f"{cls.__name__} in {folder}")
        return (model, info) if return_info else model

    @classmethod
    def _check_folder(cls, folder: Path, variant: str | None, kwargs: dict[str, Any]) -> None:
        """Check all files of a model that are going to be read, and that they fit one another."""
        records = sealed_files(folder)  # puts in order what a killed process left, so it comes first
        for legacy in folder.glob(f"*.{variant}.*index.json"):  # of shards, which diffusers would read instead
            raise ValueError(f"{legacy} must not be there: no index of this form is read.")
        files = weight_files(folder, variant)
        check_sealed([folder / CONFIG, *files], records)
        config = cls._read_config(folder / CONFIG, kwargs)
        tensors = read_headers(files)
        if config.get("quantization_config") is None and kwargs.get("quantization_config") is None:
            check_floating(tensors)
            check_fits(tensors, cls._shapes(config), f"{cls.__name__} in {folder}")
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        check_finite(tensors, dtype if isinstance(dtype, torch.dtype) else None)

    @classmethod
    def _read_config(cls, file: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The configuration that a file and the arguments make together, checked, with every key."""
        stored = read_json(file)
        defaults = _defaults(cls)
        overrides = {key: value for key, value in kwargs.items() if key in defaults}
        source = str(file) if not overrides else f"{file} with the arguments {', '.join(sorted(overrides))}"
        public = {key: value for key, value in stored.items() if not key.startswith("_")}
        try:
            _check_class(cls, stored.get("_class_name"))
            if "_use_default_values" in stored:  # would make others of the keys not count
                raise ValueError("`_use_default_values` must not be in a file.")
            check_keys(public, defaults.keys() | _FURTHER_KEYS.keys())
            check_ranges(public, _FURTHER_KEYS)
            cls.check_config(defaults | public | overrides)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return defaults | public | overrides

    @classmethod
    def _shapes(cls, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of a model, which is made without memory for that."""
        with torch.device("meta"):
            model = cls(**{key: value for key, value in config.items() if key not in _FURTHER_KEYS})
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> None:
        """Save a model to a folder, whole or not at all, sealed by a manifest; see `saving`.

        In a folder that something larger is being saved to, such as a pipeline, its manifest lists the model too.

        Args:
            save_directory: the folder; other files in it stay.
            is_main_process: False writes nothing.
            save_function: not used, as in diffusers.
            safe_serialization: True; nothing is pickled.
            variant: named in the files of the weights, such as "fp16".
            max_shard_size: of a file, as a number of bytes or in words such as "5GB".
            push_to_hub: push the model, and nothing else of the folder, once it is saved.
            use_flashpack: False; only safetensors are written.
            repo_id: None for the name of the folder. It and what follows serve `push_to_hub` alone.
            private, token, commit_message, create_pr: as for `push_to_hub`.

        Raises:
            ValueError: something else than safetensors is asked for, the folder is a file, the configuration has
                been given a value that could not be loaded, or another process is saving there.
            OSError: the disk is full or failed. What was in the folder is still there.
        """
        refuse_unsafe(safe_serialization, use_flashpack)
        if not is_main_process:
            return
        folder = Path(save_directory).absolute()
        self.check_config(self.config)
        save = super().save_pretrained

        def write(path: str | os.PathLike) -> None:
            save(path, save_function=save_function, variant=variant, max_shard_size=max_shard_size)
            forget_origin(Path(path, CONFIG))

        if any(part.startswith(STAGING) for part in folder.parts):
            write(folder)  # whoever saves there seals all of it
        else:
            save_folder(folder, write)
        if push_to_hub:
            self.push_to_hub(
                repo_id or folder.name,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
                variant=variant,
            )


class SafeAdapterMixin(PeftAdapterMixin):
    """Adapters (LoRA) from safetensors only: diffusers falls back to pickled files where it finds no others."""

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Load an adapter, as `diffusers.loaders.PeftAdapterMixin.load_lora_adapter` does.

        Raises:
            ValueError: an argument would read pickled weights.
            OSError: there are no safetensors.
        """
        refuse_code(kwargs)
        name = kwargs.get("weight_name")
        if name is not None and not str(name).endswith(".safetensors"):
            raise ValueError(
                f"`weight_name` must end with .safetensors, got {shown(name)}: pickled weights can hold code."
            )
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs | {"use_safetensors": True})


def refuse_unsafe(safe_serialization: bool, use_flashpack: bool) -> None:
    """Raise a ValueError unless weights are to be saved as safetensors."""
    if not safe_serialization:
        raise ValueError("`safe_serialization` must be True: pickled weights run code where they are loaded.")
    if use_flashpack:
        raise ValueError("`use_flashpack` must be False: weights are saved as safetensors.")


def _defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name != "self" and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def _check_class(cls: type, name: Any) -> None:
    """Raise a ValueError unless a configuration is of a class, or of one that it extends."""
    known = [base.__name__ for base in cls.__mro__ if issubclass(base, StrictModelMixin)][:-1]
    if name not in known:
        raise ValueError(f"`_class_name` must be {' or '.join(known)}, got {shown(name)}.")


def _check_info(info: dict[str, Any], source: str) -> None:
    """Raise a ValueError if diffusers found the weights not to fit after all."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[kind]:
            raise ValueError(f"{source}: {len(info[kind])} {kind}, such as {sorted(map(str, info[kind]))[0]}.")
