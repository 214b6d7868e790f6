# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Class labels as people write them, ids or names, to ids of a model."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ..limits import plain
from ..words import close_to, composed, listed, shown


# Labels in these have no order, or no meaning
_NO_ROW = (str, bytes, bytearray, Mapping, set, frozenset, np.ndarray, torch.Tensor)


def class_ids(
    class_labels: int | str | list[int | str] | np.ndarray | torch.Tensor | None,
    num_classes: int | None,
    id2label: dict[int, str] | None,
) -> list[int] | None:
    """Ids of labels, each checked against the model and its names; None for an unconditional model.

    Args:
        class_labels: an id, a name, a list of either, or None. Digits in a string are a name where a class is called
            so, else an id.
        num_classes: classes of the model; None for an unconditional one.
        id2label: the names; only these ids are valid. None allows every id of the model.

    Raises:
        ValueError: a label is unknown (close ones are named), given to an unconditional model, or missing.
    """
    if num_classes is None:
        if class_labels is not None:
            raise ValueError(f"`class_labels` {class_labels!r} were given to an unconditional model.")
        return None
    class_labels = plain(class_labels)
    if isinstance(class_labels, (np.ndarray, torch.Tensor)) and class_labels.ndim == 2 and class_labels.shape[1] == 1:
        class_labels = class_labels[:, 0].tolist()
    elif isinstance(class_labels, Iterable) and not isinstance(class_labels, _NO_ROW):
        class_labels = list(class_labels)
    labels = [class_labels] if isinstance(class_labels, (int, float, str)) else class_labels
    if labels is None:
        raise ValueError(f"`class_labels` are required: this model is class-conditional, got {class_labels!r}.")
    if isinstance(labels, list) and len(labels) == 1 and isinstance(labels[0], list):
        [labels] = labels
    if not isinstance(labels, list) or not labels:
        raise ValueError(f"`class_labels` must be an id, a name, or a row of them, got {shown(class_labels)}.")
    ids = []
    ids_of_name = ids_of_names(id2label or {}) if any(isinstance(label, str) for label in labels) else {}
    for label in labels:
        if isinstance(label, str):
            if not _is_number(label) or composed(label) in ids_of_name:
                ids.append(label_id(label, id2label, ids_of_name))
                continue
            label = int(label)
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # a column of a table with a missing value holds floats
        if isinstance(label, bool) or not isinstance(label, int):
            raise ValueError(f"`class_labels` must be ids or names, got {label!r} of type {type(label).__name__}.")
        known = range(num_classes) if id2label is None else sorted(id2label)
        if label not in known:
            close = sorted(known, key=lambda id: (abs(id - label), id))[:3]
            named = [f"{id} ({id2label[id]})" if id2label else str(id) for id in close]
            raise ValueError(f"`class_labels`: unknown class id {label}. Close ids: {', '.join(named)}.")
        ids.append(int(label))
    return ids


def class_of(label: int, name: str, id2label: dict[int, str] | None, num_classes: int) -> int | None:
    """The class of a model that a class of some data set is; None if the model has none like it.

    It is found by its name, as a whole before one of several separated by commas; where classes of the model share
    that name it is the one with the same number. A name that is a number is that class, and of a model without names
    so is the label.

    Args:
        label: number of the class in the data set.
        name: its name there.
        id2label: the names of the model.
        num_classes: of the model.
    """
    known = id2label or {id: str(id) for id in range(num_classes)}
    if label in known and (name == str(label) or {*_names(name)} & {*_names(known[label])}):
        return label
    ids_of_name = ids_of_names(known)
    for one in _names(name):
        try:
            return label_id(one, known, ids_of_name)
        except ValueError:  # unknown, or of several classes
            continue
    number = int(name) if _is_number(name) else label if id2label is None else None
    return number if number in known else None


def ids_of_names(id2label: dict[int, str]) -> dict[str, list[int]]:
    """The ids of every name, whole or part: "maillot" is the class called so before "maillot, tank suit"."""
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for id, names in id2label.items():
        whole.setdefault(composed(names), []).append(id)
        for name in {*_names(names)}:
            parts.setdefault(name, []).append(id)
    return parts | whole


def label_id(label: str, id2label: dict[int, str] | None, ids_of_name: dict[str, list[int]]) -> int:
    """The only class of a name; `ids_of_name` are `ids_of_names(id2label)`."""
    if id2label is None:
        raise ValueError(f"`class_labels` {label!r}: this pipeline has no `id2label`, pass ids.")
    found = ids_of_name.get(composed(label), [])
    if not found:  # in another case
        folded = composed(label).casefold()
        found = [id for name, ids in ids_of_name.items() if name.casefold() == folded for id in ids]
        found = [*dict.fromkeys(found)]
    if not found:
        close = close_to(label, ids_of_name)
        named = f"{'Close names' if close else 'Names'}: {listed(map(repr, close or sorted(ids_of_name)))}"
        raise ValueError(f"`class_labels`: unknown class name {label!r}. {named}.")
    if len(found) > 1:
        raise ValueError(
            f"`class_labels`: class name {label!r} belongs to several classes, {found}: pass one of these ids."
        )
    return found[0]


def _names(names: str) -> list[str]:
    """All that a class is called: its names as they stand, and each of those separated by commas."""
    return [composed(names), *(part.strip() for part in composed(names).split(","))]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
