# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Files of weights, checked before they are read: their headers, against the seal, and against the model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open

from ..words import counted, printable, shown, visible
from .folders import MANIFEST, MissingFileError, check_file, check_is_file, read_json, series_of, settle


logger = logging.get_logger(__name__)

MAX_HEADER = 2**21  # bytes: 15,000 tensors; safetensors itself reads 100 MB

_WAY_OUT = f"Copy or save all of it again, or remove {MANIFEST} to load what is there."
_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_HALVES = ("F16", "BF16")


class Tensor(NamedTuple):
    """What a header says about a tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_names(variant: str | None, suffix: str = ".safetensors") -> tuple[str, str]:
    """Names of the file of all weights of a model and of the index of its shards, as diffusers gives them."""
    variant = "" if variant is None else f".{variant}"
    return f"diffusion_pytorch_model{variant}{suffix}", f"diffusion_pytorch_model{suffix}.index{variant}.json"


def weight_files(folder: Path, variant: str | None = None, suffix: str = ".safetensors") -> list[Path]:
    """The files of a model's weights: the index of shards, if it is there, and its shards, else the single file.

    Raises:
        MissingFileError: there is neither.
        ValueError: the index is damaged, or names anything but such files beside it.
    """
    single, index = (folder / name for name in weight_names(variant, suffix))
    if index.is_file():
        return [index, *sorted(set(read_index(index, suffix).values()))]
    if not single.is_file():
        raise MissingFileError(f"{single} is missing, and so is {index.name}.")
    return [single]


def read_index(file: Path, suffix: str) -> dict[str, Path]:
    """The file of every tensor, from an index of shards.

    Raises:
        ValueError: the index is damaged, or names anything but files beside it that end with `suffix`.
    """
    index = read_json(file)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{file} is damaged: it must hold `metadata` and a `weight_map` of names.")
    for place in places.values():
        # "../other/model.safetensors" or "/etc/..." in a file from somebody else, or one that runs code when read
        plain = isinstance(place, str) and place.isprintable() and not {"/", "\\"} & set(place)
        if not plain or place.startswith(".") or not place.endswith(suffix):
            raise ValueError(f"{file} must name files beside it, got {shown(place)}, expected are names in {suffix}.")
    return {name: file.parent / place for name, place in places.items()}


def read_headers(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors in the files of `weight_files`, none of which is read.

    Raises a ValueError if a file is missing or damaged, or the shards do not hold what their index says.
    """
    index, *shards = files
    if not shards:
        return read_header(index)
    places = read_index(index, ".safetensors")
    tensors: dict[str, Tensor] = {}
    for file in shards:
        tensors |= (found := read_header(file))
        named = {name for name, place in places.items() if place == file}
        if found.keys() != named:
            name = sorted(found.keys() ^ named)[0]
            raise ValueError(f"{index} and {file.name} do not agree: {shown(name)} is named by only one of them.")
    return tensors


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: the file is missing, no safetensors file, cut off, or its header contradicts its size or itself.
    """
    check_is_file(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"{file} is damaged: its header has {length} bytes, a header has at most {MAX_HEADER}.")
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: Tensor(file, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {printable(error)}") from None


def check_floating(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless every tensor is floating point, and all those of 16 bits are of one kind.

    Integers of the same size would load as numbers of another size, and so would one half precision as the other.
    """
    halves = {tensor.dtype: name for name, tensor in tensors.items() if tensor.dtype in _HALVES}
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATING:
            raise ValueError(f"{tensor.file}: `{visible(name)}` must be floating point, got {tensor.dtype}.")
        if len(halves) > 1 and tensor.dtype in halves:
            names = " and ".join(f"`{visible(name)}` of {dtype}" for dtype, name in sorted(halves.items()))
            raise ValueError(f"{tensor.file}: weights must be of one kind of 16 bits, got {names}.")


def check_fits(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], files: str) -> None:
    """Raise a ValueError unless the tensors in some files are the weights of a model, by names and shapes.

    It says what is missing, foreign to the model or of another shape, and how much; `files` are named in words.
    """
    missing = sorted(expected.keys() - tensors.keys())
    foreign = sorted(tensors.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & tensors.keys() if tensors[name].shape != expected[name])
    problems = []
    if missing:
        problems.append(f"{counted(len(missing), 'tensor')} missing, such as `{missing[0]}`")
    if foreign:
        problems.append(f"{counted(len(foreign), 'tensor')} unknown to the model, such as {shown(foreign[0])}")
    if other:
        file, _, shape = tensors[other[0]]
        found = f"{shown(shape)} in {file.name}, {expected[other[0]]} in the model"
        problems.append(f"{counted(len(other), 'tensor')} of another shape, such as `{other[0]}`: {found}")
    if problems:
        raise ValueError(f"the weights of {files} do not fit it: {'; '.join(problems)}.")


