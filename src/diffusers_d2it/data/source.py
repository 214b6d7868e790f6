# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Where the images of a run come from.

datasets is imported where it is used: the package itself does not need it.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..broken_packages import call_around
from ..words import printable
from .columns import find_image_column, find_label_column, look_up, read_classes
from .folders import check_tars, folder_kind, is_image, list_files, load_folder


_SHUFFLE_BUFFER = 1000  # rows of a stream, still encoded, among which the next one is drawn
_MAX_SHOWN = 10  # names in one line


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the images come from: shared by training and calibration."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="name on the Hub, or a local folder as in --train_data_dir")
    group.add_argument("--dataset_config_name", help="configuration of a data set on the Hub that has several")
    group.add_argument(
        "--train_data_dir",
        help="folder of images, class by sub-folder, without sub-folders no classes; or of .parquet or WebDataset .tar"
        " files; or one such file",
    )
    group.add_argument("--split", default="train", help="split of the data set; a folder of images has none")
    group.add_argument("--streaming", action="store_true", help="read the data set as a stream, without a local copy")
    group.add_argument("--image_column", help="column that holds the images; default: the only one that does")
    group.add_argument(
        "--resolution", type=int, default=256, help="images are resized and centre-cropped to this side"
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that decode images")


def add_class_arguments(parser: argparse.ArgumentParser) -> None:
    """Class labels of the second stage."""
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--label_column", help="column of labels, or json.<name>; default: label or cls if there is one"
    )
    group.add_argument("--unconditional", action="store_true", help="ignore labels and class sub-folders")
    group.add_argument("--num_classes", type=int, help="size of the label table; default: one more than the largest")
    group.add_argument("--id2label", help="JSON file {id: name}; default: the names that the data set declares")


def describe_source(args: argparse.Namespace) -> str:
    """The images of the data flags in words, for configurations and model cards."""
    return f"{_short_name(args)}, split {args.split}, {args.resolution}x{args.resolution}"


class Row(NamedTuple):
    """One image of a source, not yet decoded.

    Attributes:
        name: where it comes from, in words: its path if it has one.
        encoded: {"bytes", "path"} for `decode_image`.
        label: 0 without classes.
    """

    name: str
    encoded: dict
    label: int


