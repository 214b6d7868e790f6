# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Loading that checks everything first and replaces nothing silently, saving that is whole or absent."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging

from ..files.folders import STAGING, read_json, save_folder
from ..files.source import HUB_ARGUMENTS, WithoutOrigin, find_model, public_config, refuse_code
from ..files.weights import (
    check_finite,
    check_fits,
    check_floating,
    check_sealed,
    read_headers,
    sealed_files,
    weight_files,
)
from ..limits import check_values
from ..words import listed, shown
from .configs import FURTHER_KEYS, LIMITS
from .single_file import Model, SingleFileMixin


logger = logging.get_logger(__name__)

CONFIG = "config.json"
_NOT_SAVED = "it is not saved, as it could not be loaded again: "


class StrictModelMixin(SingleFileMixin, WithoutOrigin, ModelMixin):
    """A `ModelMixin` that loads what was saved or nothing, and saves everything or nothing.

    diffusers ignores keys of a configuration that it does not know, initialises weights that are missing at random,
    drops what is foreign and reads pickled files. It saves file by file over what is there.
    """

    # Raises a ValueError if keys of a configuration, each of which is in its range, contradict one another
    _check_together: Callable[[Mapping[str, Any]], None]

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Check a whole configuration, with a value for each argument of the constructor.

        Raises:
            ValueError: a value is of another type than the constructor says, out of its range, or contradicts another;
                the key and its value are named.
        """
        check_values(config, get_type_hints(cls.__init__), LIMITS)
        cls._check_together(config)

    @classmethod
    def from_pretrained(cls: type[Model], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Model:
        """Load a model, as `diffusers.ModelMixin.from_pretrained` does, from safetensors only.

        Everything is checked before anything of the model's size is allocated: the configuration key by key, the
        headers of the files, the manifest if there is one, names and shapes of the weights, and their values.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hub, of which one commit is loaded.
            **kwargs: as diffusers documents them; keys of the configuration replace those in the file. With
                `ignore_mismatched_sizes` another `num_classes` begins a new table of labels, and nothing else.

        Raises:
            ValueError: an argument would read anything else than safetensors or run code; the name is a URL; a key of
                the configuration is unknown or out of range; a file is missing, damaged or not what the manifest
                lists; weights are missing, foreign to the model, of another shape or not finite. The file is named.
            OSError: the Hub does not have it or cannot be reached.
        """
        refuse_code(kwargs)
        anew = kwargs.pop("ignore_mismatched_sizes", False) and "num_classes" in init_parameters(cls)
        num_classes = kwargs.pop("num_classes", None) if anew else None
        subfolder, variant = str(kwargs.pop("subfolder", None) or "") or None, kwargs.pop("variant", None)
        folder = find_model(pretrained_model_name_or_path, subfolder, variant, kwargs)
        cls._check_folder(folder, variant, kwargs)
        return_info = kwargs.pop("output_loading_info", False)
        options = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS}
        options |= {"variant": variant, "use_safetensors": True, "output_loading_info": True}
        model, info = super().from_pretrained(str(folder), **options)
        model.register_to_config(_name_or_path=pretrained_model_name_or_path)
        check_loaded(cls, folder, info)
        if num_classes not in (None, model.config.get("num_classes")):
            logger.warning("%s: a new `label_embed` of %d classes begins.", folder, num_classes)
            model.start_new_classes(num_classes)
        return (model, info) if return_info else model

    @classmethod
    def _check_folder(cls, folder: Path, variant: str | None, kwargs: dict[str, Any]) -> None:
        """Check all files of a model that are going to be read, and that they fit one another."""
        files = checked_files(folder, variant)
        names = [base.__name__ for base in cls.__mro__ if issubclass(base, StrictModelMixin)][:-1]
        config = read_config(cls, folder / CONFIG, kwargs, names, cls.check_config)
        tensors = read_headers(files)
        if config.get("quantization_config") is None and kwargs.get("quantization_config") is None:
            check_floating(tensors)
            with torch.device("meta"):  # takes no memory
                model = cls(**{key: value for key, value in config.items() if key not in FURTHER_KEYS})
            shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
            check_fits(tensors, shapes, f"{cls.__name__} in {folder}")
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        check_finite(tensors, dtype if isinstance(dtype, torch.dtype) else None)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As of diffusers: `torch.compile` every repeated block, however many widths and sizes of one there are."""
        # Blocks of a class share their code: each width and size of an autoencoder is another variant of it
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        super().compile_repeated_blocks(*args, **kwargs)

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
        **kwargs: Any,
    ) -> None:
        """Save a model to a folder, whole or not at all, sealed by a manifest; see `files.folders`.

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
            **kwargs: of `push_to_hub`; its `repo_id` is the name of the folder by default.

        Raises:
            ValueError: something else than safetensors is asked for, the folder is a file, the configuration has
                been given a value that could not be loaded, or another process is saving there.
            TypeError: `push_to_hub` does not have such an argument.
            OSError: the disk is full or failed. What was in the folder is still there.
        """
        refuse_unsafe(safe_serialization, use_flashpack)
        folder = Path(save_directory).absolute()
        pushed = kwargs | {"repo_id": kwargs.get("repo_id") or folder.name, "variant": variant}
        inspect.signature(self.push_to_hub).bind(**pushed)
        if not is_main_process:
            return
        self.check_config(self.config)
        self._check_state()
        save = super().save_pretrained

        def write(path: str | os.PathLike) -> None:
            with saving(path, folder):
                save(path, save_function=save_function, variant=variant, max_shard_size=max_shard_size)
                self._check_folder(Path(path), variant, {})

        if any(part.startswith(STAGING) for part in folder.parts):
            write(folder)  # whoever saves there seals all of it
        else:
            save_folder(folder, write)
        if push_to_hub:
            self.push_to_hub(**pushed)

    def _check_state(self) -> None:
        """Raise a ValueError if there is more in the model than its configuration tells."""
        name = type(self).__name__
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"a {name} with adapters is not saved: `save_lora_adapter` saves them; for the model call"
                " `unload_lora()` first, after `fuse_lora()` if they are to stay in its weights."
            )
        if any(getattr(module, "fused_projections", False) for module in self.modules()):
            raise ValueError(f"a {name} with fused projections is not saved: call `unfuse_qkv_projections()` first.")
        if any(weight.is_meta for weight in self.parameters()):
            raise ValueError(
                f"a {name} whose weights are offloaded by accelerate is not saved: remove its hooks first."
            )

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        return {"self", *init_parameters(input_class)}

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As of diffusers, without keys that it would hand to the constructor although nobody knows them."""
        known = {key: value for key, value in config_dict.items() if key.startswith("_") or key in _known_keys(cls)}
        return super().extract_init_dict(known, **kwargs)


class SafeAdapterMixin(PeftAdapterMixin):
    """Adapters (LoRA) from safetensors only: diffusers falls back to pickled files where it finds no others."""

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Load an adapter, as `diffusers.loaders.PeftAdapterMixin.load_lora_adapter` does.

        Raises:
            ValueError: an argument, or the file, would read pickled weights.
            OSError: there are no safetensors.
        """
        refuse_pickled_adapter(pretrained_model_name_or_path_or_dict, kwargs)
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs | {"use_safetensors": True})

    def save_lora_adapter(
        self, save_directory: str | os.PathLike, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """Save an adapter, as `diffusers.loaders.PeftAdapterMixin.save_lora_adapter` does.

        Raises:
            ValueError: something else than safetensors is asked for.
        """
        refuse_unsafe(safe_serialization, use_flashpack=False)
        super().save_lora_adapter(save_directory, *args, **kwargs)


def checked_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of a model's weights, of `weight_files`, once they and its configuration are what manifests list.

    Raises:
        MissingFileError: there are none.
        ValueError: a file is damaged, not what is listed, or an index of shards that is not checked.
    """
    records = sealed_files(folder)  # puts in order what a killed process left, so it comes first
    for legacy in folder.glob(f"*.{variant}.*index.json"):  # of shards, which diffusers would read instead
        raise ValueError(f"{legacy} must not be there: no index of this form is read.")
    files = weight_files(folder, variant)
    check_sealed([folder / CONFIG, *files], records)
    return files


def read_config(
    cls: type,
    file: Path,
    overrides: Mapping[str, Any],
    class_names: list[str],
    check: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """The configuration that a file and some arguments make together, checked, with every key of the constructor.

    Args:
        cls: the class that it is for.
        file: config.json.
        overrides: replace keys of the file; what is no key is left out.
        class_names: what the file may call the class.
        check: raises a ValueError if a value is not as it must be.

    Raises:
        ValueError: the file is missing, damaged, of another class, or refused by `check`; it is named.
    """
    stored = read_json(file)
    defaults = {name: parameter.default for name, parameter in init_parameters(cls).items()}
    overrides = {key: value for key, value in overrides.items() if key in defaults}
    source = str(file) if not overrides else f"{file} with the arguments {', '.join(sorted(overrides))}"
    public = public_config(stored)
    unknown = sorted(map(shown, public.keys() - _known_keys(cls)))
    if unknown:  # of a newer version, or of another tool
        logger.warning("%s: %s is not used, as a %s has no such key.", file, listed(unknown), cls.__name__)
    public = {key: value for key, value in public.items() if key in _known_keys(cls)}
    config = defaults | public | overrides
    try:
        if (name := stored.get("_class_name")) not in class_names:
            raise ValueError(f"`_class_name` must be {' or '.join(class_names)}, got {shown(name)}.")
        if "_use_default_values" in stored:  # would make others of the keys not count
            raise ValueError("`_use_default_values` must not be in a file.")
        check_values(public, FURTHER_KEYS, LIMITS)
        check(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return config


def check_loaded(cls: type, folder: Path, info: Mapping[str, Any]) -> None:
    """Raise a ValueError if `from_pretrained` of diffusers notes that weights were not those of the model."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            raise ValueError(f"{cls.__name__} in {folder}: {len(info[kind])} {kind}, such as {first}.")


def init_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a constructor, and where it takes any others by **kwargs those of its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        _, *parameters = inspect.signature(base.__init__).parameters.values()
        named = (one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL))
        found = {one.name: one for one in named} | found
        if not any(one.kind == one.VAR_KEYWORD for one in parameters):
            break
    return found


