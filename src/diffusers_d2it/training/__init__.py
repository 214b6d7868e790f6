# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share: accelerator, checkpoints, log, stopping. Their loops stand in the scripts."""

from .checkpoints import Checkpoints, find_checkpoint


__all__ = ["Checkpoints", "find_checkpoint"]
