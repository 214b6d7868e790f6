# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From folders, tables, archives and streams, or from codes that were encoded once, to batches in order."""

from .bad_images import BadImages
from .images import check_resolution
from .latent_cache import LatentCache, LatentCachePlan, describe_vae, read_codes, read_entropy
from .latent_cache_writer import LatentCacheWriter, encode_shards
from .loaders import ImageDataset, ImageStream, StreamLoader, first_batches, make_dataset, make_loader
from .source import ImageSource, load_images


__all__ = [
    "BadImages",
    "ImageDataset",
    "ImageSource",
    "ImageStream",
    "LatentCache",
    "LatentCachePlan",
    "LatentCacheWriter",
    "StreamLoader",
    "check_resolution",
    "describe_vae",
    "encode_shards",
    "first_batches",
    "load_images",
    "make_dataset",
    "make_loader",
    "read_codes",
    "read_entropy",
]
