# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint a run goes on from: the one that is asked for, or the last one that is whole."""

import re
import warnings
from pathlib import Path

from accelerate import Accelerator

from ..files import on_main_process, read_json, verify
from ..words import listed


STATE = "state.json"  # of a checkpoint: its step among others
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def found_checkpoints(folder: Path) -> list[Path]:
    """Folders of a run that are named like its checkpoints, oldest first."""
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def find_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, resume_from_checkpoint: str | Path | None
) -> Path | None:
    """The checkpoint that a run goes on from, verified; None if it starts from scratch. All processes call it.

    Args:
        accelerator: the Accelerator.
        output_dir: the folder of the run.
        resume_from_checkpoint: path of a checkpoint, or "latest": that of the highest step in `output_dir` that is
            whole; a warning names those that are not, and where there is none yet the run starts from
            scratch, as with None.

    Raises:
        ValueError: the path is no checkpoint or a damaged one, or none of those that "latest" finds is whole.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        found = on_main_process(accelerator, lambda: _latest(Path(output_dir)))
        if found is None:
            accelerator.print(f"{output_dir} holds no checkpoint yet: the run starts from scratch")
        return found
    path = Path(resume_from_checkpoint)
    if not path.exists() and Path(output_dir, path).is_dir():  # the name alone, as in the scripts of diffusers
        path = Path(output_dir, path)
    return on_main_process(accelerator, lambda: _verified(path))


def _latest(output_dir: Path) -> Path | None:
    damaged = []
    for path in reversed(found_checkpoints(output_dir)):
        try:
            return _verified(path)
        except ValueError as error:
            damaged.append(str(error))
            warnings.warn(f"checkpoint {path} is skipped: {error}", stacklevel=3)
    if damaged:
        raise ValueError(
            f"`resume_from_checkpoint` is 'latest', but no checkpoint in {output_dir} is whole: {' '.join(damaged)}"
        )
    return None


def _verified(checkpoint: Path) -> Path:
    if _CHECKPOINT.fullmatch(checkpoint.name) is None or not checkpoint.is_dir():
        there = [path for folder in (checkpoint, checkpoint.parent) for path in found_checkpoints(folder)]
        hint = f": there are {listed(there)}" if there else ""
        raise ValueError(
            f"`resume_from_checkpoint` must be 'latest' or a folder named checkpoint-<step>, got {checkpoint}{hint}."
        )
    verify(checkpoint)
    step = read_json(checkpoint / STATE).get("step")
    if checkpoint.name != f"checkpoint-{step}":
        raise ValueError(f"{checkpoint} holds the state after step {step}: it was renamed or mixed up.")
    return checkpoint
