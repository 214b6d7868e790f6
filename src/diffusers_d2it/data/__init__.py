# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From folders, tables, archives and streams, or from codes that were encoded once, to batches in order."""

from .bad_images import BadImages
from .images import UnusableImageError, check_resolution, decode_image, to_pixels
from .latent_cache import LatentCache, LatentCachePlan, read_codes, read_entropy
from .latent_cache_writer import EncodedRows, encode_images, encode_shards, write_latent_cache
from .loaders import (
    ImageDataset,
    ImageStream,
    OrderedLoader,
    StreamLoader,
    batches_from,
    first_batches,
    make_dataset,
    make_loader,
    usable_images,
)
from .source import ImageSource, Row, load_images


__all__ = [
    "BadImages",
    "EncodedRows",
    "ImageDataset",
    "ImageSource",
    "ImageStream",
    "LatentCache",
    "LatentCachePlan",
    "OrderedLoader",
    "Row",
    "StreamLoader",
    "UnusableImageError",
    "batches_from",
    "check_resolution",
    "decode_image",
    "encode_images",
    "encode_shards",
    "first_batches",
    "load_images",
    "make_dataset",
    "make_loader",
    "read_codes",
    "read_entropy",
    "to_pixels",
    "usable_images",
    "write_latent_cache",
]
