# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Files of weights, checked before they are read: from their first bytes, against the seal, and against the model.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header, a JSON object of
{name: {"dtype", "shape", "data_offsets"}}; the bytes of the tensors follow without gaps.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..words import shown, visible
from .folders import MANIFEST, check_size, file_sha256, read_json, settle


MAX_JSON = 2**22  # bytes of a configuration or an index
MAX_HEADER = 2**21  # bytes: 15,000 tensors
_MAX_BRACKETS = 100_000  # lists and objects in them: more take seconds to read
_MAX_DIMENSIONS = 8

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
_FLOATING = frozenset(dtype for dtype in _BITS if "F" in dtype)


class Tensor(NamedTuple):
    """What a header says about a tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Headers
# ---------------------------------------------------------------------------------------------------------------------


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, from its first bytes; no more than the header is read.

    Raises:
        ValueError: the file is missing, no safetensors file, cut off, or its header contradicts its size or itself.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing.")
    num_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if num_bytes < 8 or length > min(MAX_HEADER, num_bytes - 8):
            raise ValueError(
                f"{file} is damaged or no safetensors file: its first bytes ask for a header of {length} bytes, of"
                f" {num_bytes} bytes in all; a header may have at most {MAX_HEADER}."
            )
        header = stream.read(length)
    _check_brackets(file, header)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: its header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{file} is damaged: its header is {type(entries).__name__}, not a JSON object.")
    entries.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in entries.items():
        tensors[name], span = _read_entry(file, name, entry)
        spans.append(span)
    _check_spans(file, spans, num_bytes - 8 - length)
    return tensors


def check_floating(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless every tensor is floating point, and all those of 16 bits are of one kind.

    Integers of the same size would load as numbers of another size, and so would one half precision as the other.
    """
    halves = {tensor.dtype: name for name, tensor in tensors.items() if tensor.dtype in ("F16", "BF16")}
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATING:
            raise ValueError(f"{tensor.file}: `{visible(name)}` must be floating point, got {tensor.dtype}.")
        if len(halves) > 1 and tensor.dtype in halves:
            names = " and ".join(f"`{visible(name)}` of {dtype}" for dtype, name in sorted(halves.items()))
            raise ValueError(f"{tensor.file}: weights must be of one kind of 16 bits, got {names}.")


def check_fits(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], files: str) -> None:
    """Compare what lies in the files with what a model has.

    Args:
        tensors: of all files.
        expected: the shape of every weight of the model.
        files: where the weights were looked for, in words.

    Raises:
        ValueError: weights are missing, foreign, or have another shape; the first of each kind is named.
    """
    missing = sorted(expected.keys() - tensors.keys())
    foreign = sorted(tensors.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & tensors.keys() if tensors[name].shape != expected[name])
    problems = []
    if missing:
        problems.append(f"{len(missing)} weights are missing, such as `{missing[0]}`")
    if foreign:
        problems.append(f"{len(foreign)} weights are foreign to the model, such as {shown(foreign[0])}")
    if other:
        name = other[0]
        problems.append(
            f"{len(other)} weights have another shape, such as `{name}`: {tensors[name].shape} in"
            f" {tensors[name].file.name}, {expected[name]} in the model"
        )
    if problems:
        raise ValueError(f"{files}: {'; '.join(problems)}.")


