# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The folder of a run: one run at a time, and nothing of an earlier one is overwritten."""

import argparse
from pathlib import Path

from .checkpoints import found_checkpoints


def check_output_dir(args: argparse.Namespace) -> None:
    """Raise a ValueError if --output_dir holds anything and the run is not asked to continue what it holds."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint is None and folder.is_dir():
        held = sorted(path.name for path in folder.iterdir())
        if held:
            raise ValueError(
                f"--output_dir {folder} is not empty, it holds {', '.join(held[:5])}: pass another folder, or"
                + (" --resume_from_checkpoint latest to continue." if found_checkpoints(folder) else " remove it.")
            )
