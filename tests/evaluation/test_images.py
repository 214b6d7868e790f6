# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of images: folders, .npz files, data sets, tensors."""

import json

import numpy as np
import pytest
import torch
from image_files import encode, photo, truncated_jpeg, write_folder
from metric_inputs import crops, refused

from diffusers_d2it.data.images import to_pixels
from diffusers_d2it.evaluation.images import ImageSet, hash_pixels, open_images, pixel_digest
from diffusers_d2it.sampling import write_npz


def read_all(images: ImageSet, batch_size: int = 5, **kwargs) -> torch.Tensor:
    return torch.cat([batch for _, batch in images.batches(batch_size, **kwargs)])


def digest(*parts: torch.Tensor) -> str:
    """Of images that are counted in parts, each by itself."""
    return pixel_digest(sum(map(len, parts)), sum(map(hash_pixels, parts)))


def as_tensor(*images) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


@pytest.fixture
def folder(tmp_path):
    """Twelve photographs, four of them below, named without leading zeros."""
    names = [f"{i}.png" for i in range(8)] + [f"more/{i}.png" for i in range(8, 12)]
    return write_folder(tmp_path / "images", {name: encode(photo(i)) for i, name in enumerate(names)})


@pytest.fixture
def npz(tmp_path, folder):
    path = tmp_path / "packed.npz"
    images = read_all(open_images(folder)).permute(0, 2, 3, 1).contiguous().numpy()
    write_npz(path, images.shape, [images])
    return path


# ---- What is read ----


def test_a_folder_is_read_in_natural_order_as_it_lies_there(folder):
    images = open_images(folder)
    assert (len(images), images.size, images.name) == (12, (64, 64), "images")
    assert torch.equal(read_all(images), as_tensor(*(photo(i) for i in range(12))))
    write_folder(folder, {"10.png": encode(photo(2)), "notes.txt": b"", ".hidden.png": b""})
    assert torch.equal(open_images(folder)[8], as_tensor(photo(2))[0])  # after 7.png, before more/


def test_an_npz_is_read_like_the_folder(folder, npz, tmp_path):
    expected = read_all(open_images(folder))
    images = open_images(npz)
    assert (len(images), images.size) == (12, (64, 64))
    assert torch.equal(read_all(images), expected)
    (tmp_path / "alone").mkdir()
    npz.rename(tmp_path / "alone" / "images.npz")
    assert torch.equal(read_all(open_images(tmp_path / "alone")), expected)


def test_a_data_set_is_resized_as_in_training(folder):
    images = open_images(folder, resolution=32)
    in_order_of_names = [*range(8), 10, 11, 8, 9]
    pixels = torch.stack([to_pixels(photo(i), 32) for i in in_order_of_names])
    assert images.size == (32, 32)
    assert torch.equal(read_all(images), ((pixels + 1) * 127.5).round().to(torch.uint8))
    assert "bicubic" in images.describe()["preprocessing"]


def test_parquet_is_a_data_set(tmp_path):
    import datasets

    rows = [{"image": {"bytes": encode(photo(i)), "path": None}} for i in range(3)]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(str(tmp_path / "train.parquet"))
    assert torch.equal(read_all(open_images(tmp_path, resolution=64)), as_tensor(*(photo(i) for i in range(3))))
    for path in (tmp_path, tmp_path / "train.parquet"):
        refused("`resolution`", open_images, path)


