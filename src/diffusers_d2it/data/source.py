# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Where the images of a run come from. datasets is imported where it is used: it takes a while."""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..optional import import_optional
from ..words import counted, listed, printable
from .folders import (
    check_tars,
    choose_split,
    folder_kind,
    is_image,
    is_metadata,
    list_files,
    load_folder,
    split_folder,
    splits_of_tables,
)
from .labels import find_image_column, find_label_column, label_columns, look_up, read_classes, read_label


_SHUFFLE_BUFFER = 1000  # rows of a stream, still encoded, among which the next one is drawn
_MAX_SHOWN = 10  # names in one line
_LOOKED_AT = 100  # rows of an archive
_MANY_CLASSES = 1000
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


class Row(NamedTuple):
    """One image of a source, not yet decoded."""

    name: str  # where it comes from, in words: its path if it has one
    encoded: dict  # {"bytes", "path"} for `decode_image`
    label: int  # 0 without classes


@dataclass(frozen=True)
class ImageSource:
    """The images of a run, made by `load_images`. As a string it says in one line what was found."""

    dataset: Any  # a `datasets.Dataset`, or for a stream a `datasets.IterableDataset`; images are not decoded
    name: str  # last part of the folder or Hub name
    split: str | None  # what was read of the data set; None for all of one that has no splits
    streaming: bool
    image_column: str
    label_column: str | None  # this and the next two are None without classes
    num_classes: int | None  # size of the label table
    id2label: dict[int, str] | None  # names of the classes by id: those that occur, for a stream all
    files: tuple[str, ...]  # the images of a folder, or the files that hold them
    labelled: bool = False  # whether labels were looked for
    remarks: tuple[str, ...] = ()  # what a user may have expected to be used and is not
    shuffle_seed: int | None = None  # fixes the order; None for that of the data set

    def describe(self, resolution: int) -> str:
        """The images at a resolution in words, for configurations and model cards."""
        split = "" if self.split is None else f"split {self.split}, "
        return f"{self.name}, {split}{resolution}x{resolution}"

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
            known = file if "://" in file else [os.path.relpath(file, self._root), _size(file)]
            digest.update(json.dumps(known).encode())
        columns = [self.image_column, self.label_column, self.num_classes, self.id2label]
        digest.update(json.dumps([self.num_rows, self.streaming, self.shuffle_seed, *columns]).encode())
        return digest.hexdigest()

    def __str__(self) -> str:
        words = f"{printable(self.name)}: {'a stream' if self.streaming else counted(self.num_rows, 'image')}"
        if self.id2label is not None:
            words += f", {counted(len(self.id2label), 'class')} ({listed(self.id2label.values(), _MAX_SHOWN)})"
        elif self.labelled:
            words += ", no classes"
        return "; ".join([words, *self.remarks])

    def __getitem__(self, index: int) -> Row:
        """A row of a map-style source. Raises a ValueError if its label is not valid."""
        index = int(index if self.shuffle_seed is None else self._order[index])
        return self._read(self.dataset[index], f"row {index} of {self.name}")

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Rows `start` to `stop` in the order of the source; a stream is read from its beginning.

        Raises a ValueError if a label is not valid, or a stream cannot be read on.
        """
        if self.streaming:
            yield from islice(self.stream(), start, stop)
        else:
            yield from (self[i] for i in range(start, self.num_rows if stop is None else min(stop, self.num_rows)))

    def share(self, process_index: int, num_processes: int) -> Iterator[Row]:
        """The rows of one process, disjoint from those of the others. Raises what `rows` does."""
        if self.streaming:
            yield from self.part(process_index, num_processes).stream()
        else:
            yield from (self[i] for i in range(process_index, self.num_rows, num_processes))

    def part(self, process_index: int, num_processes: int) -> "ImageSource":
        """The part of a stream that one process reads, as a source of its own."""
        from datasets.distributed import split_dataset_by_node

        return replace(self, dataset=split_dataset_by_node(self.dataset, process_index, num_processes))

    def shuffled(self, seed: int) -> "ImageSource":
        """The same images in a random order; those of a stream in a random order of files, and within a buffer."""
        return replace(self, shuffle_seed=seed)

    def stream(self) -> Iterator[Row]:
        """The rows of a stream, in a worker of a DataLoader those of its files. Raises what `rows` does."""
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
        with suppress(ValueError):  # which the next lines say with the name of the image
            label = read_label(label)
        if isinstance(label, str):
            label = self._label2id.get(label, label)
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise ValueError(
                f"{name} has the label {label!r} in column {self.label_column!r}: expected 0 to"
                f" {self.num_classes - 1}, of {counted(self.num_classes, 'class')}."
            )
        return Row(name, encoded, label)

    def _holds(self, path: str) -> bool:
        """Whether a path that stands in a row leads to the data set: a table from somebody else may hold any."""
        file = path.split("::")[-1]  # zip://inside::archive
        if "://" in file:
            return file in self._files
        file = os.path.abspath(file)
        return any(os.path.commonpath([file, folder]) == folder for folder in self._folders)

    @cached_property
    def _files(self) -> frozenset[str]:
        return frozenset(self.files)

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


def load_images(
    path: str | os.PathLike,
    *,
    split: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    labelled: bool = True,
    label_column: str | None = None,
    num_classes: int | None = None,
    id2label: dict[int, str] | str | os.PathLike | None = None,
) -> ImageSource:
    """The images of a folder, a file or a data set on the Hub, and their classes.

    Args:
        path: a folder of images, class by sub-folder, without sub-folders no classes; or of .parquet or WebDataset
            .tar files; or one such file; or a name on the Hub.
        split: of the data set, or of a folder with sub-folders train, val, ...; "all" reads all of them. None for
            train, or the only one.
        config_name: configuration of a data set on the Hub that has several.
        streaming: read the data set as a stream, without a local copy.
        image_column: column that holds the images; None for the only one that does.
        labelled: whether classes are looked for; False ignores labels and class folders.
        label_column: column of labels, or json.<name>, or class_folder for the sub-folders of images; None for
            `label`, `labels`, `cls`, `class`, ... if there is one.
        num_classes: size of the label table; None for one more than the largest label.
        id2label: names of the classes by id, or a JSON file of them; None for those that the data set declares.

    Raises:
        ValueError: nothing is there; it cannot be read, is empty, or leaves classes unclear; a column is missing,
            ambiguous or of another type; labels and arguments contradict one another.
    """
    datasets = import_optional("datasets", "reading images")
    path = os.fspath(path)
    dataset, files, split, remarks = _load(path, split, config_name, streaming, labelled, label_column)
    features = dataset.features
    if features is None:
        raise ValueError(f"{path} does not declare its columns as a stream: pass `streaming=False`.")
    image_column = find_image_column(features, image_column)
    columns = [image_column, *(column for column in ("__key__", "__url__") if column in features)]
    of_classes = {"label_column": label_column, "num_classes": num_classes, "id2label": id2label}
    found, names = None, None
    if labelled:
        found = find_label_column(features, label_column)
        others = [column for column in features if column not in columns]
        if found is not None:
            num_classes, names = read_classes(
                dataset, found, streaming=streaming, num_classes=num_classes, id2label=id2label
            )
            columns.append(found if found in features else found.split(".")[0])
            remarks += _remarks_on_classes(names, num_classes, is_counted=of_classes["num_classes"] is None)
            unused = [column for column in label_columns(features) if column != found]
            if unused and label_column is None:
                remarks.append(f"labels are {found}, not {listed(unused)} (`label_column`)")
        elif others:
            likely = [column for column in others if hasattr(features[column], "names")] or others
            remarks.append(f"`label_column` could be {listed(likely).replace(', ', ' or ')}")
        elif "__key__" in columns and not streaming:
            folders = sorted({os.path.dirname(key) for key in dataset[:_LOOKED_AT]["__key__"]} - {""})
            if folders:
                remarks.append(f"folders in the archive are not used as classes, such as {folders[0]}: extract it")
    given = [name for name, value in of_classes.items() if value is not None]
    if given and found is None:
        reason = f"none of the columns {list(features)} is called as labels are" if labelled else "`labelled` is False"
        raise ValueError(f"`{given[0]}` needs labels, and {reason}.")
    return ImageSource(
        dataset=dataset.select_columns(columns).cast_column(image_column, datasets.Image(decode=False)),
        name=os.path.basename(os.path.normpath(path)),
        split=split,
        streaming=streaming,
        image_column=image_column,
        label_column=found,
        num_classes=num_classes,
        id2label=names,
        files=tuple(files),
        labelled=labelled,
        remarks=tuple(remarks),
    )


def _remarks_on_classes(names: dict[int, str], num_classes: int, is_counted: bool) -> list[str]:
    """What may not be as it was meant in a table of classes, whose size was counted or asked for."""
    remarks = []
    if is_counted and num_classes > max(_MANY_CLASSES, 10 * len(names)):
        remarks.append(f"ids up to {max(names):,} make a table of {num_classes:,} classes for {len(names)}")
    alike = Counter(name.casefold() for name in names.values())
    twins = [name for name in names.values() if alike[name.casefold()] > 1]
    if twins:
        remarks.append(f"names differ in capitals alone, and are classes each: {listed(twins, _MAX_SHOWN)}")
    shifted = [label for label, name in names.items() if name.isdecimal() and int(name) != label]
    if shifted:
        remarks.append(f"names are no ids: {names[shifted[0]]!r} has the id {shifted[0]}")
    return remarks


def _load(
    path: str,
    split: str | None,
    config_name: str | None,
    streaming: bool,
    labelled: bool,
    label_column: str | None,
) -> tuple[Any, list[str], str | None, list[str]]:
    """The data set, the files it is read from, its split, and remarks."""
    if not os.path.isdir(path):
        builder, config = _builder_of(path, config_name)
        return _load_with_datasets(path, builder, split, streaming, **config)
    if config_name is not None:
        raise ValueError(f"`config_name` {config_name!r} belongs to a data set on the Hub, and {path} is a folder.")
    files, hidden = list_files(path)
    foreign = [file for file in files if not _is_text(file)]
    files = [file for file in files if _is_text(file)]
    kind = folder_kind(path, files)
    if kind == "images":
        images, tables = (list(filter(of_kind, files)) for of_kind in (is_image, is_metadata))
        unused = [file for file in files if not is_image(file) and not is_metadata(file)]
        root, remarks, (split, splits) = path, [], split_folder(path, images, split)
        if splits:
            remarks += [f"split {split} of {', '.join(splits)}"] if len(splits) > 1 else []
            root, images = os.path.join(path, split), splits[split]
            elsewhere = [os.path.join(path, other, "") for other in splits if other != split]
            tables = [table for table in tables if not table.startswith(tuple(elsewhere))]
        dataset, more = load_folder(root, images, tables, labelled, label_column, streaming)
        remarks += more
        used = images + tables
    else:
        splits = splits_of_tables(path, [file for file in files if file.lower().endswith(kind)])
        files_of = {name: list(map(glob.escape, names)) for name, names in splits.items()}  # paths, never patterns
        dataset, used, split, remarks = _load_with_datasets(
            path, _BUILDERS[kind], split, streaming, data_files=files_of
        )
        known = {file for names in splits.values() for file in names}
        unused = [file for file in files if file not in known]
    unused += hidden
    if foreign:
        names = listed(map(os.path.basename, foreign), _MAX_SHOWN)
        remarks.append(f"{counted(len(foreign), 'file')} not used, as the name is no UTF-8: {names}")
    if unused:
        remarks.append(f"{counted(len(unused), 'file')} not used: {listed(map(os.path.basename, unused), _MAX_SHOWN)}")
    return dataset, used, split, remarks


def _is_text(name: str) -> bool:
    """Whether the bytes of a name are UTF-8, as tables need it."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def _size(file: str) -> int | None:
    """Bytes of a file; None if it cannot be used, which is found and noted when it is read."""
    return os.path.getsize(file) if os.path.isfile(file) else None


