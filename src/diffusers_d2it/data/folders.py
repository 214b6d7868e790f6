# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a data set is made of: the files of a folder, their classes and their splits.

datasets' imagefolder guesses: a class folder called "train" makes it drop all others, as does "test" in the name of a
file; labels vanish if there is one class, or if one image lies beside the folders; classes of the same name in
different folders become one. Here folders are read as they stand, and what is not clear is an error.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..words import composed, counted, listed
from .images import image_endings
from .labels import CLASS_FOLDER, label_columns, sort_names


_MAX_SHARDS = 256  # of a streamed folder: how many processes and workers can share it
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = {"train": "train", "training": "train"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
_AFTER_SPLIT = re.compile(r"[\W_]*(\d{4}|data|images?|set|split)$")  # train2017, training_set, val-images
# part_0, shard-01, 000: a piece of a set that was too large for one folder
_PART = re.compile(r"(part|shard|chunk|batch|volume)[\W_]*\d+|0\d{2,}")
# A folder called so, with no other beside it, keeps the images together and is no class
_CONTAINERS = {"data", "image", "images", "img", "imgs", "jpeg", "jpg", "photo", "photos", "pictures", "png"}


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
    return name.startswith((".", "__", "@"))  # @eaDir: what a storage of the network keeps for itself


def folder_kind(root: str, files: list[str]) -> str:
    """What a folder holds: "images", ".parquet" or ".tar"; else a ValueError is raised."""
    endings = Counter(os.path.splitext(file)[1].lower() for file in files)
    found = {"images": sum(endings[ending] for ending in image_endings())}
    found |= {ending: endings[ending] for ending in (".parquet", ".tar")}
    if found["images"]:
        found[".parquet"] -= sum(file.endswith(".parquet") for file in filter(is_metadata, files))
    kinds = [kind for kind, number in found.items() if number]
    if len(kinds) == 1:
        return kinds[0]
    counts = {kind: found[kind] for kind in kinds} or {ending or "without ending": n for ending, n in endings.items()}
    held = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    raise ValueError(
        f"{root} holds {held or 'no files'}: expected images"
        f" ({', '.join(sorted(image_endings()))}), or .parquet files, or WebDataset .tar files."
    )


def is_image(file: str) -> bool:
    """Whether a file ends like an image."""
    return os.path.splitext(file)[1].lower() in image_endings()


def check_tars(files: Iterable[str]) -> None:
    """Raise a ValueError if a local tar was cut off: datasets reads it as far as it goes, and says nothing."""
    for file in files:
        if file.lower().endswith(".tar") and "://" not in file:
            with open(file, "rb") as archive:
                size = archive.seek(0, os.SEEK_END)
                archive.seek(max(0, size - 1024))
                if size < 1024 or archive.read().strip(b"\0"):
                    raise ValueError(f"{file} ({size} bytes) is cut off: a tar ends with 1024 zero bytes.")


def is_metadata(file: str) -> bool:
    """Whether a file is a table about the images beside and below it."""
    return os.path.basename(file) in _METADATA


def split_folder(root: str, images: Iterable[str], split: str | None) -> tuple[str | None, dict[str, list[str]]]:
    """The sub-folder of a split, and the images of each; (None, {}) if a folder is read whole.

    It has splits if all of its sub-folders with images are called so, train, val, ..., and no image lies beside them.

    Raises:
        ValueError: there is no such split, or none at all and one is asked for; or there are several without train.
    """
    splits: dict[str, list[str]] = {}
    for image in images:
        folder, *below = Path(os.path.relpath(image, root)).parts
        splits.setdefault(folder if below else "", []).append(image)
    if split == "all" or not {name.lower() for name in splits} <= set(_SPLITS):
        splits = {}
    if not splits and split in (None, "all"):
        return None, {}
    chosen = choose_split(root, splits, split)
    if chosen not in splits:
        raise ValueError(f"`split` {split!r}: {root} is read whole or by {listed(splits)}, not in parts of them.")
    return chosen, splits


def splits_of_tables(root: str, tables: Iterable[str]) -> dict[str, list[str]]:
    """The tables or archives of a folder by the split that their paths name; "train" if none of them names one.

    Where some do and others do not, the others belong to no split.
    """
    splits: dict[str | None, list[str]] = {}
    for file in tables:
        words = re.split("[^a-z]+", os.path.relpath(file, root).lower())
        numbered = re.match(r"(.+)-\d{5}-of-\d{5}", os.path.basename(file))
        split = next((_SPLITS[word] for word in words if word in _SPLITS), numbered and numbered[1])
        splits.setdefault(split, []).append(file)
    others = splits.pop(None, [])
    return splits or {"train": others}


def choose_split(path: str, splits: Collection[str], split: str | None) -> str:
    """The split that is asked for, as the data set calls it, so that "val" finds "validation"; by default train.

    Raises:
        ValueError: there is no such split; or there are several without train, and none is asked for.
    """
    name = re.split(r"[\[+]", split or "train")[0]
    if name in splits or name == "all":
        return split or name
    alike = [one for one in splits if name in _SPLITS and _SPLITS.get(one.lower()) == _SPLITS[name]]
    if split is None and not alike:
        alike = list(splits)
    if len(alike) == 1:
        return alike[0] + (split or name)[len(name) :]
    found = f"splits {listed(splits)}" if splits else "no sub-folders train, validation or test"
    raise ValueError(f"`split` {split!r}: {path} has {found}.")


def load_folder(
    root: str, paths: list[str], tables: list[str], labelled: bool, label_column: str | None, streaming: bool
) -> tuple[Any, list[str]]:
    """The data set of images of a folder, and remarks.

    Its columns are `image`, those of metadata files, and `class_folder` if all images lie in class folders: where
    labels are looked for and the metadata have none, or where it is asked for.

    Args:
        root: the folder.
        paths: the images.
        tables: metadata files with a column `file_name`, a path from where they lie. What they do not name is left
            out.
        labelled: False if sub-folders mean nothing.
        label_column: as of `load_images`.
        streaming: make it a `datasets.IterableDataset` instead of a `datasets.Dataset`.

    Raises:
        ValueError: some images lie in class folders and others do not, or deeper; a class folder is empty; or a
            metadata file cannot be read, or none of them names an image.
    """
    import datasets

    described, remarks = None, []
    if tables:
        described, paths, remarks = _read_metadata(tables, paths)
    others = {} if described is None else described.features
    columns, features = {"image": paths}, {"image": datasets.Image(decode=False)}
    if labelled and (label_column == CLASS_FOLDER or label_column is None and not label_columns(others)):
        classes, more = _classes(root, paths, asked=label_column is not None)
        remarks += more
        if classes is not None:
            names = sort_names({*classes})
            ids = {name: label for label, name in enumerate(names)}
            columns[CLASS_FOLDER] = [ids[name] for name in classes]
            features[CLASS_FOLDER] = datasets.ClassLabel(names=names)
    elif labelled and any(os.path.dirname(path) != os.path.normpath(root) for path in paths):
        remarks.append(f"sub-folders are not used as classes (`label_column` {CLASS_FOLDER!r} uses them)")
    dataset = datasets.Dataset.from_dict(columns, datasets.Features(features))
    others = [column for column in others if column not in columns]
    if others:
        dataset = datasets.concatenate_datasets([dataset, described.select_columns(others)], axis=1)
    if not streaming:
        return dataset, remarks
    # In the order of their names the classes would follow one another, also after a shuffle buffer
    order = np.random.default_rng(0).permutation(len(paths))
    dataset = datasets.Dataset(dataset.data.table.take(order))
    return dataset.to_iterable_dataset(num_shards=min(len(paths), _MAX_SHARDS)), remarks


def _read_metadata(tables: list[str], paths: list[str]) -> tuple[Any, list[str], list[str]]:
    """The rows of metadata files, the image of each, and remarks. Rows of images of another split are left out."""
    import datasets
    import pyarrow
    from pyarrow import csv, json, parquet

    options = csv.ParseOptions(newlines_in_values=True)
    readers = {".csv": lambda file: csv.read_csv(file, parse_options=options), ".jsonl": json.read_json}
    on_disk, parts, found = {composed(path): path for path in paths}, [], []
    for file in tables:
        try:
            table = readers.get(os.path.splitext(file)[1], parquet.read_table)(file)
            if file.endswith(".csv") and any(map(pyarrow.types.is_binary, table.schema.types)):
                raise ValueError("it is not in UTF-8")
            table = table.rename_columns([column.strip() for column in table.column_names])
            if "file_name" not in table.column_names:
                raise ValueError(f"no column is called file_name: it has {listed(map(repr, table.column_names))}")
            names = ["" if name is None else str(name) for name in table["file_name"].to_pylist()]
            for i, field in enumerate(table.schema):
                if pyarrow.types.is_dictionary(field.type):  # which datasets does not take
                    table = table.set_column(i, field.name, table[i].cast(field.type.value_type))
                elif pyarrow.types.is_string_view(field.type):  # which Arrow does not take rows of
                    table = table.set_column(i, field.name, table[i].cast(pyarrow.large_string()))
        except Exception as error:
            raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
        names = [_find(os.path.dirname(file), name, on_disk) for name in names]
        kept = [i for i, name in enumerate(names) if composed(name) in on_disk or not os.path.isfile(name)]
        parts.append(table.take(pyarrow.array(kept, pyarrow.int64())))  # of an empty list it knows no type
        found += [names[i] for i in kept]
    if not found:
        raise ValueError(
            f"no file_name in {listed(tables)} is that of one of {counted(len(paths), 'image')}, such as {paths[0]}."
        )
    table = pyarrow.concat_tables(parts, promote_options="permissive")
    unnamed = len({*paths} - {*found})
    remarks = [f"{counted(unnamed, 'image')} not used: missing in the metadata"] if unnamed else []
    twice = len(found) - len({*found})
    if twice:
        remarks.append(f"{counted(twice, 'row')} of the metadata name an image again")
    return datasets.Dataset(datasets.table.InMemoryTable(table)), found, remarks


def _find(folder: str, name: str, on_disk: dict[str, str]) -> str:
    """The image that a table in a folder names: as it stands, or with the separators of Windows."""
    for written in (name, name.replace("\\", "/")):
        path = os.path.normpath(os.path.join(folder, written))
        if composed(path) in on_disk:
            return on_disk[composed(path)]
    return os.path.normpath(os.path.join(folder, name))


def _classes(root: str, paths: list[str], asked: bool) -> tuple[list[str] | None, list[str]]:
    """The class of each image, None if they have none; and remarks on folders that are called like something else.

    `asked` says that class folders are asked for.
    """
    places = [Path(os.path.relpath(path, root)).parts[:-1] for path in paths]
    names = {place[0] for place in places if place}
    flat = [path for path, place in zip(paths, places) if not place]
    what = _no_classes(names) if len(flat) == 0 and not asked else None
    if what is not None:
        return None, [f"{what} no classes (`label_column` {CLASS_FOLDER!r} makes them some)"]
    hint = "Pass the folder that holds the class folders, or `labelled=False` to ignore them."
    nested = [path for path, place in zip(paths, places) if len(place) > 1]
    if nested:
        raise ValueError(f"{root}: expected {root}/<class>/<image>, found {nested[0]} in a folder of a folder. {hint}")
    if flat and (len(flat) < len(paths) or asked):
        inside = next((path for path, place in zip(paths, places) if place), "none")
        raise ValueError(
            f"{root} holds images without a class ({len(flat)}, such as {flat[0]}) beside images in class folders"
            f" ({len(paths) - len(flat)}, such as {inside}). {hint}"
        )
    if flat:
        return None, []
    folders = {entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_hidden(entry.name)}
    empty = sorted(folders - names)
    if empty:
        raise ValueError(f"class folder {os.path.join(root, empty[0])} holds no image: expected one in every class.")
    splits = sort_names({name for name in names if _AFTER_SPLIT.sub("", name.lower()) in _SPLITS})
    remarks = (
        [f"classes are called like splits: {listed(splits)} (`split` and `labelled` settle it)"] if splits else []
    )
    parts = sort_names(name for name in names if _PART.fullmatch(name.lower()))
    if parts:
        remarks.append(f"classes are called like parts of a set: {listed(parts)} (`labelled` settles it)")
    return [composed(place[0]) for place in places], remarks


def _no_classes(names: set[str]) -> str | None:
    """In words what sub-folders are, if they hold images together without being classes."""
    if len(names) == 1 and {*map(str.lower, names)} <= _CONTAINERS:
        return f"folder {min(names)} is"
    # As FFHQ lies there, 00000/00000.png to 69000/69999.png, and as tools number the parts of large sets
    if all(name.isdecimal() and len(name) >= 5 for name in names) and len({*map(len, names)}) == 1:
        return f"folders {min(names)} to {max(names)} are"
    return None
