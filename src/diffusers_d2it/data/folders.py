# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What lies in a folder, and the data set of a folder of images.

datasets' imagefolder guesses: a class folder called "train" makes it drop all others, as does "test" in the name of a
file; labels vanish if there is one class, or if one image lies beside the folders; classes of the same name in
different folders become one. Here folders are read as they stand, and what is not clear is an error.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .images import image_endings


_MAX_SHARDS = 256  # of a streamed folder: how many processes and workers can share it


def list_files(root: str) -> tuple[list[str], list[str]]:
    """The files below a folder, links followed, in the order of their names; and apart what is hidden.

    Raises:
        ValueError: a link leads to a folder above it.
        OSError: a folder cannot be read.
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
    """What a folder holds: "images", "images with metadata", ".parquet" or ".tar".

    Raises:
        ValueError: none of these, or several.
    """
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
    """The `datasets.Dataset` of images, with a column `label` if all of them lie in class folders.

    Args:
        root: the folder.
        paths: its images.
        labelled: whether sub-folders are classes; otherwise they mean nothing.
        streaming: make a `datasets.IterableDataset`.

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
