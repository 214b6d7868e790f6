# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Own data in every form, the classes that it has, and what is said when it is not as expected."""

import json
import os
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from image_files import encode, photo, write_folder, write_tar

from diffusers_d2it.data.bad_images import BadImages
from diffusers_d2it.data.images import decode_image
from diffusers_d2it.data.loaders import usable_images
from diffusers_d2it.data.source import load_images


STREAMED = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


@pytest.fixture
def photos_folder(tmp_path):
    """Eight photographs in two classes, as in the first example of the README."""
    files = {f"{'sky' if i % 2 else 'earth'}/{i}.png": encode(photo(i)) for i in range(8)}
    return write_folder(tmp_path / "photos", files)


def features(**columns) -> datasets.Features:
    return datasets.Features({"image": datasets.Image(), **columns})


def parquet(path, labels: list, feature, num_images: int = 8) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encode(photo(i)), "path": None} for i in range(num_images)]
    columns = {"image": images, "label": labels}
    datasets.Dataset.from_dict(columns, features(label=feature)).to_parquet(str(path))
    return str(path)


def contents(source) -> list[tuple[int, int]]:
    """(number of the photograph, label) of every row, found by its pixels."""
    arrays = [np.asarray(photo(i)) for i in range(8)]
    found = []
    for row in source.rows():
        pixels = np.asarray(decode_image(row.encoded))
        found.append((next(i for i in range(8) if np.array_equal(pixels, arrays[i])), row.label))
    return sorted(found)


def write_table(path, **columns) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def refuse(path, *named: str, **arguments) -> None:
    """`load_images` raises a ValueError that names all of these."""
    with pytest.raises(ValueError) as error:
        load_images(path, **arguments)
    assert [word for word in named if word not in str(error.value)] == [], error.value


TWO_CLASSES = [(i, i % 2) for i in range(8)]
NO_CLASSES = [(i, 0) for i in range(8)]


@STREAMED
def test_folder_with_classes(photos_folder, streaming):
    source = load_images(photos_folder, streaming=streaming)
    assert contents(source) == TWO_CLASSES
    assert source.id2label == {0: "earth", 1: "sky"} and source.num_classes == 2
    said = "photos", "stream" if streaming else "8 images", "2 classes", "earth, sky"
    assert all(words in str(source) for words in said)
    assert source.num_rows == (None if streaming else 8)
    assert {row.name for row in source.rows()} == {str(path) for path in photos_folder.rglob("*.png")}
    assert source.describe(32) == "photos, 32x32"


def test_order_of_a_folder_is_that_of_datasets(photos_folder):
    theirs = datasets.load_dataset("imagefolder", data_dir=str(photos_folder), split="train")
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    ours = [(row.encoded["path"], row.label) for row in load_images(photos_folder).rows()]
    assert ours == [(row["image"]["path"], row["label"]) for row in theirs]


@STREAMED
def test_folder_without_classes(tmp_path, streaming):
    write_folder(tmp_path / "photos", {f"{i}.png": encode(photo(i)) for i in range(8)})
    source = load_images(tmp_path / "photos", streaming=streaming)
    assert contents(source) == NO_CLASSES
    assert source.id2label is None and source.num_classes is None and source.label_column is None
    assert "no classes" in str(source)


@STREAMED
@pytest.mark.parametrize("single_file", [True, False])
def test_parquet(tmp_path, streaming, single_file):
    feature = datasets.ClassLabel(names=["earth", "sky"])
    path = parquet(tmp_path / "photos" / "data.parquet", [i % 2 for i in range(8)], feature)
    write_folder(tmp_path / "photos", {"LICENSE.txt": b"free"})
    source = load_images(path if single_file else tmp_path / "photos", streaming=streaming)
    assert contents(source) == TWO_CLASSES and source.id2label == {0: "earth", 1: "sky"}
    assert ("LICENSE.txt" in str(source)) == (not single_file)
    assert ("sha256" if streaming else "row 0") in next(source.rows()).name


