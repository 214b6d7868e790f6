# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a data set is made of: the files of a folder, or the columns of a table, and classes.

datasets' imagefolder guesses: a class folder called "train" makes it drop all others, as does "test" in the name of a
file; labels vanish if there is one class, or if one image lies beside the folders; classes of the same name in
different folders become one. Here folders are read as they stand, and what is not clear is an error.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..words import shown
from .images import image_endings


_MAX_SHARDS = 256  # of a streamed folder: how many processes and workers can share it
_MAX_SHOWN = 10  # values in one line
_EXPECTED_NAMES = 'expected {0: "name", ...}, or a JSON file {"0": "name", ...}'


def list_files(root: str) -> tuple[list[str], list[str]]:
    """The files below a folder, links followed, in the order of their names; and apart what is hidden.

    Raises a ValueError if a link leads to a folder above it, an OSError if a folder cannot be read.
    """
    files, hidden = [], []

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        hidden += [os.path.join(folder, name) for name in (*subfolders, *names) if _is_hidden(name)]
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        for name in subfolders:
            target = os.path.realpath(os.path.join(folder, name))
            if os.path.commonpath([target, os.path.realpath(folder)]) == target:
                raise ValueError(
                    f"{os.path.join(folder, name)} links to {target}, a folder above it: remove the link."
                )
        files += [os.path.join(folder, name) for name in names if not _is_hidden(name)]
    return sorted(files), sorted(hidden)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def folder_kind(root: str, files: list[str]) -> str:
    """What a folder holds: "images", "images with metadata", ".parquet" or ".tar"; else a ValueError is raised."""
    endings = Counter(os.path.splitext(file)[1].lower() for file in files)
    found = {"images": sum(endings[ending] for ending in image_endings())}
    found |= {ending: endings[ending] for ending in (".parquet", ".tar")}
    kinds = [kind for kind, number in found.items() if number]
    names = {os.path.basename(file) for file in files}
    if found["images"] and names & {"metadata.csv", "metadata.jsonl", "metadata.parquet"}:
        return "images with metadata"
    if len(kinds) == 1:
        return kinds[0]
    counts = {kind: found[kind] for kind in kinds} or {ending or "without ending": n for ending, n in endings.items()}
    listed = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    raise ValueError(
        f"{root} holds {listed or 'no files'}: expected images"
        f" ({', '.join(sorted(image_endings()))}), or .parquet files, or WebDataset .tar files."
    )


def is_image(file: str) -> bool:
    """Whether a file ends like an image."""
    return os.path.splitext(file)[1].lower() in image_endings()


def check_tars(files: Iterable[str]) -> None:
    """Raise a ValueError if a local tar was cut off: datasets reads it as far as it goes, and says nothing."""
    for file in files:
        if file.endswith(".tar") and "://" not in file:
            with open(file, "rb") as archive:
                size = archive.seek(0, os.SEEK_END)
                archive.seek(max(0, size - 1024))
                if size < 1024 or archive.read().strip(b"\0"):
                    raise ValueError(f"{file} ({size} bytes) is cut off: a tar ends with 1024 zero bytes.")


def load_folder(root: str, paths: list[str], labelled: bool, streaming: bool) -> Any:
    """The data set of the images `paths` of a folder, with a column `label` if all of them lie in class folders.

    With `labelled=False` sub-folders mean nothing. It is a `datasets.Dataset`, or a `datasets.IterableDataset`.

    Raises:
        ValueError: some images lie in class folders and others do not, or deeper; or a class folder is empty.
    """
    import datasets

    columns, features = {"image": paths}, {"image": datasets.Image(decode=False)}
    classes = _classes(root, paths) if labelled else None
    if classes is not None:
        names = sorted(set(classes))
        ids = {name: label for label, name in enumerate(names)}
        columns["label"] = [ids[name] for name in classes]
        features["label"] = datasets.ClassLabel(names=names)
    if streaming:
        # In the order of their names the classes would follow one another, also after a shuffle buffer
        order = np.random.default_rng(0).permutation(len(paths))
        columns = {name: [values[i] for i in order] for name, values in columns.items()}
    dataset = datasets.Dataset.from_dict(columns, datasets.Features(features))
    return dataset.to_iterable_dataset(num_shards=min(len(paths), _MAX_SHARDS)) if streaming else dataset


def _classes(root: str, paths: list[str]) -> list[str] | None:
    """The class of each image, None if they all lie in the folder itself."""
    places = [Path(os.path.relpath(path, root)).parts[:-1] for path in paths]
    hint = "Pass the folder that holds the class folders, or `labelled=False` to ignore them."
    nested = [path for path, place in zip(paths, places) if len(place) > 1]
    if nested:
        raise ValueError(f"{root}: {nested[0]} lies too deep, expected {root}/<class>/<image>. {hint}")
    flat = [path for path, place in zip(paths, places) if not place]
    if flat and len(flat) < len(paths):
        inside = next(path for path, place in zip(paths, places) if place)
        raise ValueError(
            f"{root} holds images without a class ({len(flat)}, such as {flat[0]}) beside images in class folders"
            f" ({len(paths) - len(flat)}, such as {inside}). {hint}"
        )
    if flat:
        return None
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_hidden(entry.name)}
    empty = sorted(folders - {place[0] for place in places})
    if empty:
        raise ValueError(f"class folder {os.path.join(root, empty[0])} holds no image: expected one in every class.")
    return [place[0] for place in places]


# ---------------------------------------------------------------------------------------------------------------------
# Columns and classes
# ---------------------------------------------------------------------------------------------------------------------


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

    The arguments are those of `load_images`, and the column from `find_label_column`. Labels that are names get their
    ids from `id2label`, else in alphabetical order. Of a stream nothing is read.

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
