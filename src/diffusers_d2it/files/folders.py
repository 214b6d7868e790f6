# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How anything is saved: written aside, forced to the disk, sealed by a manifest, and only then put in its place.

A folder that was saved here is sealed by `manifest.json`: size and SHA-256 of each of its files, those in sub-folders
included. Files that are not listed are not looked at: a card or a note may lie beside what was saved.

A new folder appears by one rename. One that exists keeps what else is in it, so its files are replaced one by one; the
manifest that says what they will be, and where the new ones lie until then, is written first. Killed before that, the
folder holds the old files, killed after it, `settle` finishes what is left: at no time are old and new ones mixed
unnoticed.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict


try:
    import fcntl
except ImportError:  # Windows has neither these locks nor a sync of folders
    fcntl = None


MANIFEST = "manifest.json"
STAGING = ".staging-"
TRASH = ".trash-"
OLD = ".old-"
LOCK = ".lock"  # only where a disk locks no folders

MAX_JSON = 2**24  # bytes
_MAX_BRACKETS = 100_000  # lists and objects in a JSON file: more take seconds to read
_VERSION = 1
_ID_LENGTH = 8
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")


class Record(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def save_folder(folder: str | os.PathLike, save: Callable[[str], object]) -> None:
    """Let `save(path)` fill a folder aside, and put it in its place whole or not at all.

    A folder that exists keeps the files that `save` does not write, except shards of weights that it writes anew:
    another number of shards, or none, replaces all of them.

    Args:
        folder: what is to be saved; its parent is made if need be.
        save: called with the path of an empty folder on the same disk.

    Raises:
        OSError: the disk is full or failed. What was in the folder is still there.
        ValueError: the folder is a file, another process is saving to it, its manifest is damaged or somebody else's,
            or `save` has made a link.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, or nothing yet: it is a file.")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent, f"{folder.name}-")
        with staging_folder(folder) as staging:
            save(str(staging))
            seal(staging)
            replace_folder(staging, folder)
        return
    if is_sealed(folder):
        settle(folder)
    with _owned(folder) as free:
        if not free:
            raise ValueError(f"another process is saving to {folder}.")
        sweep(folder)
        # Inside: a folder that exists may be a disk of its own, and nothing can be renamed across its edge
        with staging_folder(folder / "files") as staging:
            save(str(staging))
            seal(staging)
        _commit_inside(staging, folder)


def seal(
    folder: Path, paths: Iterable[Path] | None = None, written: Mapping[Path, Record] = MappingProxyType({})
) -> None:
    """Force files of a folder to the disk, and write the manifest that lists them, last.

    Args:
        folder: what is sealed.
        paths: the files in it that count, such as manifests of what was sealed by itself; None for all.
        written: records of those that are on the disk already; they are not read again.

    Raises:
        OSError: the disk is full or failed.
        ValueError: all files count, and one of them is a link.
    """
    # That of any new file, as the folder is new: safetensors makes files readable by their owner alone
    mode = folder.stat().st_mode & 0o666
    files = {}
    for path in _files_of(folder) if paths is None else paths:
        path.chmod(mode)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        record = written.get(path) or {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        files[path.relative_to(folder).as_posix()] = record
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            fsync_folder(path)
    _write_manifest(folder, {"version": _VERSION, "files": files})


def is_sealed(folder: str | os.PathLike) -> bool:
    """Whether a folder has a manifest, so that `verify` can tell whether it is whole."""
    return Path(folder, MANIFEST).is_file()


def verify(folder: str | os.PathLike) -> None:
    """Check a sealed folder against its manifest; a save into it that was interrupted is finished first.

    Raises:
        ValueError: there is no manifest, it is damaged, or a file is missing or damaged; the file is named.
    """
    folder = Path(folder)
    for name, record in settle(folder)["files"].items():
        check_file(folder / name, record)


def lock(folder: str | os.PathLike, *, wait: float = 4.0) -> ExitStack:
    """Keep other runs, and saves, out of a folder, which is made if need be, and clear up after one that was killed.

    Args:
        folder: where this run works.
        wait: seconds to try for: the workers of a run that was just killed hold its lock until they notice.

    Returns:
        What holds the lock: a context, or to be closed; kept, it holds until the process ends, however it ends.

    Raises:
        ValueError: the folder is a file, or another run works in it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, or nothing yet: it is a file.")
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait
    while True:
        with ExitStack() as stack:
            if stack.enter_context(_owned(folder)):
                sweep(folder)
                return stack.pop_all()
        if time.monotonic() > end:
            raise ValueError(f"another run is working in {folder}.")
        time.sleep(0.05)


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, without what locks and unfinished saves leave there; nothing where there is none."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [name for name in names if not name.startswith((STAGING, LOCK))]


def settle(folder: Path) -> dict:
    """Finish a save into a sealed folder, if the process that saved was killed in the middle of it.

    Returns:
        The manifest.

    Raises:
        ValueError: the manifest is missing or damaged.
        OSError: the folder cannot be written.
    """
    manifest = _read_manifest(folder)
    if "pending" in manifest:
        with _owned(folder) as dead:
            if dead and "pending" in (manifest := _read_manifest(folder)):  # read again: somebody may have finished it
                _move_pending(folder / manifest["pending"], folder, manifest)
    return manifest


def sweep(folder: Path, name: str = "") -> None:
    """Clear up after killed processes that saved in a folder; what a living one works on stays.

    What was half-written or half-removed goes, what was to be replaced comes back unless the new one is there: of all
    files and folders, or of that whose name, with a hyphen behind it, is `name`.
    """
    name = glob.escape(name)
    for path in sorted(folder.glob(f"{OLD}{name}*")):
        current = path.with_name(path.name[len(OLD) : -_ID_LENGTH - 1])
        if not current.exists():
            path.rename(current)
    for prefix in (STAGING, TRASH, OLD):
        for path in sorted(folder.glob(f"{prefix}{name}*")):
            with _owned(path) as dead:
                pass
            if dead:  # removed once its lock is let go, as NFS keeps names of open files, and perhaps by others too
                with suppress(FileNotFoundError):
                    shutil.rmtree(path)


def replace_folder(staging: Path, folder: Path) -> None:
    """Put a sealed folder in the place of one beside it, which may be there or not; `sweep` finishes it if killed."""
    old = _aside(folder, OLD)
    replaced = folder.exists()
    if replaced:
        folder.rename(old)
    staging.rename(folder)
    fsync_folder(folder.parent)
    if replaced:
        shutil.rmtree(old)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is at no time there in part under its name."""
    trash = _aside(folder, TRASH)
    folder.rename(trash)
    shutil.rmtree(trash)


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked as long as this process works in it, removed if that fails."""
    staging = _aside(path, STAGING)
    staging.mkdir()
    try:
        with _owned(staging):
            yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # the error that led here is the one to be seen
        raise


def _aside(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex[:_ID_LENGTH]}")


@contextmanager
def _owned(folder: Path) -> Iterator[bool]:
    """Lock a folder; False if another process holds it. The lock of a process ends with it, however it ends.

    Where a disk locks no folders (NFS), a file inside takes the lock; where it locks nothing, as under Windows, nobody
    is kept out.
    """
    if fcntl is None or not folder.is_dir():
        yield True
        return
    is_free = True
    with ExitStack() as opened:
        for path, flags in ((folder, os.O_RDONLY), (folder / LOCK, os.O_RDWR | os.O_CREAT)):
            file = os.open(path, flags, 0o666)
            _held.add(file)
            opened.callback(_let_go, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):  # any other: this disk locks nothing of this kind
                    is_free = False
                    break
        yield is_free


def _let_go(file: int) -> None:
    if file in _held:  # a forked process has left it to its parent
        _held.remove(file)
        os.close(file)


def _leave_to_parent() -> None:
    """A forked process, such as a worker that decodes images, holds no lock: it may outlive the one that does."""
    for file in list(_held):
        _let_go(file)


_held: set[int] = set()  # open files with locks
if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_to_parent)


