# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Labels never vanish, the images named are read and no others, and numbers of classes are those of the user."""

import json
import os
from decimal import Decimal

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from image_files import encode, photo, write_folder, write_tar

from diffusers_d2it.data import BadImages, load_images, usable_images


NAMES = ["sea", "earth", "sea", "sky"]
NUMBERS = [2, 0, 2, 1]
IMAGES = [encode(photo(i, 32)) for i in range(4)]


def in_parquet(folder, labels: pyarrow.Array, column: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": IMAGES, column: labels}), folder / "data.parquet")


def in_metadata(folder, labels: pyarrow.Array, column: str, ending: str) -> None:
    files = [f"{name}/{i}.png" for i, name in enumerate("abab")]  # sub-folders that are not the classes
    write_folder(folder, dict(zip(files, IMAGES)))
    table, path = pyarrow.table({"file_name": files, column: labels}), folder / f"metadata.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif ending == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("\n".join(json.dumps(row, default=int) for row in table.to_pylist()), encoding="utf-8")


def in_tar(folder, labels: pyarrow.Array, column: str) -> None:
    rows = [json.dumps({column: label}, default=int).encode() for label in labels.to_pylist()]
    write_tar(folder / "data.tar", {str(i): {"png": IMAGES[i], "json": row} for i, row in enumerate(rows)})


PLACES = {
    "parquet": in_parquet,
    "csv": lambda *what: in_metadata(*what, "csv"),
    "jsonl": lambda *what: in_metadata(*what, "jsonl"),
    "metadata.parquet": lambda *what: in_metadata(*what, "parquet"),
    "tar": in_tar,
}
ARROW_TYPES = {
    **{str(kind): pyarrow.array(NAMES, kind) for kind in (pyarrow.string(), pyarrow.large_string())},
    "string_view": pyarrow.array(NAMES, pyarrow.string_view()),
    "dictionary": pyarrow.array(NAMES).dictionary_encode(),
    "dictionary of large_string": pyarrow.array(NAMES, pyarrow.large_string()).dictionary_encode(),
    "dictionary of ids": pyarrow.array(NUMBERS).dictionary_encode(),
    **{str(kind): pyarrow.array(NUMBERS, kind) for kind in (pyarrow.int64(), pyarrow.uint8(), pyarrow.uint64())},
    **{str(kind): pyarrow.array(NUMBERS, kind) for kind in (pyarrow.float32(), pyarrow.float64())},
    "decimal": pyarrow.array(map(Decimal, NUMBERS), pyarrow.decimal128(5, 0)),
    "bool": pyarrow.array([True, False, True, False]),
}


IN_TEXT = ["string", "int64", "double", "bool"]  # text files hold the same of the others


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "kind, place", [(kind, place) for place in PLACES for kind in (ARROW_TYPES if "parquet" in place else IN_TEXT)]
)
def test_labels_of_every_type_are_read_everywhere(tmp_path, kind, place, streaming):
    labels = ARROW_TYPES[kind]
    PLACES[place](tmp_path, labels, "label")
    of_names = "string" in kind or kind == "dictionary"
    expected = [1, 0, 1, 2] if of_names else [int(label) for label in labels.to_pylist()]
    named = {0: "earth", 1: "sea", 2: "sky"} if of_names else {label: str(label) for label in sorted({*expected})}
    source = load_images(tmp_path, streaming=streaming, id2label=named if streaming else None)
    assert sorted(row.label for row in source.rows()) == sorted(expected)
    assert source.id2label == named and source.num_classes == max(expected) + 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "labels",
    [["a", None, "b", None], [0, None, 1, None], [0.0, float("nan"), 1.0, None], ["a", "", "b", " "], [None] * 4],
    ids=["names", "ids", "floats", "blank", "all"],
)
def test_rows_without_a_label_are_counted_and_named(tmp_path, labels, place):
    PLACES[place](tmp_path, pyarrow.array(labels), "label")
    with pytest.raises(ValueError, match=r"'(json\.)?label'.*(2 rows .*1, 3|4 rows .*0, 1, 2, 3)"):
        load_images(tmp_path)
    assert load_images(tmp_path, labelled=False).num_rows == 4


