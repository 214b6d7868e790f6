# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Where something is loaded from: a folder, or one commit of a repository of the Hub. No URL, no code, no pickle."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import resolve_revision, snapshot_download
from huggingface_hub.errors import HFValidationError, RevisionResolutionError
from huggingface_hub.utils import validate_repo_id

from ..presets import list_bundled_checkpoints
from ..words import close_to, listed, printable, shown
from .folders import read_json
from .weights import weight_names


PARTS: set[str] = set()  # sub-folders of a repository; each class of pipelines adds the names of its components
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # of `from_pretrained`
# Arguments of diffusers that lead to code or pickled weights, and the only values of theirs that do not here
_HARMLESS = {
    "custom_pipeline": (None,),
    "custom_revision": (None,),
    "trust_remote_code": (None, False, True),  # a repository is free to hold none
    "load_connected_pipeline": (None, False),
    "use_safetensors": (None, True),
    "use_onnx": (None, False),
    "use_flashpack": (None, False),
    "provider": (None,),
    "sess_options": (None,),
    "provider_options": (None,),
}
_OF_MODELS = ("config.json", "model_index.json")  # one of them lies in the folder of a model or a pipeline
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/:]")  # not the C:/ of a drive
_VARIANT = re.compile(r"\w+(-\w+)*", re.ASCII)


def refuse_code(arguments: dict[str, Any]) -> None:
    """Raise a ValueError for arguments of `from_pretrained` that run code, or read weights that can hold code.

    `trust_remote_code` is dropped: what a repository holds decides, and if that is code it is refused, trusted or not.
    """
    for name, harmless in _HARMLESS.items():
        if name in arguments and arguments[name] not in harmless:
            raise ValueError(
                f"`{name}` must be {' or '.join(map(str, harmless))}, got {shown(arguments[name])}: only safetensors"
                " and JSON are read, no code is run, and pickled weights can hold code."
            )
    arguments.pop("trust_remote_code", None)


def refuse_lost_path(name: str | os.PathLike, argument: str) -> None:
    """Raise a ValueError if a name that is no folder looks like the path of one: the Hub is not asked for it.

    It does if it begins or is written like a path, or if the folder that it would lie in is there.
    """
    text = os.fspath(name)
    parent, last = os.path.split(text.rstrip("/"))
    is_path = text.startswith((".", "~", "/")) or "\\" in text or text.count("/") > 1 or os.path.isdir(parent)
    if os.path.isdir(text) or not is_path:
        return
    there = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
    close = [os.path.join(parent, other) for other in close_to(last, there, most=1)]
    hint = f": did you mean {shown(close[0])}?" if close else "."
    raise ValueError(f"`{argument}`: there is no folder {shown(text)}{hint}")


def check_source(name: str | os.PathLike, subfolder: str | None, variant: str | None) -> None:
    """Raise a ValueError unless `name` is a folder or a name on the Hub, `subfolder` inside, and `variant` a word."""
    expected = "`pretrained_model_name_or_path` must be a folder or a name on the Hub"
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(f"{expected}, got {shown(name)}.")
    text = os.fspath(name)
    for what, found in (("URL", _URL.match(text)), ("file", os.path.isfile(text))):
        if found:
            raise ValueError(f"{expected}, got the {what} {shown(text)}.")
    refuse_lost_path(text, "pretrained_model_name_or_path")
    inside = sorted({str(path.parent) for kind in _OF_MODELS for path in Path(text).glob(f"*/{kind}")})
    if subfolder is None and inside and not any(Path(text, kind).is_file() for kind in _OF_MODELS):
        missing = " and ".join(str(Path(text, kind)) for kind in _OF_MODELS)
        raise ValueError(f"{missing} are missing: did you mean {listed(inside)}?")
    if not os.path.isdir(text):
        try:
            validate_repo_id(text)
        except HFValidationError as error:
            raise ValueError(f"{expected}, got {shown(text)}: {printable(error)}") from None
    if subfolder is not None:
        parts = re.split(r"[/\\]", str(subfolder))
        if os.path.isabs(subfolder) or ".." in parts or _URL.match(str(subfolder)):
            raise ValueError(f"`subfolder` must be a folder inside, got {shown(subfolder)}.")
    if variant is not None and not (isinstance(variant, str) and _VARIANT.fullmatch(variant)):
        raise ValueError(f"`variant` must be a word such as 'fp16', got {shown(variant)}.")


def pin(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments about the Hub among those of `from_pretrained`, with the one commit that serves the whole load.

    A branch may move between two downloads. With local_files_only or HF_HUB_OFFLINE nothing is asked: the commit is
    the one that was seen last.

    Args:
        name: of a repository.
        arguments: cache_dir, force_download, local_files_only, revision and token are taken.

    Raises:
        OSError, ValueError: there is no such repository or revision, or none is known and the Hub cannot be reached.
    """
    found = {key: arguments.get(key) for key in ("cache_dir", "token")}
    found["local_files_only"] = bool(arguments.get("local_files_only"))
    try:
        revision = resolve_revision(name, revision=arguments.get("revision"), **found)
    except RevisionResolutionError as error:
        bundled = f" (`bundled_checkpoint({name!r})` is one)" if name in list_bundled_checkpoints() else ""
        raise OSError(
            f"{shown(name)} is not a folder{bundled}, and was not found on the Hub: {printable(error)}"
        ) from error
    # The SHA: as a string the object is the name of the branch
    return found | {"force_download": bool(arguments.get("force_download")), "revision": revision.resolved}


def find_model(name: str | os.PathLike, subfolder: str | None, variant: str | None, arguments: dict[str, Any]) -> Path:
    """The folder of a model: inside of a folder, or in the cache of the Hub, to which one commit is downloaded.

    Raises:
        ValueError: `name` is neither a folder nor a name of the Hub.
        OSError, ValueError: as for `pin`, or files are missing from the cache and the Hub cannot be reached.
    """
    check_source(name, subfolder, variant)
    if os.path.isdir(name):
        return Path(name, subfolder or "")
    inside = "" if subfolder is None else f"{subfolder.strip('/')}/"
    stem = "diffusion_pytorch_model"
    names = ["config.json", *weight_names(variant)]
    if variant is None:
        names += [f"{stem}-?????-of-?????.safetensors"]
    else:
        names += [f"{stem}.{variant}-?????-of-?????.safetensors", f"{stem}-?????-of-?????.{variant}.safetensors"]
    folder = snapshot_download(str(name), allow_patterns=[f"{inside}{name}" for name in names], **pin(name, arguments))
    return Path(folder, subfolder or "")


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what diffusers notes in it about classes, files and versions."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def without_origin(config: str) -> str:
    """A configuration as JSON, without where it was loaded from."""
    values = json.loads(config)
    values.pop("_name_or_path", None)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


class WithoutOrigin:
    """A `ConfigMixin` that writes down nothing about where it was loaded from: a folder of this machine, mostly."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        return read_json(Path(json_file))  # also as editors of Windows write it

    def to_json_string(self) -> str:
        """The configuration as it is saved."""
        return without_origin(super().to_json_string())
