# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of samples for a metric: what is drawn follows from a plan, whoever draws it, and is drawn on after a stop."""

from .folder import SampleFolder
from .sets import SamplePlan, describe_checkpoint, describe_scheduler


__all__ = ["SampleFolder", "SamplePlan", "describe_checkpoint", "describe_scheduler"]