@pytest.mark.parametrize("column", ["label", "labels", "Label", "cls", "class", "class_name", "category", "target"])
@pytest.mark.parametrize("place", PLACES)
def test_columns_that_are_called_as_labels_are(tmp_path, column, place):
    PLACES[place](tmp_path, pyarrow.array(NAMES), column)
    assert load_images(tmp_path).id2label == {0: "earth", 1: "sea", 2: "sky"}


@pytest.mark.parametrize(
    "place, labels",
    [(place, [0.5] * 4) for place in PLACES] + [(place, [[1, 2]] * 4) for place in PLACES if place != "csv"],
)
def test_a_column_of_labels_that_holds_none_is_an_error(tmp_path, place, labels):
    PLACES[place](tmp_path, pyarrow.array(labels), "label")
    with pytest.raises(ValueError, match="`label(led|_column)`"):
        load_images(tmp_path)


@pytest.mark.parametrize("num_classes", [0, -1])
def test_a_table_has_one_class_at_least(tmp_path, num_classes):
    in_parquet(tmp_path, pyarrow.array(NUMBERS), "label")
    with pytest.raises(ValueError, match=f"`num_classes`.* {num_classes}"):
        load_images(tmp_path, streaming=True, num_classes=num_classes)


@pytest.mark.parametrize("place", ["parquet", "tar"])
def test_other_columns_are_named_where_there_are_no_labels(tmp_path, place):
    PLACES[place](tmp_path, pyarrow.array(NAMES), "weather")
    source = load_images(tmp_path)
    said = str(source)
    assert source.id2label is None and "no classes" in said and "`label_column`" in said
    assert ("weather" if place == "parquet" else "json") in said


def test_two_columns_of_labels_are_said(tmp_path):
    table = {"image": IMAGES, "class_name": NAMES, "label": NUMBERS}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "data.parquet")
    source = load_images(tmp_path)
    assert source.label_column == "label" and "class_name" in str(source) and "`label_column`" in str(source)
    chosen = load_images(tmp_path, label_column="class_name")
    assert chosen.id2label == {0: "earth", 1: "sea", 2: "sky"} and "`label_column`" not in str(chosen)


# ---- Sub-folders ----


def pictures(*names: str) -> dict[str, bytes]:
    return {name: IMAGES[i % 4] for i, name in enumerate(names)}


CAPTIONS = {"metadata.jsonl": b'{"file_name": "a/0.png", "text": "x"}\n{"file_name": "b/1.png", "text": "y"}'}
FFHQ = pictures("00000/00000.png", "00000/00001.png", "01000/01000.png", "69000/69999.png")


@pytest.mark.parametrize(
    "files, classes, said",
    [
        (pictures("a/0.png", "b/1.png") | CAPTIONS, ["a", "b"], []),  # a table of captions takes no classes away
        (FFHQ | {"LICENSE.txt": b""}, None, ["00000 to 69000", "`label_column`"]),
        (pictures("images/0.png", "images/1.png"), None, ["images", "`label_column`"]),
        (pictures("train/0.png", "bus/1.png", "test/2.png"), ["bus", "test", "train"], ["test, train", "`split`"]),
        (pictures("0/0.png", "1/1.png", "10/3.png", "2/2.png"), ["0", "1", "2", "10"], ["'10' has the id 3"]),
        (pictures("1/0.png", "2/1.png"), ["1", "2"], ["'1' has the id 0"]),
        (pictures("0/0.png", "1/1.png", "2/2.png"), ["0", "1", "2"], []),
        (pictures("n02/0.png", "n01/1.png"), ["n01", "n02"], []),
        (pictures("cafe\u0301/0.png", "bar/1.png"), ["bar", "caf\u00e9"], []),
    ],
)
def test_sub_folders_that_are_classes_and_those_that_look_like_something_else(tmp_path, files, classes, said):
    source = load_images(write_folder(tmp_path, files))
    assert source.id2label == (None if classes is None else dict(enumerate(classes)))
    remarks = "; ".join(source.remarks)
    assert all(words in remarks for words in said) and bool(said) == ("`" in remarks or "id" in remarks.split())