@pytest.mark.parametrize(
    "kind, num_workers", [("folder", 0), ("npz", 0), ("npz", 2), ("data set", 0), ("data set", 2), ("tensor", 0)]
)
def test_every_image_is_read_once_whatever_the_batches_and_processes(folder, npz, kind, num_workers):
    images = {
        "folder": lambda: open_images(folder),
        "npz": lambda: open_images(npz),
        "data set": lambda: open_images(folder, resolution=64),
        "tensor": lambda: ImageSet.from_tensor(as_tensor(*(photo(i) for i in range(12))), "tensor"),
    }[kind]()
    expected = as_tensor(*(photo(i) for i in range(12)))
    if kind == "data set":  # in the order of its names
        expected = torch.stack([images[i] for i in range(12)])
    for num_processes, batch_size in ((3, 2),) if num_workers else ((1, 5), (3, 2), (4, 5)):
        seen = []
        for process in range(num_processes):
            for indices, batch in images.batches(batch_size, process, num_processes, num_workers):
                assert torch.equal(batch, expected[indices]) and indices[0] // batch_size % num_processes == process
                seen += indices.tolist()
        assert sorted(seen) == list(range(12))


def test_reading_leaves_the_global_generator_alone(folder):
    state = torch.get_rng_state()
    read_all(open_images(folder))
    assert torch.equal(torch.get_rng_state(), state)


def test_digest_is_of_the_pixels_alone(folder, npz):
    images = read_all(open_images(folder))
    shuffled = images[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    expected = digest(images)
    assert expected == digest(read_all(open_images(npz))) == digest(shuffled) == digest(*images.split(5))
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    wider = images.reshape(12, 3, 32, 128)
    others = [changed, images[:11], images[[0, *range(11)]], images.transpose(2, 3), images.flip(1), wider, images[:0]]
    found = {digest(other) for other in others}
    assert len(found) == len(others) and expected not in found


# ---- How samples were drawn ----


def write_protocol(folder, **changes) -> None:
    sampling = {"num_images": 12, "num_inference_steps": 50, "checkpoint": {"weights_sha256": "abc"}}
    protocol = {"version": 1, "complete": True, "sampling": sampling, "environment": {"torch": "2"}, "run": {}}
    (folder / "protocol.json").write_text(json.dumps(protocol | changes))


def test_protocol_of_samples_is_taken_along(folder, npz):
    write_protocol(folder)
    assert open_images(folder).describe() == {
        "name": "images", "num_images": 12, "resolution": [64, 64], "num_inference_steps": 50,
        "checkpoint": {"weights_sha256": "abc"}, "environment": {"torch": "2"},
    }  # fmt: skip
    write_protocol(npz.parent)
    assert "checkpoint" not in open_images(npz).describe()  # of other images that lie in the same folder
    assert "checkpoint" in open_images(npz.rename(npz.parent / "images.npz")).describe()


def test_samples_that_are_not_complete_are_refused(folder):
    write_protocol(folder, complete=False)
    refused("protocol.json.* 12 images.*found 12", open_images, folder)
    write_protocol(folder)
    (folder / "3.png").unlink()
    refused("protocol.json.* 12 images.*found 11", open_images, folder)
    (folder / "protocol.json").write_text("{")
    refused("protocol.json", open_images, folder)


# ---- What is refused ----


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_cannot_be_used_are_named_ten_of_them(folder, num_workers):
    bad = {f"{i}x.png": b"<html>" for i in range(9)} | {
        "cut.jpg": truncated_jpeg(),
        "more/small.png": encode(photo(0, 32)),
    }
    write_folder(folder, bad | {"more/empty.png": b""})
    with pytest.raises(ValueError, match="10 .* 24 images.*: 0x.png") as error:
        read_all(open_images(folder), num_workers=num_workers)
    assert "cut.jpg: " in str(error.value)
    assert "more/small.png" not in str(error.value)
    for name in list(bad)[:10]:
        (folder / name).unlink()
    with pytest.raises(ValueError, match="2 of the 14 .* more/empty.png: .*; more/small.png: .*32x32"):
        read_all(open_images(folder), process_index=0, num_processes=2)


def test_the_first_image_may_be_the_bad_one(tmp_path):
    write_folder(tmp_path, {"a.png": b"", "b.png": encode(photo(0))})
    refused("1 of the 2 images of .*: a.png: ", open_images, tmp_path)


BAD = {"tiny.png": encode(photo(0, 16)), "cut.jpg": truncated_jpeg(), "empty.png": b"", "more/page.png": b"<html>"}


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (5, 0), (64, 0), (5, 1)])
def test_images_of_a_data_set_that_cannot_be_used_are_left_out_as_in_training(folder, batch_size, num_workers, caplog):
    expected = read_all(open_images(folder, resolution=64))
    images = open_images(write_folder(folder, BAD), resolution=64)
    assert torch.equal(read_all(images, batch_size, num_workers=num_workers), expected)
    assert {name.removeprefix(f"{folder}/") for name in images.left_out} == set(BAD)
    assert all(name in caplog.text for name in BAD)
    assert images.describe()["num_images"] == 12 and images.describe()["num_left_out"] == 4


