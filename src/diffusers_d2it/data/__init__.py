# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From folders, tables, archives and streams, or from codes that were encoded once, to batches in order."""

from .bad_images import BadImages
from .source import ImageSource, load_images


__all__ = ["BadImages", "ImageSource", "load_images"]