@pytest.mark.parametrize("files, classes", [(FFHQ, 3), (pictures("images/0.png"), 1)])
def test_class_folders_that_are_asked_for_are_classes(tmp_path, files, classes):
    source = load_images(write_folder(tmp_path, files), label_column="class_folder")
    assert source.num_classes == classes and "`label_column`" not in str(source)
    with pytest.raises(ValueError, match="flat"):
        load_images(write_folder(tmp_path / "flat", pictures("0.png")), label_column="class_folder")


def test_class_folders_beside_labels_of_a_table(tmp_path):
    lines = [json.dumps({"file_name": f"{name}/0.png", "label": 1 - i}) for i, name in enumerate("ab")]
    files = pictures("a/0.png", "b/0.png") | {"metadata.jsonl": "\n".join(lines).encode()}
    source = load_images(write_folder(tmp_path, files))
    assert source.label_column == "label" and [row.label for row in source.rows()] == [1, 0]
    assert "`label_column` 'class_folder'" in str(source)
    assert load_images(tmp_path, label_column="class_folder").id2label == {0: "a", 1: "b"}


def test_names_of_a_table_that_are_numbers_sort_as_numbers(tmp_path):
    in_parquet(tmp_path, pyarrow.array(["10", "0", "1", "2"]), "label")
    source = load_images(tmp_path)
    assert source.id2label == {0: "0", 1: "1", 2: "2", 3: "10"} and "'10' has the id 3" in str(source)
    in_parquet(tmp_path, pyarrow.array(["1", "0", "1", "2"]), "label")
    assert "id" not in str(load_images(tmp_path)).split()


# ---- Splits, and no images but those that are named ----


def names_of(source) -> set[str]:
    return {row.name.rsplit("/", 1)[1] for row in source.rows()}


SPLIT = pictures("train/a/0.png", "train/b/1.png", "val/a/2.png", "val/b/3.png")
FLAT = pictures("training/0.png", "test/1.png")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "files, split, read, name",
    [
        (SPLIT, None, {"0.png", "1.png"}, "train"),
        (SPLIT, "train", {"0.png", "1.png"}, "train"),
        (SPLIT, "val", {"2.png", "3.png"}, "val"),
        (SPLIT, "validation", {"2.png", "3.png"}, "val"),
        (FLAT, None, {"0.png"}, "training"),
        (FLAT, "test", {"1.png"}, "test"),
        (FLAT, "all", {"0.png", "1.png"}, None),
        (pictures("test/0.png"), None, {"0.png"}, "test"),
    ],
)
def test_sub_folders_that_are_splits(tmp_path, files, split, read, name, streaming):
    source = load_images(write_folder(tmp_path / "photos", files), split=split, streaming=streaming)
    assert names_of(source) == read and source.split == name
    assert ("a" in (source.id2label or {}).values()) == (files is SPLIT)
    assert source.describe(32) == f"photos, split {name}, 32x32" if name else "photos, 32x32"
    folders = {file.split("/")[0] for file in files}
    assert all(folder in str(source) for folder in folders) or len(folders) == 1


@pytest.mark.parametrize(
    "files, split",
    [
        (pictures("0.png"), "train"),
        (pictures("a/0.png", "b/1.png"), "validation"),
        (SPLIT, "test"),
        (SPLIT, "train[:1]"),
        (pictures("val/0.png", "test/1.png"), None),
    ],
)
def test_a_split_that_is_not_there_is_an_error(tmp_path, files, split):
    with pytest.raises(ValueError, match="`split`"):
        load_images(write_folder(tmp_path, files), split=split)