def _commit_inside(staging: Path, folder: Path) -> None:
    """Replace the files of a folder by those of a sealed staging folder inside it."""
    new = _read_manifest(staging)["files"]
    series = {series_of(name) for name in new}
    old = _read_manifest(folder)["files"] if is_sealed(folder) else {}
    kept = {name: record for name, record in old.items() if name not in new and series_of(name) not in series}
    parents = {(folder / name).parent for name in new}
    around = [path for parent in sorted(parents) if parent.is_dir() for path in sorted(parent.iterdir())]
    others = {path.relative_to(folder).as_posix() for path in around if path.is_file()} - new.keys()
    # Of a sub-folder that was saved by itself before, the manifest does not hold any more
    stale = sorted(name for name in others if series_of(name) in series or name.endswith(f"/{MANIFEST}"))
    manifest = {"version": _VERSION, "files": {**kept, **new}, "pending": staging.name, "stale": stale}
    _write_manifest(folder, manifest)  # from here on the new files count
    _move_pending(staging, folder, manifest)


def _move_pending(staging: Path, folder: Path, manifest: dict) -> None:
    for name in manifest["files"]:
        if (staging / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(folder / name)
    for name in manifest["stale"]:
        (folder / name).unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in manifest["files"]}:
        fsync_folder(parent)
    _write_manifest(folder, {key: manifest[key] for key in ("version", "files")})
    shutil.rmtree(staging, ignore_errors=True)


def series_of(name: str) -> object:
    """Equal for files of one set of weights: whole, in shards, or the index of the shards; variants differ."""
    if ".safetensors" not in name:
        return name
    return frozenset(_SHARD.sub("", name).split(".")) - {"index", "json"}