def check_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Read every floating-point tensor once, and see that no value is NaN or infinite, nor will be after a cast.

    Nothing is kept: the files are mapped into memory, and the model that reads them next finds them there.

    Args:
        tensors: of all files.
        dtype: what the weights will be cast to; None if they stay what they are.

    Raises:
        ValueError: a value is not finite, or too large for `dtype`; the file and the tensor are named.
    """
    for file in sorted({tensor.file for tensor in tensors.values()}):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    if tensors[name].dtype in _FLOATING:
                        _check_finite(opened.get_tensor(name), dtype, f"{file}: `{visible(name)}`")
        except (SafetensorError, OSError, KeyError) as error:  # KeyError: it has changed since its header was read
            raise ValueError(f"{file} is damaged: {error}") from error


def _check_brackets(file: Path, text: bytes) -> None:
    found = text.count(b"[") + text.count(b"{")
    if found > _MAX_BRACKETS:
        raise ValueError(f"{file} holds {found} lists and objects, at most {_MAX_BRACKETS} are read.")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys come once: of two, readers disagree which one counts."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key is repeated")
    return entries


def _read_entry(file: Path, name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    where = f"{file} is damaged: {shown(name)} has"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} {shown(entry)} instead of a dtype, a shape and offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where} the dtype {shown(dtype)}, expected is one of {', '.join(_BITS)}.")
    for key, value in (("shape", shape), ("offsets", offsets)):
        if not isinstance(value, list) or not all(type(number) is int and 0 <= number < 2**63 for number in value):
            raise ValueError(f"{where} the {key} {shown(value)}, expected are whole numbers that are not negative.")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{where} {len(shape)} dimensions, expected are at most {_MAX_DIMENSIONS}.")
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{where} the offsets {shown(offsets)}, which do not fit {dtype} of shape {shown(shape)}.")
    return Tensor(file, dtype, tuple(shape)), (offsets[0], offsets[1])


def _check_spans(file: Path, spans: list[tuple[int, int]], num_bytes: int) -> None:
    """Tensors must lie one behind the other and fill the file: no overlap, no gap, nothing missing, nothing more."""
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"{file} is damaged: a tensor begins at byte {start}, the one before ends at {end}.")
        end = stop
    if end != num_bytes:
        raise ValueError(f"{file} is damaged: its tensors have {end} bytes, the file {num_bytes}.")


def _check_finite(values: torch.Tensor, dtype: torch.dtype | None, where: str) -> None:
    if values.numel() == 0:
        return
    if values.dtype.itemsize == 1:
        values = values.float()  # 8-bit numbers have no minimum and maximum of their own
    extremes = torch.stack(torch.aminmax(values))  # both are NaN if one value is
    if not extremes.isfinite().all():
        raise ValueError(f"{where} must be finite, got values from {extremes[0].item()} to {extremes[1].item()}.")
    if dtype is not None and dtype.is_floating_point and not extremes.to(dtype).isfinite().all():
        raise ValueError(
            f"{where} does not fit {dtype}: its values go from {extremes[0].item():.4g} to {extremes[1].item():.4g}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def read_checked_json(file: Path) -> dict[str, Any]:
    """`saving.read_json` of a file of bearable size.

    Raises:
        ValueError: the file is missing, damaged, or larger than any configuration.
    """
    if file.is_file():
        if file.stat().st_size > MAX_JSON:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, a configuration has at most {MAX_JSON}.")
        _check_brackets(file, file.read_bytes())
    return read_json(file)


def read_index(file: Path, suffix: str = ".safetensors") -> dict[str, Path]:
    """The file of every tensor, from an index of shards.

    Args:
        file: the index.
        suffix: of the files that it may name.

    Raises:
        ValueError: the index is damaged, or names anything but such files beside it.
    """
    index = read_checked_json(file)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{file} is damaged: it must hold `metadata` and a `weight_map` of names.")
    for place in places.values():
        # "../other/model.safetensors" or "/etc/..." in a file from somebody else, or one that runs code when read
        plain = isinstance(place, str) and place.isprintable() and not {"/", "\\"} & set(place)
        if not plain or place.startswith(".") or not place.endswith(suffix):
            raise ValueError(f"{file} must name files beside it, got {shown(place)}, expected are names in {suffix}.")
    return {name: file.parent / place for name, place in places.items()}


def read_headers(folder: Path, index: str, single: str) -> tuple[dict[str, Tensor], list[Path]]:
    """The tensors of a model that lies in one file or in shards, and the files that are to be read.

    Args:
        folder: of the model.
        index: name of the index of shards; if it is there, it counts.
        single: name of the file without shards.

    Raises:
        ValueError: a file is missing or damaged, or the shards do not hold what the index says.
    """
    if not (folder / index).is_file():
        return read_header(folder / single), [folder / single]
    places = read_index(folder / index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        tensors |= (found := read_header(file))
        named = {name for name, place in places.items() if place == file}
        if found.keys() != named:
            name = sorted(found.keys() ^ named)[0]
            raise ValueError(
                f"{folder / index} and {file.name} do not agree: {shown(name)} is named by only one of them."
            )
    return tensors, [folder / index, *sorted(set(places.values()))]


def check_seal(folder: Path, names: re.Pattern) -> None:
    """Check files of a folder against the manifests that list them; what no manifest lists is not looked at.

    The folder's own manifest counts, and those of the two folders around it: a model that was saved as a part of
    something larger, such as a pipeline, is listed there, and one of its files may have been saved anew by itself.
    A save that was interrupted is finished first.

    Args:
        folder: what is loaded.
        names: of the files, relative to the folder.

    Raises:
        ValueError: a file that is listed is missing or damaged, or a manifest is; the file is named.
    """
    folder = folder.absolute()
    records: dict[Path, list[dict]] = {}
    for sealed, listed in finish_saves(folder).items():
        for name, record in listed.items():
            file = sealed / name
            if file.is_relative_to(folder) and names.fullmatch(file.relative_to(folder).as_posix()):
                records.setdefault(file, []).append(record)
    for file, found in records.items():
        _check_records(file, found)


def check_listed(folder: Path, files: Iterable[Path]) -> None:
    """Refuse weights that no manifest lists in the place of others that one does list: they are not of one save.

    Args:
        folder: what is loaded.
        files: the files in it that will be read.

    Raises:
        ValueError: a file was not saved with the rest; it is named.
    """
    folder = folder.absolute()
    manifests = finish_saves(folder)
    listed = {sealed / name for sealed, names in manifests.items() for name in names}
    weights = sorted(file for file in listed if file.parent == folder and file.suffix == ".safetensors")
    for file in (file.absolute() for file in files):
        if weights and file not in listed:
            raise ValueError(
                f"{file} is in no {MANIFEST}, as {visible(weights[0].name)} is: it was not saved with the rest. Remove"
                " the manifest to load it all the same."
            )


def finish_saves(folder: Path) -> dict[Path, dict[str, dict]]:
    """Finish interrupted saves into a folder and around it.

    Returns:
        What the manifests of the folder and of the two around it list, as far as they list files of the folder.

    Raises:
        ValueError: a manifest is damaged.
    """
    manifests = {}
    for sealed in (*reversed(folder.parents[:2]), folder):  # what surrounds may still bring files of the folder
        if _lists(sealed, folder):
            settle(sealed)
            manifests[sealed] = read_json(sealed / MANIFEST)["files"]
    return dict(reversed(manifests.items()))


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


def _check_records(file: Path, records: list[dict]) -> None:
    """Raise a ValueError unless a file is what one of its manifests says."""
    size = file.stat().st_size if file.is_file() else None
    fitting = [record["sha256"] for record in records if record["bytes"] == size]
    if not fitting:
        check_size(file, records[0]["bytes"])
    found = file_sha256(file)
    if found not in fitting:
        raise ValueError(f"{file} is damaged or another file: its SHA-256 is {found} instead of {fitting[0]}.")