@pytest.mark.parametrize("where", ["metadata.jsonl", "train/metadata.jsonl"])
def test_metadata_go_with_their_split(tmp_path, where):
    lines = [{"file_name": f"{split}/{split}.png", "label": split} for split in ("train", "test")]
    if "/" in where:
        lines = [{"file_name": "train.png", "label": "train"}]
    text = "\n".join(map(json.dumps, lines)).encode()
    files = pictures("train/train.png", "test/test.png") | {where: text}
    source = load_images(write_folder(tmp_path, files))
    assert names_of(source) == {"train.png"} and source.id2label == {0: "train"}


@pytest.mark.parametrize(
    "names, split, table, text",
    [
        (["train/a.png", "test/b.png"], "test", "metadata.jsonl", b'{"file_name": "train/a.png"}'),
        (["0.png"], None, "metadata.csv", b"file_name,label\n"),
    ],
    ids=["images of another split", "a header alone"],
)
def test_metadata_that_name_no_image_are_an_error(tmp_path, names, split, table, text):
    with pytest.raises(ValueError, match=f"file_name.*{table}.*{names[-1]}"):
        load_images(write_folder(tmp_path, pictures(*names) | {table: text}), split=split)


@pytest.mark.parametrize("name", ["set[1]", "set*", "se?1", "set1", "{set1}"])
@pytest.mark.parametrize(
    "kind, single_file",
    [*((kind, False) for kind in ("parquet", "tar", "metadata.parquet", "csv")), ("parquet", True), ("tar", True)],
)
def test_paths_are_no_patterns(tmp_path, name, kind, single_file):
    for folder, label in {"set1": 1, "seta1": 1, name: 0}.items():
        (tmp_path / folder).mkdir(exist_ok=True)
        PLACES[kind](tmp_path / folder, pyarrow.array([label] * 4), "label")
    source = load_images(tmp_path / name / f"data.{kind}" if single_file else tmp_path / name)
    assert {row.label for row in source.rows()} == {0} and source.num_rows == 4


def test_a_path_that_datasets_cannot_take_is_named(tmp_path):
    (tmp_path / "a::b").mkdir()
    in_parquet(tmp_path / "a::b", pyarrow.array(NAMES), "label")
    with pytest.raises(ValueError, match="a::b"):
        load_images(tmp_path / "a::b")


@pytest.mark.parametrize(
    "names, split, read, said",
    [
        (["train.parquet", "validation.parquet"], None, [0], "train of"),
        (["train.parquet", "validation.parquet"], "val", [1], "validation of"),
        (["data/train-00000-of-00001.parquet", "data/unlabelled-00000-of-00001.parquet"], "unlabelled", [1], "unlab"),
        (["imagenet-train-00.parquet", "imagenet-val-00.parquet"], None, [0], "train of"),
        (["train/0.parquet", "test/0.parquet"], "test", [1], "test of"),
        (["train.parquet", "rest.parquet"], None, [0], "rest.parquet"),  # it belongs to no split, and is named
        (["0.parquet", "1.parquet"], None, [0, 1], "2 images"),
        (["0.parquet", "1.parquet"], "train[:1]", [0], "train[:1]"),
        (["train.parquet", "test.parquet"], "all", [0, 1], "all of"),
    ],
)
def test_splits_of_tables(tmp_path, names, split, read, said):
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"image": [IMAGES[i]], "label": [i]}), tmp_path / name)
    source = load_images(tmp_path, split=split)
    assert sorted(row.label for row in source.rows()) == read and said in str(source)


# ---- As people write them ----


