# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What was measured, with the protocol it was measured by, in files: results, which may be compared, and statistics.

Shapes:
    D features
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import durable_file, read_json, write_json_durably
from ..files.folders import file_sha256
from ..words import differing, listed, shorten, shown
from .scores import Moments, check_moments


# What stands in a protocol for the reader: names say little, versions and devices decide about last digits, and the
# pixels of samples differ wherever the checkpoint does.
_NOTES = ("samples.name", "samples.digest", "samples.environment", "reference.name", "versions")
_MISSING = "not stated"
_ARRAYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of statistics, as ADM names them


@dataclass(frozen=True)
class Result:
    """A number and its protocol.

    Raises:
        ValueError: the value is NaN, or the protocol holds what JSON does not.
    """

    metric: str  # "fid", "psnr", "fd_dinov2", ...
    value: float
    protocol: dict  # how it was measured, as values of JSON
    deviation: float | None = None  # over the splits or subsets that it is the mean of, if it is one

    def __post_init__(self):
        if math.isnan(self.value):
            raise ValueError(f"`value` of {self.metric!r} must be a number, got NaN.")
        try:
            # As it will be read from a file: a tuple is a list there, and the two must not differ
            object.__setattr__(self, "protocol", json.loads(json.dumps(self.protocol)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`protocol` of {self.metric!r} must hold values of JSON: {error}.") from error


def save_results(path: str | os.PathLike, results: Sequence[Result]) -> None:
    """Write results into a JSON file, whole or not at all; an infinite value, which JSON does not have, as "inf"."""
    rows = [asdict(result) for result in results]
    rows = [row if math.isfinite(row["value"]) else row | {"value": str(row["value"])} for row in rows]
    save_report(path, {"results": rows})


def save_report(path: str | os.PathLike, report: dict) -> None:
    """Write values into a JSON file, whole or not at all, with null for numbers that JSON does not have."""
    write_json_durably(Path(path), _finite(report))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_results(path: str | os.PathLike) -> list[Result]:
    """Read what `save_results` has written.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    stored = read_json(Path(path)).get("results")
    try:
        return [Result(**one | {"value": float(one["value"])}) for one in stored]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f'{path} holds no results: {{"results": [...]}} with metric, value, protocol.') from error


def differences(a: Result, b: Result, varying: Sequence[str] = ()) -> dict[str, tuple]:
    """The fields of two protocols that differ: {"samples.num_inference_steps": (50, "not stated")}.

    Those of the dotted names in `varying` may, with all that they hold. Names, versions, and the pixels of the samples
    always may.
    """
    found = differing({"metric": a.metric, **a.protocol}, {"metric": b.metric, **b.protocol}, missing=_MISSING)
    allowed = tuple(f"{name}." for name in (*_NOTES, *varying))
    return {name: values for name, values in found.items() if not f"{name}.".startswith(allowed)}


def compare(a: Result, b: Result, varying: Sequence[str] = ("samples.checkpoint",)) -> float:
    """b.value - a.value, if the two were measured alike: by default only the checkpoint may differ.

    Raises:
        ValueError: there are `differences`; each field is named, with both values.
    """
    found = differences(a, b, varying)
    if found:
        fields = "; ".join(f"{name}: {_shown(one)} and {_shown(other)}" for name, (one, other) in found.items())
        raise ValueError(
            f"{listed(dict.fromkeys((a.metric, b.metric)))} of the two were not measured alike: {fields}."
        )
    return b.value - a.value


def _shown(value: object) -> str:
    return value if value == _MISSING else shorten(json.dumps(value))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of a reference
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceStatistics:
    """Means and covariances from a file, and how they came about."""

    path: str
    moments: dict[str, Moments]  # of "pool", and where the file has them of "spatial", the features of sFID
    features: dict  # what the file says of them, nothing in files of others
    images: dict  # what it says of the images; of others its name, its hash and perhaps their number


def write_statistics(path: str | os.PathLike, moments: dict[str, Moments], num_images: int, protocol: dict) -> None:
    """Write an .npz, whole or not at all, of moments of "pool" and perhaps of "spatial", named as in those of ADM.

    It replaces what was there. The protocol, JSON values, says how the numbers came about.
    """
    path = Path(path)
    arrays = {key: moment.numpy() for name, pair in moments.items() for key, moment in zip(_ARRAYS[name], pair)}
    arrays |= {"num_images": np.int64(num_images), "protocol": np.array(json.dumps(protocol, sort_keys=True))}
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable_file(path) as staged:
        np.savez(staged, **arrays)


def read_statistics(path: str | os.PathLike) -> ReferenceStatistics:
    """Read a .npz of `write_statistics`, or of ADM or another script, with "mu" and "sigma".

    Other arrays in it, such as the images of ADM's files, are not read, and nothing in it is run.

    Raises:
        ValueError: it is missing or damaged, or holds something else; the error says what.
    """
    wanted = ("mu", "sigma", "mu_s", "sigma_s", "num_images", "protocol")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names, arrays = archive.files, {name: archive[name] for name in wanted if name in archive.files}
    except Exception as error:  # a damaged archive fails in the ways of zip, zlib, and numpy's headers
        raise ValueError(
            f"{path} must be a .npz with arrays of numbers, mu and sigma: {type(error).__name__}: {error}"
        ) from error
    moments = {}
    for output, keys in _ARRAYS.items():
        missing = [key for key in keys if key not in arrays]
        if missing and (output == "pool" or len(missing) == 1):
            raise ValueError(
                f"{path} must hold the arrays mu and sigma, and for sFID mu_s and sigma_s, {missing[0]} is not there:"
                f" it holds {', '.join(names) or 'nothing'}."
            )
        if not missing:
            found = check_moments(*(arrays[key] for key in keys), *(f"{key} of {path}" for key in keys))
            moments[output] = tuple(map(torch.from_numpy, found))
    number, text = arrays.get("num_images"), str(arrays.get("protocol", "{}"))
    if number is not None and (number.shape or number.dtype.kind not in "iu" or number < 2):
        raise ValueError(f"num_images of {path} must be a whole number, at least 2, got {number}.")
    try:
        protocol = json.loads(text)
    except (ValueError, RecursionError):
        protocol = None
    if not isinstance(protocol, dict):
        raise ValueError(f"protocol of {path} must be the text of a JSON object, got {shown(text)}.")
    features, images = protocol.get("features"), protocol.get("images")
    if not (isinstance(features, dict) and isinstance(images, dict)):  # of others, where there may be anything
        number, features = None if number is None else int(number), {}
        images = {"name": Path(path).name, "num_images": number, "statistics_sha256": file_sha256(Path(path))}
    return ReferenceStatistics(str(path), moments, features, images)
