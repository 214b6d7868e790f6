# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Which columns of a table hold images and labels, and what classes the labels are."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..words import composed, counted, listed, shown


CLASS_FOLDER = "class_folder"  # the column that says in which class folder an image lies

_MAX_SHOWN = 10  # values in one line
_EXPECTED_NAMES = 'expected {0: "name", ...}, or a JSON file {"0": "name", ...}'
# What a column of labels is called, the likeliest first
_LABELS = ("label", "labels", "cls", "class", "class_label", "class_id", "class_name", "category", "target")


def look_up(values: dict, column: str) -> Any:
    """`values["json"]["label"]` for "json.label", unless a column has that very name; None if there is neither."""
    if column in values:
        return values[column]
    for part in column.split("."):
        values = values[part] if isinstance(values, dict) and part in values else None
    return values


def find_image_column(features: dict, wanted: str | None) -> str:
    """The column of the images: the one that is asked for, else the only one that holds images, or encoded files.

    Raises:
        ValueError: there is no such column, it holds something else, or several hold images.
    """
    kinds = {column: _kind_of_image(feature) for column, feature in features.items()}
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"`image_column` {wanted!r} is not among the columns {list(features)}.")
        if kinds[wanted] is None and getattr(features[wanted], "dtype", None) != "string":  # strings may be paths
            raise ValueError(f"`image_column` {wanted!r} holds {features[wanted]}: expected images, bytes or paths.")
        return wanted
    for kind in ("image", "file", "bytes"):
        columns = [column for column in features if kinds[column] == kind]
        if len(columns) > 1:
            dots = " In a WebDataset a name ends at its first dot." if "__key__" in features else ""
            raise ValueError(f"several columns hold images: {columns}. Pass `image_column`.{dots}")
        if columns:
            return columns[0]
    raise ValueError(f"no column holds images, found {dict(features)}. Pass `image_column`.")


def _kind_of_image(feature: Any) -> str | None:
    import datasets

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
        return "file"
    return "bytes" if getattr(feature, "dtype", None) in ("binary", "large_binary") else None


def label_columns(features: dict) -> list[str]:
    """The columns that are called as labels are, also inside a column `json`, the likeliest first."""
    inside = features.get("json")
    columns = [*features, *(f"json.{name}" for name in (inside if isinstance(inside, dict) else ()))]
    ranks = {name: rank for rank, name in enumerate((*_LABELS, CLASS_FOLDER))}
    found = {column: ranks.get(column.removeprefix("json.").lower()) for column in columns}
    return sorted((column for column in columns if found[column] is not None), key=found.get)


def find_label_column(features: dict, wanted: str | None) -> str | None:
    """The column of the labels: the one that is asked for, else the likeliest of `label_columns`; None without one.

    Raises:
        ValueError: there is no column `wanted`, or the column holds neither numbers nor names.
    """
    column = wanted if wanted is not None else next(iter(label_columns(features)), None)
    if column is None:
        return None
    feature = look_up(features, column)
    if feature is None:
        raise ValueError(f"`label_column` {wanted!r} is not among the columns {list(features)}.")
    if not re.match(r"(large_)?string|u?int|float|double|decimal|bool|null", str(getattr(feature, "dtype", ""))):
        raise ValueError(
            f"`label_column` {column!r} holds {feature}: expected whole numbers or names of classes. Name another"
            " column, or pass `labelled=False`."
        )
    return column


def read_label(value: Any) -> int | str | None:
    """A label as it stands in a row: a whole number, a name, or None where it is missing.

    Raises:
        ValueError: it is a number that is not whole, or something else.
    """
    if isinstance(value, str):
        return composed(value.strip()) or None
    if value is None or value != value:
        return None
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != value:
        raise ValueError(f"expected whole numbers or names of classes, got {shown(value)}")
    return whole


def sort_names(names: Iterable[str]) -> list[str]:
    """Names in the order in which they get their ids: those that are numbers as numbers, then the others."""
    return sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))


