# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a folder holds after it was saved to. Kills and failing disks: tests/faults/test_interrupted_saves.py"""

import errno
import fcntl
import json
import os
import re
import stat
from pathlib import Path

import pytest

from diffusers_d2it.files import folders
from diffusers_d2it.files.folders import MANIFEST, save_folder, settle, sweep, verify, write_json_durably


def writer(files: dict[str, str]):
    """What `save_folder` calls: writes files by relative path."""

    def write(folder: str) -> None:
        for name, text in files.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_text(text)

    return write


def contents(folder: Path) -> dict[str, str]:
    """Texts of all files but the manifest, by relative path."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


@pytest.mark.parametrize("state", ["missing", "empty", "with other files"])
def test_a_folder_holds_what_was_saved_and_what_was_beside_it(tmp_path, state):
    folder = tmp_path / "deep" / "model"
    others = {"notes.txt": "mine", "part/old.txt": "mine"} if state == "with other files" else {}
    if state != "missing":
        folder.mkdir(parents=True)
        writer(others)(folder)
    files = {"config.json": "{}", "part/weights.safetensors": "1"}
    save_folder(folder, writer(files))
    verify(folder)
    assert contents(folder) == files | others
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert listed.keys() == files.keys()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_current_directory_and_a_link_can_be_saved_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_folder(".", writer({"a": "1"}))
    assert Path("a").read_text() == "1"
    (tmp_path / "elsewhere").mkdir()
    Path("link").symlink_to("elsewhere", target_is_directory=True)
    save_folder("link", writer({"b": "2"}))
    assert Path("link").is_symlink() and contents(tmp_path / "elsewhere") == {"b": "2"}


STEM = "diffusion_pytorch_model"
TWO = {f"{STEM}-0000{i}-of-00002.safetensors": str(i) for i in (1, 2)} | {f"{STEM}.safetensors.index.json": "{}"}
THREE = {f"{STEM}-0000{i}-of-00003.safetensors": str(i) for i in (1, 2, 3)} | {f"{STEM}.safetensors.index.json": "{}"}
ONE = {f"{STEM}.safetensors": "1"}
HALF = {f"{STEM}.fp16-0000{i}-of-00002.safetensors": str(i) for i in (1, 2)}
HALF |= {f"{STEM}.safetensors.index.fp16.json": "{}"}


@pytest.mark.parametrize("old", [ONE, TWO, THREE], ids=["one", "two", "three"])
@pytest.mark.parametrize("new", [ONE, TWO, THREE], ids=["one", "two", "three"])
def test_weights_of_an_earlier_save_do_not_stay_beside_the_new_ones(tmp_path, old, new):
    for files in (HALF, old, new):
        save_folder(tmp_path, writer(files))
    assert contents(tmp_path) == HALF | new  # of another variant they do
    verify(tmp_path)
    (tmp_path / next(iter(HALF))).write_text("x")
    with pytest.raises(ValueError, match="fp16-00001-of-00002"):
        verify(tmp_path)


def test_an_error_leaves_what_was_there(tmp_path):
    save_folder(tmp_path / "model", writer({"a": "1"}))

    def fail(folder: str) -> None:
        writer({"a": "2", "b": "2"})(folder)
        raise RuntimeError("in the middle")

    for folder in (tmp_path / "model", tmp_path / "new"):
        with pytest.raises(RuntimeError, match="in the middle"):
            save_folder(folder, fail)
    verify(tmp_path / "model")
    assert contents(tmp_path) == {"model/a": "1"}


def test_every_file_is_forced_to_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """What a kill does not show, a power cut would."""
    happened = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(file: int) -> None:
        happened.append(("fsync", os.fstat(file).st_ino))
        real["fsync"](file)

    def noted(name: str):
        def move(source, target, **options) -> None:
            paths = [Path(source), *Path(source).rglob("*")]
            happened.append(("rename", {path.stat().st_ino for path in paths if path.is_file() or path.is_dir()}))
            real[name](source, target, **options)
            happened.append(("parent", Path(target).parent.stat().st_ino))

        return move

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    files = writer({"config.json": "{}", "part/weights.safetensors": "1"})
    num_moves = 0
    for save in (
        lambda: save_folder(tmp_path / "model", files),
        lambda: save_folder(tmp_path / "model", files),  # over it
        lambda: write_json_durably(tmp_path / "calibration.json", {}),
    ):
        happened.clear()
        save()
        for i, (what, moved) in enumerate(happened):
            if what == "rename":
                num_moves += 1
                before = {number for what, number in happened[:i] if what == "fsync"}
                assert moved <= before, "renamed before it was on the disk"
                assert ("fsync", happened[i + 1][1]) in happened[i + 1 :], "the new name was not forced to the disk"
    assert num_moves >= 6


def test_modes_follow_the_umask(tmp_path):
    def write_private(folder: str) -> None:
        os.close(os.open(Path(folder, "weights.safetensors"), os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(0o022)
    try:
        save_folder(tmp_path / "model", write_private)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()} == {0o644}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755


def test_what_a_living_process_writes_is_not_swept_away(tmp_path, disk_that_locks):
    with folders.staging_folder(tmp_path / "model") as mine:
        (tmp_path / ".staging-model-01234567").mkdir()
        (tmp_path / ".trash-model-01234567").mkdir()
        (tmp_path / ".old-other-01234567").mkdir()
        sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {mine.name, "other"}


def test_what_a_killed_process_left_of_a_name_is_cleared_up_whatever_the_name(tmp_path):
    for name in ("model[1]", "model*"):
        left = tmp_path / f".staging-{name}-01234567"
        left.mkdir()
        sweep(tmp_path, f"{name}-")
        assert not left.exists()


@pytest.fixture(params=["folders and files", "files alone"])
def disk_that_locks(request, monkeypatch) -> None:
    """What a disk can lock: NFS refuses to lock what cannot be opened for writing."""
    if request.param == "files alone":
        real = fcntl.flock

        def flock(file: int, operation: int) -> None:
            if stat.S_ISDIR(os.fstat(file).st_mode):
                raise OSError(errno.EBADF, "injected: no lock of a folder")
            real(file, operation)

        monkeypatch.setattr(fcntl, "flock", flock)


def test_two_cannot_save_to_one_folder_at_once(tmp_path, disk_that_locks):
    folder = tmp_path / "model"
    save_folder(folder, writer({"a": "1"}))

    def save_again(path: str) -> None:
        with pytest.raises(ValueError, match=str(folder)):
            save_folder(folder, writer({"a": "2"}))
        with pytest.raises(ValueError, match=str(folder)):
            folders.lock(folder, wait=0)
        writer({"a": "3"})(path)

    save_folder(folder, save_again)
    write_json_durably(tmp_path / "calibration.json", {})
    verify(folder)
    assert (folder / "a").read_text() == "3"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "calibration.json"}
    assert {path.name for path in folder.iterdir()} - {folders.LOCK} == {"a", MANIFEST}
    with folders.lock(folder), pytest.raises(ValueError, match=str(folder)):
        save_folder(folder, writer({"a": "4"}))


def test_a_disk_that_locks_nothing_can_be_saved_to(tmp_path, monkeypatch):
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "injected: no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    for text in "12":
        save_folder(tmp_path / "model", writer({"a": text}))
        verify(tmp_path / "model")
        assert (tmp_path / "model" / "a").read_text() == text


def test_links_are_not_sealed(tmp_path):
    with pytest.raises(ValueError, match="passwd"):
        save_folder(tmp_path / "model", lambda folder: Path(folder, "passwd").symlink_to("/etc/passwd"))


RECORD = {"bytes": 4, "sha256": ""}


@pytest.mark.parametrize(
    "entry, value, named",
    [
        *(("files", {name: RECORD}, name) for name in ("../x", "/etc/passwd", "a/../../x", "\x1b[31mred")),
        *(("stale", [name], name) for name in ("../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors")),
        *(("stale", [name], name) for name in ("\x1b[31mred.safetensors", "notes.txt", "sub", MANIFEST)),
        *(
            ("pending", name, name)
            for name in ("../x", "/etc/passwd", ".", "", "sub", ".staging-a/..", ".staging-a/b")
        ),
        *(("pending", value, value) for value in (None, 3, [".staging-files-01234567"])),
        *(("stale", value, value) for value in (None, 5, "notes.txt", [5], {})),
        *(("files", value, None) for value in (None, [], {"a": 3}, {"a": {"bytes": 4}})),
    ],
)
def test_a_manifest_of_somebody_else_moves_and_removes_nothing(tmp_path, entry, value, named):
    """It comes with a folder, and whoever wrote it can compute its SHA-256."""
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    for path in (tmp_path / "x", model / "notes.txt", model / "sub" / "notes.txt"):
        path.write_text("mine")
    manifest = {"version": 1, "files": {}, "stale": [], "pending": ".staging-files-01234567"} | {entry: value}
    (model / MANIFEST).write_text(json.dumps({**manifest, "sha256": folders.digest(manifest)}))
    before = everything_in(tmp_path)
    for call in (verify, settle):
        with pytest.raises(ValueError, match=MANIFEST if named is None else re.escape(repr(named))):
            call(model)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("link", [".staging-files-01234567", "sub"])
def test_a_link_leads_an_unfinished_save_nowhere(tmp_path, link):
    """Neither files of somewhere else into the folder, nor its own over files of somewhere else."""
    model, home = tmp_path / "model", tmp_path / "home"
    staged = model / ".staging-files-01234567" / "sub" / "key"
    for path in (home / "sub" / "key", home / "key", *([staged] if link == "sub" else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    model.mkdir(exist_ok=True)
    (model / link).symlink_to(home, target_is_directory=True)
    manifest = {"version": 1, "files": {"sub/key": RECORD}, "stale": [], "pending": ".staging-files-01234567"}
    (model / MANIFEST).write_text(json.dumps({**manifest, "sha256": folders.digest(manifest)}))
    before = everything_in(tmp_path)
    with pytest.raises(ValueError, match=link):
        settle(model)
    assert everything_in(tmp_path) == before


def everything_in(folder: Path) -> dict[str, str | None]:
    return {str(path): path.read_text() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "pipe.json", tmp_path / "folder.json"):
        with pytest.raises(OSError, match=path.name):
            write_json_durably(path, {})
    assert (tmp_path / "pipe.json").is_fifo() and (tmp_path / "folder.json").is_dir()
