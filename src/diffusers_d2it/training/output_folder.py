# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: one run at a time, and nothing of an earlier one is overwritten."""

import argparse
from pathlib import Path

from filelock import FileLock, Timeout

from ..saving import sweep
from .checkpoints import found_checkpoints


_LOCK = ".lock"
_LOCK_SECONDS = 4  # the workers of a run that was just killed need a moment to notice


def check_output_dir(args: argparse.Namespace) -> None:
    """Raise a ValueError if --output_dir holds anything and the run is not asked to continue what it holds."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint is None and folder.is_dir():
        held = sorted(path.name for path in folder.iterdir() if path.name != _LOCK)
        if held:
            raise ValueError(
                f"--output_dir {folder} is not empty, it holds {', '.join(held[:5])}: pass another folder, or"
                + (" --resume_from_checkpoint latest to continue." if found_checkpoints(folder) else " remove it.")
            )


def lock_output_dir(args: argparse.Namespace) -> FileLock:
    """Keep other runs out of --output_dir as long as the lock is held, and clear up after one that was killed.

    The operating system lets go of the lock when the process ends, however it ends.

    Raises:
        ValueError: another run works in the folder.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout:
        raise ValueError(f"--output_dir {folder}: another run is working in this folder.") from None
    sweep(folder)
    return lock