@dataclass(frozen=True)
class ImageSource:
    """The images of a run, made by `load_images`. As a string it says in one line what was found.

    Attributes:
        dataset: a `datasets.Dataset`, or for a stream a `datasets.IterableDataset`; images are not decoded.
        name: last part of the folder or Hub name.
        description: name, split and resolution in words, for configurations and model cards.
        streaming: whether it is a stream.
        image_column: column of the images.
        label_column: column of the labels, None without classes.
        num_classes: size of the label table, None without classes.
        id2label: names of the classes by id: those that occur, for a stream all. None without classes.
        files: the images of a folder, or the files that hold them.
        labelled: whether labels were looked for.
        remarks: what a user may have expected to be used and is not.
        shuffle_seed: fixes the order; None for that of the data set.
    """

    dataset: Any
    name: str
    description: str
    streaming: bool
    image_column: str
    label_column: str | None
    num_classes: int | None
    id2label: dict[int, str] | None
    files: tuple[str, ...]
    labelled: bool = False
    remarks: tuple[str, ...] = ()
    shuffle_seed: int | None = None

    @property
    def num_rows(self) -> int | None:
        """Number of images, None for a stream."""
        return None if self.streaming else len(self.dataset)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when files, their sizes, columns, classes or the order do; not when the folder is moved."""
        digest = hashlib.sha256()
        for file in self.files:
            # The address of a file on the Hub holds its revision
            known = file if "://" in file else [os.path.relpath(file, self._root), os.path.getsize(file)]
            digest.update(json.dumps(known).encode())
        columns = [self.image_column, self.label_column, self.num_classes, self.id2label]
        digest.update(json.dumps([self.num_rows, self.streaming, self.shuffle_seed, *columns]).encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        words = [f"{printable(self.name)}: {'a stream' if self.streaming else _number(self.num_rows, 'image')}"]
        if self.id2label is None:
            words += ["no classes"] if self.labelled else []
        else:
            words.append(f"{_number(len(self.id2label), 'class')} ({_shown(list(self.id2label.values()))})")
        return "; ".join([", ".join(words), *self.remarks])

    def __getitem__(self, index: int) -> Row:
        """A row of a map-style source.

        Raises:
            ValueError: its label is not valid.
        """
        index = int(index if self.shuffle_seed is None else self._order[index])
        return self._read(self.dataset[index], f"row {index} of {self.name}")

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Rows `start` to `stop` in the order of the source; a stream is read from its beginning.

        Raises:
            ValueError: a label is not valid, or a stream cannot be read on.
        """
        if self.streaming:
            yield from islice(self.stream(), start, stop)
        else:
            yield from (self[i] for i in range(start, self.num_rows if stop is None else min(stop, self.num_rows)))

    def share(self, process_index: int, num_processes: int) -> Iterator[Row]:
        """The rows of one process, disjoint from those of the others. Raises what `rows` does."""
        if self.streaming:
            yield from self.split(process_index, num_processes).stream()
        else:
            yield from (self[i] for i in range(process_index, self.num_rows, num_processes))

    def split(self, process_index: int, num_processes: int) -> "ImageSource":
        """The part of a stream that one process reads, as a source of its own."""
        from datasets.distributed import split_dataset_by_node

        return replace(self, dataset=split_dataset_by_node(self.dataset, process_index, num_processes))

    def shuffled(self, seed: int) -> "ImageSource":
        """The same images in a random order; those of a stream in a random order of files, and within a buffer."""
        return replace(self, shuffle_seed=seed)

    def stream(self) -> Iterator[Row]:
        """The rows of a stream; in a worker of a DataLoader those of the files that datasets assigns to it.

        Raises:
            ValueError: a label is not valid, or datasets cannot read on.
        """
        dataset = self.dataset
        if self.shuffle_seed is not None:
            dataset = dataset.shuffle(seed=self.shuffle_seed, buffer_size=_SHUFFLE_BUFFER)
        last = "the beginning"
        rows = iter(dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of the network, the archive, a decoder of labels, ...
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"{self.name} cannot be read on after {last}: {reason}") from error
            data = (row[self.image_column] or {}).get("bytes") or b""
            known = self._read(row, f"image of {self.name} with sha256 {hashlib.sha256(data).hexdigest()[:16]}")
            last = known.name
            yield known

    def _read(self, row: dict, default_name: str) -> Row:
        encoded = row[self.image_column] or {}
        path = encoded.get("path")
        if row.get("__url__"):  # a WebDataset
            name = f"{row['__url__']}/{path or row['__key__']}"
        elif path and encoded.get("bytes") is None:
            name = path
            if not self._holds(path):
                encoded = {"refused": "its row points to a file that lies outside of the data set and its folder"}
        else:
            name = f"{default_name} ({path})" if path else default_name
        if self.label_column is None:
            return Row(name, encoded, 0)
        label = look_up(row, self.label_column)
        if isinstance(label, str):
            label = self._label2id.get(label, label)
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise ValueError(
                f"{name} has the label {label!r} in column {self.label_column!r}: expected 0 to"
                f" {self.num_classes - 1}, as there are {self.num_classes} classes."
            )
        return Row(name, encoded, label)

    def _holds(self, path: str) -> bool:
        """Whether a path that stands in a row leads to the data set: a table from somebody else may hold any."""
        file = path.split("::")[-1]  # zip://inside::archive
        if "://" in file:
            return file in self.files
        file = os.path.abspath(file)
        return any(os.path.commonpath([file, folder]) == folder for folder in self._folders)

    @cached_property
    def _folders(self) -> list[str]:
        """Where the files of the data set lie on this machine."""
        if self._root:
            return [os.path.abspath(self._root)]
        from datasets.config import HF_DATASETS_CACHE
        from huggingface_hub.constants import HF_HUB_CACHE

        return [os.path.abspath(folder) for folder in (HF_DATASETS_CACHE, HF_HUB_CACHE)]  # of one on the Hub

    @cached_property
    def _root(self) -> str:
        """The folder of all local files, empty if there are none."""
        local = [os.path.dirname(file) for file in self.files if "://" not in file]
        return os.path.commonpath(local) if local else ""

    @cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng(self.shuffle_seed).permutation(self.num_rows)

    @cached_property
    def _label2id(self) -> dict[str, int]:
        return {name: label for label, name in self.id2label.items()}