@STREAMED
@pytest.mark.parametrize("sidecar", ["cls", "json"])
def test_webdataset(tmp_path, streaming, sidecar):
    for shard in range(2):
        samples = {}
        for i in range(shard, 8, 2):
            label = str(i % 2) if sidecar == "cls" else json.dumps({"label": i % 2, "author": "nobody"})
            samples[f"{i:04d}"] = {"png": encode(photo(i)), sidecar: label.encode()}
        write_tar(tmp_path / "photos" / f"{shard}.tar", samples)
    source = load_images(tmp_path / "photos", streaming=streaming, num_classes=3)
    assert contents(source) == TWO_CLASSES and source.num_classes == 3
    assert source.label_column == {"cls": "cls", "json": "json.label"}[sidecar]
    assert source.id2label == ({0: "0", 1: "1", 2: "2"} if streaming else {0: "0", 1: "1"})
    assert next(source.rows()).name == str(tmp_path / "photos" / "0.tar") + "/0000.png"
    single = load_images(tmp_path / "photos" / "1.tar", streaming=streaming, labelled=False)
    assert [i for i, _ in contents(single)] == [1, 3, 5, 7] and single.num_classes is None


def test_images_with_a_metadata_file(tmp_path):
    write_folder(tmp_path / "photos", {f"{i}.png": encode(photo(i)) for i in range(8)})
    lines = [json.dumps({"file_name": f"{i}.png", "label": i % 2}) for i in range(7)]
    write_folder(tmp_path / "photos", {"metadata.jsonl": "\n".join(lines).encode()})
    source = load_images(tmp_path / "photos")
    assert contents(source) == TWO_CLASSES[:7]
    assert "; 1 image " in str(source)


@pytest.mark.parametrize("names", [["sky"], ["bus", "test", "train"]])
def test_classes_that_datasets_would_drop(tmp_path, names):  # the only one; all but the one of a split's name
    files = {f"{name}/my test {name}.png": encode(photo(i)) for i, name in enumerate(names)}
    source = load_images(write_folder(tmp_path / "vehicles", files))
    assert source.id2label == dict(enumerate(names)) and contents(source) == [(i, i) for i in range(len(names))]


def test_unused_files_are_named(photos_folder):
    names = ["sky/a.heic", "notes\x1b[31m.txt", ".DS_Store", "sky/._1.png", "__MACOSX/1"]
    source = load_images(write_folder(photos_folder, dict.fromkeys(names, b"x")))
    assert contents(source) == TWO_CLASSES
    remark = str(source).split("; ")[1]
    assert remark.startswith("5 files") and "a.heic" in remark and ".DS_Store" in remark and "\x1b" not in remark


def test_unclear_folders(photos_folder, tmp_path):
    image = encode(photo())
    refuse(write_folder(photos_folder, {"root.png": image}), "root.png", "`labelled=False`")
    source = load_images(photos_folder, labelled=False)
    assert source.num_rows == 9 and {label for _, label in contents(source)} == {0}
    nested = write_folder(tmp_path / "nested", {"2019/a/0.png": image, "2020/a/0.png": image})
    refuse(nested, "2019/a/0.png")
    assert load_images(nested, labelled=False).num_rows == 2
    gap = write_folder(tmp_path / "gap", {"a/0.png": image, "b/notes.txt": b"x"})
    refuse(gap, "gap/b")
    refuse(write_folder(tmp_path / "both", {"0.png": image, "1.parquet": b"x"}), "both", "1 images, 1 .parquet")
    os.symlink(tmp_path, gap / "a" / "loop")
    refuse(gap, "gap/a/loop", str(tmp_path))


def test_linked_class_folders_are_read(photos_folder, tmp_path):
    (tmp_path / "subset").mkdir()
    os.symlink(photos_folder / "sky", tmp_path / "subset" / "sky")
    assert load_images(tmp_path / "subset").num_rows == 4


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "empty", ".png")
    texts = write_folder(tmp_path / "texts", {"a.txt": b"", "b.txt": b""})
    refuse(texts, "texts", "2 .txt")
    for path in (tmp_path / "nowhere", texts / "a.txt"):
        refuse(path, str(path), ".tar")
    refuse(write_folder(tmp_path / "broken", {"data.parquet": b"x"}) / "data.parquet", "data.parquet")
    refuse(parquet(tmp_path / "none.parquet", [], datasets.Value("int64"), num_images=0), "none.parquet")
    for streaming in (False, True):
        refuse("nobody/nothing", "nobody/nothing", streaming=streaming)


@STREAMED
def test_another_split(tmp_path, streaming):
    for split, number in (("train", 8), ("test", 2)):
        path = tmp_path / "photos" / f"{split}-00000-of-00001.parquet"
        parquet(path, [0] * number, datasets.ClassLabel(names=["a"]), number)
    source = load_images(tmp_path / "photos", split="test", streaming=streaming)
    assert len(contents(source)) == 2 and "train" in str(source)
    refuse(tmp_path / "photos", "valid", split="valid", streaming=streaming)