def check_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Raise a ValueError unless every value of all files is finite, also in the `dtype` that it will be cast to.

    Nothing is kept: the files are mapped into memory, and the model that reads them next finds them there.
    """
    for file in sorted({tensor.file for tensor in tensors.values()}):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    if tensors[name].dtype in _FLOATING:
                        check_values_finite(opened.get_tensor(name), dtype, f"{file}: `{visible(name)}`")
        except (SafetensorError, OSError, KeyError) as error:  # KeyError: it has changed since its header was read
            raise ValueError(f"{file} is damaged: {printable(error)}") from error


def check_values_finite(values: torch.Tensor, dtype: torch.dtype | None, where: str) -> None:
    """Raise a ValueError that says `where` unless every value is finite, also in the `dtype` it will be cast to."""
    if values.numel() == 0:
        return
    if values.dtype.itemsize == 1:
        values = values.float()  # 8-bit numbers have no minimum and maximum of their own
    extremes = torch.aminmax(values)  # both are NaN if one value is
    lowest, highest = extremes.min.item(), extremes.max.item()
    if not all(extreme.isfinite() for extreme in extremes):
        raise ValueError(f"{where} must be finite, got values from {lowest} to {highest}.")
    if dtype is not None and dtype.is_floating_point and not all(extreme.to(dtype).isfinite() for extreme in extremes):
        raise ValueError(f"{where} does not fit {dtype}: its values go from {lowest:.4g} to {highest:.4g}.")


def sealed_files(folder: Path) -> dict[Path, list[dict]]:
    """Finish interrupted saves into a folder and around it, and look up what their manifests list.

    The folder's own manifest counts, and those of the two folders around it: a model that was saved as a part of
    something larger, such as a pipeline, is listed there, and one of its files may have been saved anew by itself.

    Returns:
        The records of each file, absolute, that a manifest lists.

    Raises:
        ValueError: a manifest is damaged.
    """
    folder = folder.absolute()
    records: dict[Path, list[dict]] = {}
    for sealed in (*reversed(folder.parents[:2]), folder):  # what surrounds may still bring files of the folder
        if _lists(sealed, folder):
            for name, record in settle(sealed)["files"].items():
                records.setdefault(sealed / name, []).append(record)
    return records


def check_sealed(files: Iterable[Path], records: Mapping[Path, list[dict]]) -> None:
    """Compare files with what manifests say of them, the records of `sealed_files`.

    Weights must be those that were saved. A text that somebody has edited since, or a file that has come beside what
    was saved, is named by a warning: what it holds is checked like that of any file.

    Raises:
        ValueError: a file is missing, or weights are others.
    """
    series = {(file.parent, series_of(file.name)) for file in records}
    folders = {folder for folder, _ in series}
    for file in (file.absolute() for file in files):
        if file in records:
            try:
                check_file(file, *reversed(records[file]))
            except MissingFileError:
                raise
            except ValueError as error:
                if ".safetensors" in file.name:  # and the index of shards
                    raise ValueError(f"{error} {_WAY_OUT}") from None
                logger.warning("%s is not as it was saved: it is loaded as it stands.", file)
        elif (file.parent, series_of(file.name)) in series and ".safetensors" in file.name:
            raise ValueError(
                f"{file} is in no {MANIFEST}, and would be read in place of the weights that are. {_WAY_OUT}"
            )
        elif file.parent in folders and file.is_file():
            logger.warning("%s is in no %s: it was not saved with the rest, and is loaded.", file, MANIFEST)


def _lists(sealed: Path, folder: Path) -> bool:
    """Whether a folder has a manifest that answers for another folder in it, or for itself."""
    if not (sealed / MANIFEST).is_file():
        return False
    if sealed == folder:
        return True
    try:
        files = read_json(sealed / MANIFEST).get("files")
    except ValueError:  # damaged, if it is the seal of a pipeline; else it is somebody else's manifest.json
        return (sealed / "model_index.json").is_file()
    prefix = f"{folder.relative_to(sealed).as_posix()}/"
    return isinstance(files, dict) and any(name.startswith(prefix) for name in files if name != f"{prefix}{MANIFEST}")
