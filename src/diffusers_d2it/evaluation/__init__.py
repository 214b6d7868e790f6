# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Figures of samples, reconstructions and grain maps, each with the protocol that it was measured by."""

from .evaluation import evaluate
from .features import load_features
from .image_sets import open_images


__all__ = ["evaluate", "load_features", "open_images"]