@STREAMED
@pytest.mark.parametrize("name", ["a.tar", "PHOTOS.TAR"])
def test_a_tar_that_was_cut_off(tmp_path, name, streaming):
    write_tar(tmp_path / name, {str(i): {"png": encode(photo(i)), "cls": b"0"} for i in range(8)})
    size = (tmp_path / name).stat().st_size // 2
    os.truncate(tmp_path / name, size)  # datasets delivers half of it without a word
    refuse(tmp_path, f"{name} ({size} bytes)", num_classes=1, streaming=streaming)


def test_a_stream_that_breaks_names_the_place(tmp_path):
    samples = {str(i): {"png": encode(photo(i)), "json": b'{"label": 0}'} for i in range(7)}
    write_tar(tmp_path / "a.tar", samples | {"7": {"png": b"x", "json": b"{"}})
    source = load_images(tmp_path, num_classes=1, streaming=True)
    with pytest.raises(ValueError, match="a.tar/6.png: JSONDecodeError"):
        list(source.rows())


def test_columns_of_images(tmp_path):
    encoded = [encode(photo(i)) for i in range(8)]
    path = write_table(tmp_path / "two.parquet", data=encoded, thumbnail=encoded)
    for streaming in (False, True):
        assert contents(load_images(path, image_column="data", streaming=streaming)) == NO_CLASSES
    refuse(path, "['data', 'thumbnail']", "`image_column`")
    refuse(path, "`image_column` 'x'", "['data', 'thumbnail']", image_column="x")
    files = write_folder(tmp_path / "files", {f"{i}.png": data for i, data in enumerate(encoded)})
    names = [str(files / f"{i}.png") for i in range(8)]
    path = write_table(tmp_path / "paths.parquet", file=names, number=list(range(8)))
    refuse(path, "'file'", "'number'", "`image_column`")
    refuse(path, "`image_column` 'number'", "int64", image_column="number")
    source = load_images(path, image_column="file")
    assert contents(source) == NO_CLASSES and next(source.rows()).name == names[0]
    images = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(encoded)]
    source = load_images(write_table(tmp_path / "structs.parquet", image=images))
    assert contents(source) == NO_CLASSES and "structs.parquet (0.png)" in next(source.rows()).name


def test_columns_of_labels(tmp_path):
    path = write_table(tmp_path / "scores.parquet", image=[encode(photo(i)) for i in range(8)], score=[0.5] * 8)
    assert load_images(path).num_classes is None
    refuse(path, "'score'", "0.5", label_column="score")
    refuse(path, "`label_column` 'kind'", "['image', 'score']", label_column="kind")
    refuse(path, "`num_classes`", num_classes=10)
    refuse(path, "`labelled`", "`label_column`", labelled=False, label_column="label")
    names = datasets.ClassLabel(names=list("abcd"))
    columns = {"image": [{"bytes": encode(photo()), "path": None}] * 2, "coarse": [0, 1], "fine": [3, 2]}
    dataset = datasets.Dataset.from_dict(columns, features(coarse=names, fine=names))
    dataset.to_parquet(str(tmp_path / "two.parquet"))
    assert re.search("`label_column`.* coarse .*fine", str(load_images(tmp_path / "two.parquet")))
    source = load_images(tmp_path / "two.parquet", label_column="fine")
    assert source.id2label == {2: "c", 3: "d"} and source.num_classes == 4


def test_labels_that_are_names(tmp_path):
    path = parquet(tmp_path / "names.parquet", ["sky", "earth"] * 4, datasets.Value("string"))
    source = load_images(path)
    assert source.id2label == {0: "earth", 1: "sky"} and [row.label for row in source.rows(0, 3)] == [1, 0, 1]
    refuse(path, "'label'", "`id2label`", streaming=True, num_classes=2)
    mapping = tmp_path / "names.json"
    mapping.write_text(json.dumps({5: "sky", 1: "earth", 3: "sea"}))
    source = load_images(path, id2label=mapping)
    assert source.id2label == {1: "earth", 5: "sky"} and source.num_classes == 6
    source = load_images(path, id2label=mapping, streaming=True)
    assert [row.label for row in source.rows(0, 3)] == [5, 1, 5] and len(source.id2label) == 3
    mapping.write_text(json.dumps({0: "earth"}))
    refuse(path, "`id2label`", "names.json", "['sky']", id2label=mapping)
    with pytest.raises(ValueError, match="'sky' .*'label': .*0 to 0"):
        list(load_images(path, id2label=mapping, streaming=True).rows())


