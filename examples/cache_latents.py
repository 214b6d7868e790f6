# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Encode a data set once, so that the second stage trains without the autoencoder's encoder.

    python examples/cache_latents.py --train_data_dir photos --vae runs/dvae/vae --resolution 256 \
        --output_dir cache

The cache holds posteriors, not samples, of every grain and of each image and its mirror: training still draws noise,
flip and fine ratio at every step. An interrupted run is continued by the same command, on any number of processes.
ImageNet at 256x256 with four latent channels takes 42 KB an image, 54 GB in 313 shards. An AutoencoderKL has one grain
and no entropy, which takes 33 KB.
"""

import argparse

from command_line import begin, make_parser, next_command, output_folder, positive
from flags import add_class_arguments, add_data_arguments, image_arguments


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data_arguments(parser)
    add_class_arguments(parser)
    group = parser.add_argument_group("cache")
    group.add_argument("--vae", required=True, help="folder or Hub name of a DynamicAutoencoderKL or an AutoencoderKL")
    group.add_argument(
        "--output_dir",
        type=output_folder,
        required=True,
        help="the cache: a new folder, or that of an interrupted run",
    )
    group.add_argument("--no_flip", action="store_true", help="leave out the mirrored images: half the size, no flips")
    group.add_argument(
        "--encode_batch_size", type=positive, default=32, help="images encoded at once, without mirrors"
    )
    group.add_argument("--rows_per_shard", type=positive, default=4096, help="images of a file")
    args = parser.parse_args(arguments)
    if args.streaming:
        parser.error("--streaming: a cache is written from rows by their index, which a stream does not have")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

from datetime import timedelta
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from diffusers_d2it.data import LatentCachePlan, encode_shards, load_images, write_latent_cache
from diffusers_d2it.models import LatentCodec
from diffusers_d2it.training import load_autoencoder
from diffusers_d2it.words import counted


def main(args: argparse.Namespace) -> None:
    # Processes wait at the end for the slowest one, as long as it takes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    # Encoded once and read in every epoch: in full float32, and with the same bits again after an interruption.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True

    source = load_images(**image_arguments(args))
    codec = LatentCodec(load_autoencoder(args.vae, args.resolution).to(accelerator.device))
    plan = LatentCachePlan(
        **codec.describe(),
        resolution=args.resolution,
        flips=not args.no_flip,
        source=source.describe(args.resolution),
        data_fingerprint=source.fingerprint,
        num_rows=source.num_rows,
        rows_per_shard=args.rows_per_shard,
        num_classes=source.num_classes,
        id2label=source.id2label,
    )
    accelerator.print(source)
    encode = partial(
        encode_shards,
        codec,
        source,
        plan,
        batch_size=args.encode_batch_size,
        num_workers=args.dataloader_num_workers,
        progress=accelerator.is_main_process,
    )
    bad_images = write_latent_cache(args.output_dir, plan, accelerator, encode)
    if accelerator.is_main_process:
        print(
            f"{args.output_dir}: {counted(plan.num_rows - len(bad_images), 'image')} in"
            f" {counted(plan.num_shards, 'shard')}, written by {counted(accelerator.num_processes, 'process')}"
        )
        if bad_images:
            print(f"{counted(len(bad_images), 'image')} left out, with the reasons in bad_images.json of the shards")
        following = "train_grain.py" if codec.has_grains else "train_dcdit.py"
        print(next_command(following, latent_cache=args.output_dir, vae=args.vae, resolution=args.resolution))


if __name__ == "__main__":
    main(ARGS)
