# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Whatever happens while something is saved: the version before it or the new one is there, whole."""

import os
import random
import shutil
import time
from functools import partial

import pytest
from injection import Disk, die, in_child, io_error, limited_file_size
from script_runs import join_threads
from ways_of_saving import WAYS, Mixed, SaveCache, SaveCheckpoint, Way


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request, tmp_path, make_pipeline) -> Way:
    """A way of saving in an empty folder, with nothing saved yet."""
    return request.param(tmp_path, make_pipeline())


def leftovers(way: Way) -> list[str]:
    return [name for _, folders, files in os.walk(way.folder) for name in folders + files if name.startswith(".")]


def check(way: Way, count, what: object, new: int, *others: int) -> None:
    """After a fault: the new version or another is there, and the next save succeeds and clears up."""
    way.start_again()
    try:
        found = way.saved()
    except Mixed as error:
        count.tried(f"{what}: {error}", silent=True)
        return
    except Exception as error:
        count.tried(f"{what}: {type(error).__name__}: {error}", lost=True)
        return
    lost = not (isinstance(way, SaveCache) or found in (new, *others))
    way.save(new + 1)
    if not isinstance(way, SaveCache):
        lost |= way.saved() != new + 1
    left = leftovers(way)
    count.tried(f"{what}: found {found}, expected {new} or {others}; left over {left}", lost=lost or bool(left))
    if isinstance(way, SaveCache):
        fresh_cache(way)


def prepare(way: Way) -> None:
    """A first version, and a first look at it: what follows takes no longer than it does later."""
    if not isinstance(way, SaveCache):
        way.save(1)
        assert way.saved() == 1


def number_of_calls(way: Way, version: int) -> int:
    disk = Disk()
    read, write = os.pipe()

    def save() -> None:
        with disk.active():
            way.save(version)
        os.write(write, str(disk.num_calls).encode())

    assert in_child(save) == 0
    os.close(write)
    with os.fdopen(read) as pipe:
        return int(pipe.read())


def save_failing(way: Way, version: int, at: int, fail) -> None:
    with Disk(at, fail).active():
        way.save(version)


def chosen(num_calls: int, most: int) -> list[int]:
    """Numbers of calls, spread evenly if there are more than may be tried."""
    if num_calls <= most:
        return [*range(num_calls)]
    return sorted({round(i * (num_calls - 1) / (most - 1)) for i in range(most)})


@pytest.mark.parametrize("fail", [die, io_error], ids=["kill -9", "OSError"])
def test_a_fault_at_every_call_that_changes_the_disk(way, fail, fault, repeats):
    count = fault(f"{'kill -9' if fail is die else 'OSError'} at every write, fsync, rename: {type(way).__name__}")
    prepare(way)
    old = 1
    for at in chosen(number_of_calls(way, old + 1), repeats(12, 10_000)):
        status = in_child(partial(save_failing, way, old + 1, at, fail))
        if status == 0:  # the standard library forgives some errors, of a folder that is there already: it was saved
            check(way, count, f"call {at}, no error", old + 1)
        else:
            assert status == (-9 if fail is die else 1)
            check(way, count, f"call {at}", old + 1, old)
        old += 2


def test_kills_at_random_moments(way, fault, repeats):
    count = fault(f"kill -9 at a random moment: {type(way).__name__}")
    prepare(way)
    start = time.perf_counter()
    assert in_child(partial(way.save, 2)) == 0
    duration = time.perf_counter() - start
    if isinstance(way, SaveCache):
        fresh_cache(way)  # it was whole
    generator, old = random.Random(0), 2
    for trial in range(repeats(8, 200)):
        in_child(partial(way.save, old + 1), kill_after=generator.uniform(0, 1.2 * duration))
        check(way, count, f"trial {trial}", old + 1, old)
        old += 2


def test_a_full_disk(way, fault, repeats):
    count = fault(f"disk full: {type(way).__name__}")
    prepare(way)
    generator, old = random.Random(1), 1
    largest = max((path.stat().st_size for path in way.folder.rglob("*.*") if path.is_file()), default=2000)
    for _ in range(repeats(3, 30)):
        size = generator.randrange(1, min(largest, 12_000))  # some file of every version is larger

        def save(size: int = size, version: int = old + 1) -> None:
            with limited_file_size(size):
                way.save(version)

        assert in_child(save) == 1, f"files of at most {size} bytes, and nobody noticed"
        check(way, count, f"files of at most {size} bytes", old + 1, old)
        old += 2


def fresh_cache(way: SaveCache) -> None:
    shutil.rmtree(way.folder / "cache")


def test_a_checkpoint_that_cannot_be_written_is_told_at_the_next_chance(tmp_path, make_pipeline, fault):
    count = fault("disk full while the training goes on: told, and the checkpoint before is there")
    way = SaveCheckpoint(tmp_path, make_pipeline())
    way.save(1)
    for ask in (way.checkpoints.finish, partial(way.checkpoints.save, 3)):
        with limited_file_size(4000):
            way.checkpoints.save(2)
            join_threads()
        count.tried("it is known", silent=not way.checkpoints.failed)
        with pytest.raises(OSError, match="checkpoint-2"):
            ask()
        count.tried("afterwards", lost=[path.name for path in tmp_path.iterdir()] != ["checkpoint-1"])
    way.save(4)
    count.tried("the next", lost=way.saved() != 4)


def test_rotation_keeps_what_is_whole(tmp_path, make_pipeline, fault):
    """With one checkpoint kept, the old one goes only after the new one stands."""
    count = fault("newest checkpoint damaged, one kept")
    way = SaveCheckpoint(tmp_path, make_pipeline())
    way.save(1)
    way.save(2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    (tmp_path / "checkpoint-9").mkdir()  # of a higher step, and not whole: it must not push out the new one
    way.save(3)
    count.tried(lost=way.saved() != 3)
