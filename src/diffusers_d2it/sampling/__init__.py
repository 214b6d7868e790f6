# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of samples for a metric: what is drawn follows from a plan, whoever draws it, and is drawn on after a stop."""

from .folder import FORMATS, SampleFolder
from .npz import NpzImages, write_npz
from .reference_maps import ReferenceMaps
from .sets import LABEL_SCHEMES, SamplePlan, describe_checkpoint, describe_scheduler, read_protocol


__all__ = [
    "FORMATS",
    "LABEL_SCHEMES",
    "NpzImages",
    "ReferenceMaps",
    "SampleFolder",
    "SamplePlan",
    "describe_checkpoint",
    "describe_scheduler",
    "read_protocol",
    "write_npz",
]
