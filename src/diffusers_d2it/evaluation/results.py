# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Numbers with the protocol they were measured by, in files, and what may be compared with what."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import read_json, write_json_durably
from ..words import differing, listed, shorten


# What stands in a protocol for the reader: names say little, versions and devices decide about last digits, and the
# pixels of samples differ wherever the checkpoint does.
_NOTES = ("samples.name", "samples.digest", "samples.environment", "reference.name", "versions")
_MISSING = "not stated"


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
    write_json_durably(Path(path), {"results": _finite(rows)})


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
