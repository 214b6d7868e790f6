# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A model from one loose file of weights, safetensors or GGUF, without the folder that it was saved with."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_utils import load_single_file_checkpoint

from ..files.folders import MissingFileError
from ..files.weights import Tensor, check_fits, check_values_finite
from ..words import listed, shown, visible


Model = TypeVar("Model", bound="SingleFileMixin")  # what is loaded is of the class that loads it

_SUFFIXES_OF_WEIGHTS = (".safetensors", ".gguf")
_HUB = ("force_download", "proxies", "token", "cache_dir", "local_files_only", "revision")


class SingleFileMixin(FromOriginalModelMixin):
    """`from_single_file` of diffusers for models that have no other format of weights than the saved one."""

    @classmethod
    def from_single_file(
        cls: type[Model],
        pretrained_model_link_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        *,
        config: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Model:
        """Load weights that lie in one file, under the names that `save_pretrained` gives them.

            D2iTContentModel.from_single_file("content.safetensors", config="user/model", subfolder="transformer")

        Args:
            pretrained_model_link_or_path_or_dict: the file, its address on the Hub, or the weights themselves.
            config: folder, or name on the Hub, of the `config.json` that says what the weights are of.
            **kwargs: as diffusers documents them: `subfolder` of the `config`, `dtype`, `quantization_config` (GGUF).

        Raises:
            ValueError: there is no `config`; the file is none of safetensors or GGUF; weights are missing, foreign to
                the model, of another shape, not floating point, or not finite, also in the `dtype` asked for.
            OSError: a file is not there.
        """
        source = pretrained_model_link_or_path_or_dict
        if isinstance(source, (str, os.PathLike)):
            source = os.path.expanduser(source)
        if not isinstance(config, (str, os.PathLike)):
            raise ValueError(
                f"`config` must be the folder, or name on the Hub, of the model's config.json, got {shown(config)}."
            )
        if not isinstance(source, Mapping):
            if not str(source).endswith(_SUFFIXES_OF_WEIGHTS):
                raise ValueError(
                    f"a file of weights must be one of {', '.join(_SUFFIXES_OF_WEIGHTS)}, got {shown(str(source))}."
                )
            if "://" not in str(source) and not os.path.isfile(source):
                raise MissingFileError(f"{source} is missing.")
            hub = {key: kwargs[key] for key in _HUB if key in kwargs}
            weights = load_single_file_checkpoint(str(source), **hub)
            where = str(source)
        else:
            weights, where = dict(source), "the weights given"
        kwargs["config"] = str(config)
        _check_weights(cls, weights, where, kwargs)
        return super().from_single_file(weights, **kwargs)


def _check_weights(cls: type, weights: Mapping[str, torch.Tensor], where: str, kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError unless these are the weights of the model that `config` and other arguments describe."""
    hub = {key: kwargs[key] for key in ("subfolder", "token", "local_files_only") if key in kwargs}
    config = cls.load_config(kwargs["config"], revision=kwargs.get("config_revision"), **hub)
    with torch.device("meta"):  # takes no memory
        expected = cls.from_config({**config, **kwargs}).state_dict()
    if kwargs.get("quantization_config") is None:
        tensors = {
            name: Tensor(Path(where), str(tensor.dtype), tuple(tensor.shape)) for name, tensor in weights.items()
        }
        check_fits(tensors, {name: tuple(value.shape) for name, value in expected.items()}, where)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        dtype = dtype if isinstance(dtype, torch.dtype) else None  # diffusers takes anything else for float32
        for name, tensor in weights.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{where}: `{visible(name)}` must be floating point, got {tensor.dtype}.")
            check_values_finite(tensor, dtype, f"{where}: `{visible(name)}`")
    elif expected.keys() != weights.keys():  # shapes of packed integers are of another kind
        names = listed(sorted(expected.keys() ^ weights.keys()))
        raise ValueError(f"{where} must have the names of the weights of a {cls.__name__}; not in both: {names}.")
