# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Which column of a data set holds the images, which the labels, and the classes that those stand for."""

import json
import os
from pathlib import Path
from typing import Any

from ..words import shown


_MAX_SHOWN = 10  # values in one line
_EXPECTED_NAMES = 'expected {0: "name", ...}, or a JSON file {"0": "name", ...}'


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
            raise ValueError(f"several columns hold images: {columns}. Pass `image_column`.")
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


def find_label_column(features: dict, wanted: str | None) -> str | None:
    """The column of the labels: the one that is asked for, else `label` or `cls`, also inside a column `json`.

    Raises:
        ValueError: there is no column `wanted`, or it holds neither integers nor names.
    """
    if wanted is not None:
        feature = look_up(features, wanted)
        if feature is None:
            raise ValueError(f"`label_column` {wanted!r} is not among the columns {list(features)}.")
        if not _holds_labels(feature):
            raise ValueError(f"`label_column` {wanted!r} holds {feature}: expected integers or names of classes.")
        return wanted
    names = ("label", "cls", "json.label", "json.cls")
    return next((name for name in names if _holds_labels(look_up(features, name))), None)


def _holds_labels(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return dtype == "string" or dtype.startswith(("int", "uint"))


def read_classes(
    dataset: Any,
    column: str,
    *,
    streaming: bool,
    num_classes: int | None = None,
    id2label: dict[int, str] | str | os.PathLike | None = None,
) -> tuple[int, dict[int, str]]:
    """Size of the label table, and names of the classes by id: those that occur, for a stream all.

    Labels that are names get their ids from `id2label`, else in alphabetical order.

    Args:
        dataset: a `datasets.Dataset` or `datasets.IterableDataset` that declares its features.
        column: from `find_label_column`.
        streaming: whether it is a stream, of which nothing is read here.
        num_classes: size of the label table; None for one more than the largest label.
        id2label: names by id, or a JSON file of them; None for those that the data set declares.

    Raises:
        ValueError: a label is missing, negative, beyond `num_classes`, or has no name or id in `id2label`; or a
            stream does not tell its classes.
    """
    feature = look_up(dataset.features, column)
    of_names = feature.dtype == "string"
    names = None
    if id2label is not None:
        names = _read_names(id2label)
    elif hasattr(feature, "names"):
        names = dict(enumerate(feature.names))
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
    if column in dataset.features:
        labels = dataset.unique(column)
    else:
        labels = dataset.select_columns([column.split(".")[0]]).flatten().unique(column)
    if None in labels:
        raise ValueError(f"column {column!r} has rows without a label: expected one in every row.")
    return sorted(labels)


def _read_names(id2label: dict[int, str] | str | os.PathLike) -> dict[int, str]:
    try:
        named = id2label if isinstance(id2label, dict) else json.loads(Path(id2label).read_text(encoding="utf-8"))
        names = {int(key): name for key, name in named.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"`id2label` {shown(id2label)}: {error}; {_EXPECTED_NAMES}.") from error
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"`id2label` {shown(id2label)} holds {shown(names)}: {_EXPECTED_NAMES}.")
    return names