def _files_of(folder: Path) -> Iterator[Path]:
    """All files of a folder and its sub-folders."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link: a folder is sealed with what it holds, not with what lies elsewhere.")
        if path.is_file() and path.name != LOCK:
            yield path


def _write_manifest(folder: Path, manifest: dict) -> None:
    write_json_durably(folder / MANIFEST, {**manifest, "sha256": digest(manifest)})


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.pop("sha256", None) != digest(manifest):
        raise ValueError(f"{path} is damaged: its contents do not have the SHA-256 that it states.")
    if manifest.get("version") != _VERSION:
        raise ValueError(f"{path} must be of version {_VERSION}, got {manifest.get('version')!r}.")
    files = manifest.get("files")
    records = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(record, dict) and record.keys() == {"bytes", "sha256"} for record in records):
        raise ValueError(f"{path} is damaged: it does not list files with their sizes and hashes.")
    for name in files:
        if os.path.isabs(name) or ".." in Path(name).parts or not name.isprintable():
            raise ValueError(f"{path} must name files of its folder, got {name!r}.")
    if "pending" in manifest:
        _check_pending(folder, manifest)
    return manifest


def _check_pending(folder: Path, manifest: dict) -> None:
    """Raise a ValueError unless what is left of a save is what `_commit_inside` leaves.

    The manifest may have come with a folder of somebody else's: finishing the save moves and removes files.
    """
    path, pending, stale = folder / MANIFEST, manifest["pending"], manifest.get("stale")
    if not (isinstance(pending, str) and pending.startswith(STAGING) and Path(pending).name == pending):
        raise ValueError(f"`pending` of {path} must name the folder of an unfinished save, got {pending!r}.")
    if not (isinstance(stale, list) and all(isinstance(name, str) and _may_be_stale(name) for name in stale)):
        raise ValueError(f"`stale` of {path} must name weights and manifests of its folder, got {stale!r}.")
    for inside in [folder / pending, *((folder / name).parent for name in (*manifest["files"], *stale))]:
        if not inside.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{inside} must lie in its folder for what {path} says of it: it is a link elsewhere.")


def _may_be_stale(name: str) -> bool:
    is_inside = not os.path.isabs(name) and ".." not in Path(name).parts and name.isprintable()
    return is_inside and (".safetensors" in name or name.endswith(f"/{MANIFEST}"))


@contextmanager
def durable_file(path: Path) -> Iterator[Path]:
    """A path aside to write a file to, which is then forced to the disk and put at `path`.

    Raises:
        OSError: the disk is full or failed, or there is something else than a file. What was at `path` is still there.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file, and would be replaced by one.")
    sweep(path.parent, f"{path.name}-")
    with staging_folder(path) as staging:
        staged = staging / path.name
        yield staged
        staged.chmod(staging.stat().st_mode & 0o666)
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        staged.replace(path)
    shutil.rmtree(staging)
    fsync_folder(path.parent)


def write_json_durably(path: Path, values: dict) -> None:
    """Write values into a JSON file by way of a `durable_file`; a ValueError for numbers that JSON does not have."""
    with durable_file(path) as staged:
        staged.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def fsync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        MissingFileError: it is missing.
        ValueError: it is something else, or larger than any that is written here.
    """
    check_is_file(path)
    if (num_bytes := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"{path} has {num_bytes} bytes, at most {MAX_JSON} are read.")
    content = path.read_bytes()
    if (found := content.count(b"[") + content.count(b"{")) > _MAX_BRACKETS:
        raise ValueError(f"{path} holds {found} lists and objects, at most {_MAX_BRACKETS} are read.")
    try:
        stored = json.loads(content.decode("utf-8-sig"))  # as editors of Windows write it
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(stored).__name__}.")
    return stored


class MissingFileError(OSError, ValueError):
    """A file that is not there: an OSError, as diffusers raises, and a ValueError, as of all that cannot be loaded."""


def check_is_file(path: Path) -> None:
    """Raise a MissingFileError unless there is a file."""
    if not path.is_file():
        raise MissingFileError(f"{path} is missing.")


def check_file(path: Path, *records: dict, contents: bool = True) -> None:
    """Raise a ValueError unless a file fits one of the {"bytes", "sha256"} that manifests say of it.

    With `contents=False` the sizes alone are compared.
    """
    check_is_file(path)
    size = path.stat().st_size
    fitting = [record["sha256"] for record in records if record["bytes"] == size]
    if not fitting:
        raise ValueError(f"{path} is damaged: it has {size} bytes instead of {records[0]['bytes']}.")
    if contents and (found := file_sha256(path)) not in fitting:
        raise ValueError(f"{path} is damaged or another file: its SHA-256 is {found} instead of {fitting[0]}.")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, a piece at a time."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(2**18))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(piece):
            digest.update(piece[:length])
    return digest.hexdigest()


def digest(values: dict) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
