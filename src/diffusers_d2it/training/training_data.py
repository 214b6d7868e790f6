# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a run of the second stage learns from: a latent cache, or images."""

import argparse

from accelerate import Accelerator

from ..data.bad_images import BadImages
from ..data.latent_cache import LatentCache
from ..data.loaders import ImageDataset, ImageStream, make_dataset
from ..data.sources import load_images
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL


# A cache was written with all that these decide.
_OF_IMAGES = (
    "train_data_dir",
    "dataset_name",
    "label_column",
    "num_classes",
    "id2label",
    "unconditional",
    "streaming",
)


def load_training_data(
    accelerator: Accelerator,
    args: argparse.Namespace,
    vae: DynamicAutoencoderKL,
    bad_images: BadImages,
    moments: bool = True,
) -> LatentCache | ImageDataset | ImageStream:
    """The latent cache or the images of the training flags, for `make_loader`; prints what was found.

    Args:
        accelerator: its processes share the verification of a cache and the parts of a stream.
        args: data, class and training flags.
        vae: the autoencoder that the latents are for.
        bad_images: notes what cannot be used.
        moments: False reads entropy and labels of a cache alone: the grain model needs no more.

    Raises:
        ValueError: a cache is combined with flags about images, or what `LatentCache` and `load_images` raise.
    """
    if args.latent_cache is None:
        source = load_images(args)
        accelerator.print(source)
        return make_dataset(accelerator, source, args, bad_images)
    given = [flag for flag in _OF_IMAGES if getattr(args, flag)]
    if given:
        raise ValueError(f"--latent_cache holds images and labels already: it does not go with --{given[0]}.")
    cache = LatentCache(
        args.latent_cache,
        vae,
        seed=args.seed,
        resolution=args.resolution,
        moments=moments,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    classes = "no classes" if cache.id2label is None else f"{len(cache.id2label)} classes"
    accelerator.print(f"latent cache of {cache.description}: {len(cache)} images, {classes}")
    return cache
