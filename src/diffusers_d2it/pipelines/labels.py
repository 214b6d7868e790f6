# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Class labels as people write them, ids or names, to ids of the model."""

import difflib

import numpy as np
import torch


def label_ids(label: str | list[str], id2label: dict[int, str] | None) -> list[int]:
    """Ids of class names; one of several names separated by commas is enough.

    Raises:
        ValueError: a name is unknown or belongs to several classes, or there are no names.
    """
    if id2label is None:
        raise ValueError(f"`class_labels` {label!r}: this pipeline has no `id2label`, pass ids.")
    ids_of_name: dict[str, list[int]] = {}
    for id, names in id2label.items():
        for name in {names, *(part.strip() for part in names.split(","))}:
            ids_of_name.setdefault(name, []).append(id)
    ids = []
    for name in [label] if isinstance(label, str) else label:
        found = ids_of_name.get(name, [])
        if not found:
            close = difflib.get_close_matches(str(name), ids_of_name, n=3) or sorted(ids_of_name)[:3]
            raise ValueError(
                f"`class_labels`: unknown class name {name!r}. Close names: {', '.join(map(repr, close))}."
            )
        if len(found) > 1:
            raise ValueError(
                f"`class_labels`: class name {name!r} belongs to several classes, {found}: pass one of these ids."
            )
        ids += found
    return ids


def class_ids(
    class_labels: int | str | list[int] | list[str] | None, num_classes: int | None, id2label: dict[int, str] | None
) -> list[int] | None:
    """Ids of labels, each checked against the model and its names; None for an unconditional model.

    Args:
        class_labels: an id, a name, a list of either, or None.
        num_classes: classes of the model; None for an unconditional one.
        id2label: the names; only these ids are valid. None allows every id of the model.

    Raises:
        ValueError: a label is unknown (close ones are named), given to an unconditional model, or missing.
    """
    if num_classes is None:
        if class_labels is not None:
            raise ValueError(f"`class_labels` {class_labels!r} were given to an unconditional model.")
        return None
    if class_labels is None:
        raise ValueError("`class_labels` are required: this model is class-conditional.")
    labels = [class_labels] if isinstance(class_labels, (int, np.integer, str)) else class_labels
    if not isinstance(labels, (list, tuple, np.ndarray, torch.Tensor)):
        raise ValueError(f"`class_labels` must be ids or names, got {labels!r} of type {type(labels).__name__}.")
    labels = labels.reshape(-1).tolist() if isinstance(labels, (np.ndarray, torch.Tensor)) else list(labels)
    if not labels:
        raise ValueError("`class_labels` is empty.")
    ids = []
    for label in labels:
        if isinstance(label, str):
            ids += label_ids(label, id2label)
            continue
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
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

    It is found by its name, one of several separated by commas; where classes of the model share that name it is the
    one with the same number. A name that is a number is that class, and of a model without names so is the label.

    Args:
        label: number of the class in the data set.
        name: its name there.
        id2label: the names of the model.
        num_classes: of the model.
    """
    known = id2label or {id: str(id) for id in range(num_classes)}

    def split(names: str) -> list[str]:
        return [names, *(part.strip() for part in names.split(","))]

    if label in known and (name == str(label) or set(split(name)) & set(split(known[label]))):
        return label
    for one in split(name):
        try:
            return label_ids(one, known)[0]
        except ValueError:  # unknown, or of several classes
            continue
    number = int(name) if name.isdecimal() else label if id2label is None else None
    return number if number in known else None