def load_images(args: argparse.Namespace) -> ImageSource:
    """The images of the flags of `add_data_arguments`; with their classes if `add_class_arguments` gave flags too.

    Raises:
        ValueError: not exactly one source is named; it cannot be read, is empty, or leaves classes unclear; a column
            is missing, ambiguous or of another type; labels and flags contradict one another.
    """
    datasets = call_around(lambda: import_module("datasets"))
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("pass either --dataset_name or --train_data_dir.")
    labelled = "label_column" in args and not args.unconditional
    dataset, files, remarks = _load(args, labelled)
    features = dataset.features
    if features is None:
        raise ValueError(f"{_name(args)} does not declare its columns as a stream: drop --streaming.")
    image_column = find_image_column(features, args.image_column)
    columns = [image_column, *(column for column in ("__key__", "__url__") if column in features)]
    label_column = num_classes = id2label = None
    if labelled:
        label_column = find_label_column(features, args.label_column)
        candidates = [column for column, feature in features.items() if hasattr(feature, "names")]
        if label_column is not None:
            num_classes, id2label = read_classes(dataset, label_column, args)
            columns.append(label_column if label_column in features else label_column.split(".")[0])
        elif candidates:
            remarks.append(f"--label_column could be {' or '.join(candidates)}")
    _check_class_flags(args, label_column, features)
    return ImageSource(
        dataset=dataset.select_columns(columns).cast_column(image_column, datasets.Image(decode=False)),
        name=_short_name(args),
        description=describe_source(args),
        streaming=args.streaming,
        image_column=image_column,
        label_column=label_column,
        num_classes=num_classes,
        id2label=id2label,
        files=tuple(files),
        labelled=labelled,
        remarks=tuple(remarks),
    )


def _check_class_flags(args: argparse.Namespace, label_column: str | None, features: dict) -> None:
    flags = ("label_column", "num_classes", "id2label")
    given = [flag for flag in flags if getattr(args, flag, None) is not None]
    if given and label_column is None:
        if args.unconditional:
            raise ValueError(f"--unconditional ignores labels: it does not go with --{given[0]}.")
        raise ValueError(
            f"--{given[0]} needs labels, and none of the columns {list(features)} is called label or cls."
        )


def _load(args: argparse.Namespace, labelled: bool) -> tuple[Any, list[str], list[str]]:
    """The data set, the files it is read from, and remarks."""
    name = _name(args)
    builders = {".parquet": "parquet", ".tar": "webdataset"}
    ending = Path(name).suffix.lower()
    if os.path.isfile(name) and ending in builders:
        return _load_with_datasets(args, builders[ending], data_files={"train": name})
    if not os.path.isdir(name):
        if args.dataset_name is not None and not os.path.exists(name):
            return _load_with_datasets(args, name, name=args.dataset_config_name)
        found = "is a file" if os.path.exists(name) else "does not exist"
        raise ValueError(f"{_flag(args)} {name} {found}: expected a folder, a .parquet or a .tar file.")
    files, hidden = list_files(name)
    kind = folder_kind(name, files)
    if kind == "images":
        images = [file for file in files if is_image(file)]
        dataset, used, remarks = load_folder(name, images, labelled, args.streaming), images, []
    elif kind == "images with metadata":
        dataset, used, remarks = _load_with_datasets(args, "imagefolder", data_dir=name)
        unlisted = 0 if args.streaming else sum(map(is_image, used)) - len(dataset)
        if unlisted > 0:
            remarks.append(f"{_number(unlisted, 'image')} not used: missing in the metadata")
    else:
        dataset, used, remarks = _load_with_datasets(args, name)
        files = [file for file in files if not file.lower().endswith(kind)]
    unused = [*(file for file in files if kind != "images" or not is_image(file)), *hidden]
    if unused and kind != "images with metadata":
        remarks.append(
            f"{_number(len(unused), 'file')} not used: {_shown([os.path.basename(file) for file in unused])}"
        )
    return dataset, used, remarks


def _load_with_datasets(args: argparse.Namespace, path: str, **config: Any) -> tuple[Any, list[str], list[str]]:
    import datasets

    try:
        # Unlike load_dataset a builder resolves the revision once, and tells the files
        builder = datasets.load_dataset_builder(path, **config)
        files = {str(split): list(map(str, names)) for split, names in (builder.config.data_files or {}).items()}
        check_tars(name for names in files.values() for name in names)
        if args.streaming:
            dataset = builder.as_streaming_dataset(split=args.split)
        else:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=args.split)
    except Exception as error:  # of the network, the Hub, datasets, pyarrow, ...
        raise ValueError(f"{_flag(args)} {_name(args)} cannot be read: {type(error).__name__}: {error}") from error
    remarks = [f"split {args.split} of {', '.join(files)}"] if len(files) > 1 else []
    return dataset, files.get(args.split.split("[")[0], []), remarks


def _name(args: argparse.Namespace) -> str:
    return args.dataset_name or args.train_data_dir


def _flag(args: argparse.Namespace) -> str:
    return "--dataset_name" if args.dataset_name else "--train_data_dir"


def _short_name(args: argparse.Namespace) -> str:
    return os.path.basename(os.path.normpath(_name(args)))


def _shown(names: list[str]) -> str:
    return ", ".join(map(printable, names[:_MAX_SHOWN])) + (", ..." if len(names) > _MAX_SHOWN else "")


def _number(count: int, word: str) -> str:
    return f"{count} {word if count == 1 else word + ('es' if word.endswith('s') else 's')}"