def test_a_set_of_which_nothing_can_be_used_is_an_error(tmp_path):
    images = open_images(write_folder(tmp_path, {"a.png": b"", "b.png": b""}), resolution=64)
    assert list(images.batches(1)) == []
    refused("none of the 2 images .*a.png", images.share_left_out)


# ---- Splits ----


@pytest.mark.parametrize("resolution", [None, 64])
@pytest.mark.parametrize("split, numbers", [(None, [0]), ("train", [0]), ("validation", [1, 2]), ("all", [0, 1, 2])])
def test_the_images_of_a_split_and_no_others_are_read(tmp_path, resolution, split, numbers):
    files = {f"{'train' if i == 0 else 'val'}/{i}.png": encode(photo(i)) for i in range(3)}
    images = open_images(write_folder(tmp_path, files), resolution, split)
    assert torch.equal(read_all(images), as_tensor(*map(photo, numbers)))
    name = {None: "train", "validation": "val", "all": None}.get(split, split)
    assert images.describe().get("split") == name


def test_a_split_of_what_has_none_is_refused(folder, npz, tmp_path):
    for path in (folder, npz, folder / "0.png"):
        refused("`split` 'validation'", open_images, path, split="validation")
    refused("`split` 'validation'", open_images, folder, 64, "validation")
    refused("`image_column`", open_images, folder, image_column="image")
    write_folder(tmp_path / "alone", {"a.npz": npz.read_bytes()})
    refused("`split`", open_images, tmp_path / "alone", split="train")


def test_paths_without_images_are_refused(tmp_path, npz):
    (tmp_path / "empty").mkdir()
    refused("empty.* 0 other files", open_images, tmp_path / "empty")
    refused("empty", open_images, tmp_path / "empty", resolution=32)
    refused("nowhere.*`resolution`", open_images, tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    refused("notes.txt", open_images, tmp_path / "notes.txt")
    refused("nowhere.npz", open_images, tmp_path / "nowhere.npz")
    for name in ("a", "b"):
        write_folder(tmp_path / "two", {f"{name}.npz": npz.read_bytes()})
    refused("two.* 2 .npz files", open_images, tmp_path / "two")


def test_an_npz_of_another_layout_is_refused(tmp_path, npz):
    np.savez(tmp_path / "wrong.npz", np.zeros((2, 3, 8, 8), dtype=np.uint8))
    refused(r"wrong.npz.*`arr_0`.*\(2, 3, 8, 8\)", open_images, tmp_path / "wrong.npz")
    refused("packed.npz.* 64x64.* 32", open_images, npz, resolution=32)


def test_labels_are_as_many_as_the_images():
    for wrong in (torch.zeros(2), torch.zeros(4), torch.zeros(3, 1)):
        refused(r"`labels`.*\(N,\).* 3 images", ImageSet.from_tensor, crops(3, 0), "three", labels=wrong.long())


def test_tensors_that_are_no_images_are_refused():
    for wrong in (crops(2, 0).float(), crops(2, 0)[:, :2], crops(2, 0)[:0], crops(2, 0)[0]):
        refused("`images`.*uint8", ImageSet.from_tensor, wrong, "wrong")
    refused("`batch_size`.*got 0", next, ImageSet.from_tensor(crops(2, 0), "tensor").batches(0))