def read_classes(
    dataset: Any,
    column: str,
    *,
    streaming: bool,
    num_classes: int | None = None,
    id2label: dict[int, str] | str | os.PathLike | None = None,
) -> tuple[int, dict[int, str]]:
    """Size of the label table, and names of the classes by id: those that occur, for a stream all.

    The arguments are those of `load_images`, and the column from `find_label_column`. Labels that are names get their
    ids from `id2label`, else in the order of `sort_names`. Of a stream nothing is read.

    Raises:
        ValueError: a label is missing (their rows are named), not whole, negative, beyond `num_classes`, or has no
            name or id in `id2label`; a stream does not tell its classes; or `num_classes` is less than 1.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    feature = look_up(dataset.features, column)
    of_names = "string" in str(feature.dtype)
    names = None
    if id2label is not None:
        names = _read_names(id2label)
    elif hasattr(feature, "names"):
        names = {label: composed(name.strip()) for label, name in enumerate(feature.names)}
    if streaming:
        labels = _declared_labels(column, names, num_classes, of_names)
    else:
        labels = _occurring_labels(dataset, column)
        if of_names:
            names = names or dict(enumerate(labels))
            unknown = sorted(set(labels) - set(names.values()))
            if unknown:
                raise ValueError(f"`id2label` {shown(id2label)} has no id for the labels {unknown[:_MAX_SHOWN]}.")
            labels = sorted(label for label, name in names.items() if name in set(labels))
    num_classes = labels[-1] + 1 if num_classes is None else num_classes
    if labels[0] < 0 or labels[-1] >= num_classes:
        raise ValueError(
            f"column {column!r} holds labels from {labels[0]} to {labels[-1]}, `num_classes` {num_classes}"
            f" allows 0 to {num_classes - 1}."
        )
    names = names or {label: str(label) for label in labels}
    unnamed = [label for label in labels if label not in names]
    if unnamed:
        raise ValueError(f"`id2label` {shown(id2label)} has no name for the labels {unnamed[:_MAX_SHOWN]}.")
    return num_classes, {label: names[label] for label in labels}


def _declared_labels(column: str, names: dict[int, str] | None, num_classes: int | None, of_names: bool) -> list[int]:
    if names is not None:
        return sorted(names)
    if of_names or num_classes is None:
        needed = "`id2label`" if of_names else "`num_classes` or `id2label`"
        raise ValueError(
            f"column {column!r} does not declare its classes, and a stream is read only once: pass {needed}."
        )
    return list(range(num_classes))


def _occurring_labels(dataset: Any, column: str) -> list[Any]:
    """Every label that occurs, sorted."""
    if column not in dataset.features:
        dataset = dataset.select_columns([column.split(".")[0]]).flatten()
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    try:
        labels = {value: read_label(value) for value in values.unique().to_pylist()}
    except ValueError as error:
        raise ValueError(f"column {column!r}: {error}. `label_column` names another one.") from None
    if None in labels.values():
        rows = [row for row, value in enumerate(values.to_pylist()) if read_label(value) is None]
        raise ValueError(
            f"column {column!r} has {counted(len(rows), 'row')} without a label ({listed(rows, _MAX_SHOWN)}): expected"
            " one in every row."
        )
    labels = {*labels.values()}
    return sort_names(labels) if isinstance(next(iter(labels)), str) else sorted(labels)


def _read_names(id2label: dict[int, str] | str | os.PathLike) -> dict[int, str]:
    try:
        named = id2label if isinstance(id2label, dict) else json.loads(Path(id2label).read_text(encoding="utf-8-sig"))
        names = {int(key): composed(name.strip()) if isinstance(name, str) else name for key, name in named.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"`id2label` {shown(id2label)}: {error}; {_EXPECTED_NAMES}.") from error
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"`id2label` {shown(id2label)} holds {shown(names)}: {_EXPECTED_NAMES}.")
    return names
