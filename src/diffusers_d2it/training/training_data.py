# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a run of the second stage learns from: a latent cache, or images."""

import argparse
import hashlib
import json
from pathlib import Path

from accelerate import Accelerator

from ..data.bad_images import BadImages
from ..data.images import check_resolution
from ..data.latent_cache import LatentCache, describe_vae
from ..data.loaders import ImageDataset, ImageStream, make_dataset
from ..data.source import load_images
from ..models.autoencoder_kl_dynamic import DynamicAutoencoderKL


# A cache was written with all that these decide.
_OF_IMAGES = (
    "train_data_dir dataset_name dataset_config_name streaming image_column label_column num_classes id2label"
    " unconditional".split()
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
        path = args.train_data_dir or args.dataset_name
        if path is None:
            raise ValueError("pass --latent_cache, --train_data_dir or --dataset_name.")
        source = load_images(
            path,
            split=args.split,
            config_name=args.dataset_config_name,
            streaming=args.streaming,
            image_column=args.image_column,
            labelled=not args.unconditional,
            label_column=args.label_column,
            num_classes=args.num_classes,
            id2label=args.id2label,
        )
        accelerator.print(source)
        return make_dataset(accelerator, source, resolution=args.resolution, seed=args.seed, bad_images=bad_images)
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


def identity_of(data: LatentCache | ImageDataset | ImageStream, vae: DynamicAutoencoderKL) -> dict[str, str]:
    """What a run of the second stage must find again when it is resumed: the same data, codes and thresholds."""
    autoencoder = {**describe_vae(vae), "thresholds": [vae.config.calibration, vae.config.grain_ratios]}
    digest = hashlib.sha256(json.dumps(autoencoder, sort_keys=True).encode()).hexdigest()
    return {"data": data.fingerprint, "autoencoder": digest}


def load_autoencoder(path: str, resolution: int) -> DynamicAutoencoderKL:
    """The autoencoder of --vae, frozen.

    Raises:
        ValueError: there is none, or --resolution does not suit its regions.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = f": did you mean {folder / 'vae'}?" if (folder / "vae" / "config.json").is_file() else "."
        raise ValueError(f"--vae {path} holds no config.json{hint}")
    if not folder.exists() and path.count("/") != 1:
        raise ValueError(f"--vae {path} is neither a folder nor a name of the Hub, user/name.")
    vae = DynamicAutoencoderKL.from_pretrained(path).requires_grad_(False).eval()
    check_resolution(resolution, vae.region_size)
    return vae