def test_labels_outside_num_classes(tmp_path):
    path = parquet(tmp_path / "a.parquet", list(range(8)), datasets.Value("int64"))
    assert load_images(path).num_classes == 8
    refuse(path, "0 to 7", "`num_classes` 5", "0 to 4", num_classes=5)
    refuse(path, "'label'", "`num_classes` or `id2label`", streaming=True)
    rows = load_images(path, streaming=True, num_classes=5).rows()
    assert [next(rows).label for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="sha256 .* 5 .*'label': .*0 to 4"):
        next(rows)
    path = parquet(tmp_path / "b.parquet", [0, None, 1, 0], datasets.Value("int64"), num_images=4)
    refuse(path, "'label'")
    with pytest.raises(ValueError, match="None .*'label'"):
        list(load_images(path, streaming=True, num_classes=2).rows())
    refuse(parquet(tmp_path / "c.parquet", [-1] * 8, datasets.Value("int64")), "'label'", "-1 to -1")


@pytest.mark.parametrize(
    "text, named",
    [("{", ""), ("[1]", ""), ('{"a": "b"}', "'a'"), ('{"0": 1}', "{0: 1}"), ("{}", "{}"), ('{"0": "earth"}', "[1]")],
)
def test_files_of_names_that_are_wrong(photos_folder, tmp_path, text, named):
    (tmp_path / "names.json").write_text(text)
    refuse(photos_folder, "`id2label`", "names.json", named, id2label=tmp_path / "names.json")


@STREAMED
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_shares_of_processes_are_disjoint_and_complete(photos_folder, streaming, num_processes):
    source = load_images(photos_folder, streaming=streaming)
    for shared in (source, source.shuffled(3)):
        names = [row.name for i in range(num_processes) for row in shared.share(i, num_processes)]
        assert len(names) == 8 == len(set(names))


@STREAMED
def test_shuffled_is_fixed_by_the_seed(photos_folder, streaming):
    def names(source):
        return [row.name for row in source.rows()]

    source = load_images(photos_folder, streaming=streaming)
    assert names(source.shuffled(1)) == names(source.shuffled(1)) != names(source.shuffled(2))
    assert sorted(names(source.shuffled(1))) == sorted(names(source)) != names(source.shuffled(1))
    assert names(source)[2:5] == [row.name for row in source.rows(2, 5)]


@STREAMED
def test_fingerprint_follows_the_data_not_the_place(photos_folder, tmp_path, streaming):
    def fingerprint(folder, **arguments) -> str:
        return load_images(folder, streaming=streaming, **arguments).fingerprint

    first, moved = fingerprint(photos_folder), tmp_path / "moved"
    assert fingerprint(photos_folder) == first != fingerprint(photos_folder, labelled=False)
    assert load_images(photos_folder, streaming=streaming).shuffled(1).fingerprint != first
    photos_folder.rename(moved)
    assert fingerprint(moved) == first
    (moved / "sky" / "1.png").write_bytes(encode(photo(2)))
    assert fingerprint(moved) != first
    (moved / "sky" / "1.png").write_bytes(encode(photo(1)))
    assert fingerprint(moved) == first
    (moved / "sky" / "1.png").rename(moved / "earth" / "1.png")
    assert fingerprint(moved) != first


@pytest.mark.parametrize("lies_in_class", [True, False])
def test_files_that_cannot_be_used_end_nothing(tmp_path, lies_in_class):
    folder = tmp_path / "photos" / "cat" if lies_in_class else tmp_path / "photos"
    write_folder(folder, {f"{i}.png": encode(photo(i)) for i in range(2)})
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    shutil.copy(folder / "0.png", os.fsencode(folder) + b"/caf\xe9.png")
    source = load_images(tmp_path / "photos")
    assert source.num_rows == 3 and r"caf\udce9.png" in str(source) and source.fingerprint
    bad_images = BadImages(tmp_path / "bad_images.jsonl")
    used = list(usable_images(source.rows(), 32, bad_images))
    assert len(used) == 2 and [Path(name).name for name in bad_images.found()] == ["gone.png"]