def _builder_of(path: str, config_name: str | None) -> tuple[str, dict[str, Any]]:
    """What datasets calls a file, or a name on the Hub, and how it is told of it."""
    kind = _BUILDERS.get(Path(path).suffix.lower())
    if os.path.isfile(path) and kind is not None:
        (split,) = splits_of_tables(os.path.dirname(path), [path])
        return kind, {"data_files": {split: glob.escape(path)}}
    is_file, is_name = os.path.exists(path), _HUB_NAME.fullmatch(path) and kind is None
    if is_file or not is_name:
        found = "is a file" if is_file else "does not exist"
        raise ValueError(f"{path} {found}: expected a folder, a .parquet or a .tar file, or a name on the Hub.")
    return path, {"name": config_name}


def _load_with_datasets(
    path: str, builder: str, split: str | None, streaming: bool, **config: Any
) -> tuple[Any, list[str], str | None, list[str]]:
    import datasets

    hint = ""
    if builder == _BUILDERS[".tar"]:
        hint = ". Every image of a WebDataset has files of the same endings, and a .cls holds a whole number"
    try:
        # Unlike load_dataset a builder resolves the revision once, and tells the files
        builder = datasets.load_dataset_builder(builder, **config)
        files = {str(name): list(map(str, names)) for name, names in (builder.config.data_files or {}).items()}
        check_tars(name for names in files.values() for name in names)
        chosen = choose_split(path, files, split) if files else split or "train"
        if streaming:
            dataset = builder.as_streaming_dataset(split=chosen)
        else:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=chosen)
    except Exception as error:  # of the network, the Hub, datasets, pyarrow, ...
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}{hint}") from error
    read = list(files) if chosen == "all" else re.split(r"\[[^]]*\]|\+", chosen)
    is_all = split is None and list(files) == ["train"]  # and perhaps nobody called it so
    remarks = [] if is_all or not files else [f"split {chosen} of {', '.join(files)}"]
    return dataset, [file for name in read for file in files.get(name, [])], None if is_all else chosen, remarks