def _known_keys(cls: type) -> set[str]:
    return {*init_parameters(cls), *FURTHER_KEYS}


@contextmanager
def saving(staging: str | os.PathLike, folder: Path) -> Iterator[None]:
    """While what was just saved aside is checked like what is loaded: a ValueError says so, and speaks of `folder`."""
    try:
        yield
    except ValueError as error:
        reason = str(error).replace(str(staging), str(folder)).removeprefix(_NOT_SAVED)
        raise ValueError(f"{_NOT_SAVED}{reason}") from error


def refuse_pickled_adapter(source: Any, arguments: dict[str, Any]) -> None:
    """Raise a ValueError for a file, or arguments, that lead to adapters which can hold code."""
    refuse_code(arguments)
    name = arguments.get("weight_name")
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        name = source
    if name is not None and not str(name).endswith(".safetensors"):
        raise ValueError(f"`weight_name` must end with .safetensors, got {shown(name)}: others can hold code.")


def refuse_unsafe(safe_serialization: bool, use_flashpack: bool) -> None:
    """Raise a ValueError unless weights are to be saved as safetensors."""
    if not safe_serialization:
        raise ValueError("`safe_serialization` must be True: pickled weights run code where they are loaded.")
    if use_flashpack:
        raise ValueError("`use_flashpack` must be False: weights are saved as safetensors.")