METADATA = {
    "blank after the comma": "file_name, label\n0.png, sea\n1.png, sky",
    "blank behind a name": "file_name,label\n0.png,sea \n1.png,sky",
    "Windows paths": "file_name,label\nb\\0.png,sea\nb\\1.png,sky",
    "mark of the encoding": "\ufefffile_name,label\n0.png,sea\n1.png,sky",
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_as_people_and_their_programs_write_them(tmp_path, kind):
    folder = "b/" if kind == "Windows paths" else ""
    write_folder(tmp_path, dict(zip([f"{folder}0.png", f"{folder}1.png"], IMAGES)))
    (tmp_path / "metadata.csv").write_text(METADATA[kind], encoding="utf-8")
    source = load_images(tmp_path)
    assert source.id2label == {0: "sea", 1: "sky"} and "not used: missing" not in str(source)
    assert [row.label for row in source.rows()] == [0, 1]


def test_an_image_that_is_named_twice_is_said(tmp_path):
    write_folder(tmp_path, pictures("0.png", "1.png"))
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,sea\n1.png,sky\n0.png,sky")
    assert any("1 row" in remark for remark in load_images(tmp_path).remarks)


def test_metadata_with_other_separators_name_their_columns(tmp_path):
    write_folder(tmp_path, pictures("0.png"))
    (tmp_path / "metadata.csv").write_text("file_name;label\n0.png;sea")
    with pytest.raises(ValueError, match="metadata.csv.*file_name.*'file_name;label'"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train2017", "val2017"),
        ("training_set", "test_set"),
        ("Train-Images", "eval_data"),
        ("part_0", "part_1"),
        ("Shard-01", "Shard-02"),
        ("000", "001"),
    ],
)
def test_folders_that_look_like_something_else_are_said(tmp_path, names):
    write_folder(tmp_path, pictures(*(f"{name}/{i}.png" for i, name in enumerate(names))))
    assert any(all(name in remark for name in names) for remark in load_images(tmp_path).remarks)


def test_names_that_differ_in_capitals_alone_are_said(tmp_path):
    write_folder(tmp_path, pictures("0.png", "1.png", "2.png"))
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,Cat\n2.png,dog")
    (remark,) = load_images(tmp_path).remarks
    assert all(name in remark for name in ("cat", "Cat")) and "dog" not in remark


def test_folders_in_an_archive_are_said(tmp_path):
    write_tar(tmp_path / "photos.tar", {"photos/cat/0": {"png": IMAGES[0]}, "photos/dog/1": {"png": IMAGES[1]}})
    source = load_images(tmp_path / "photos.tar")
    assert source.id2label is None and any("photos/cat" in remark for remark in source.remarks)


@pytest.mark.parametrize("rows", [[{"cls": b"cat"}, {"cls": b"dog"}], [{"cls": b"0"}, {}]], ids=["text", "missing"])
def test_what_an_archive_must_hold_is_said(tmp_path, rows):
    write_tar(tmp_path / "photos.tar", {str(i): {"png": IMAGES[i], **row} for i, row in enumerate(rows)})
    with pytest.raises(ValueError, match=r"photos.tar.*\.cls"):
        load_images(tmp_path / "photos.tar")


def test_a_pipe_among_the_images_is_listed_and_not_waited_for(tmp_path):
    write_folder(tmp_path, pictures("0.png"))
    os.mkfifo(tmp_path / "1.png")
    bad = BadImages(tmp_path / "bad.jsonl")
    source = load_images(tmp_path)
    assert len([one for one in usable_images(source.rows(), 32, bad)]) == 1
    assert "1.png" in bad.path.read_text()


def test_a_table_in_another_encoding_is_named(tmp_path):
    write_folder(tmp_path, pictures("0.png"))
    (tmp_path / "metadata.csv").write_bytes("file_name,label\n0.png,caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="metadata.csv.*UTF-8"):
        load_images(tmp_path)


def test_ids_that_make_a_huge_table_are_said(tmp_path):
    in_parquet(tmp_path, pyarrow.array([100_234, 100_236, 100_234, 100_236]), "label")
    assert any("100,237" in remark for remark in load_images(tmp_path).remarks)
    assert not load_images(tmp_path, num_classes=200_000).remarks
