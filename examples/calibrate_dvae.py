# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Count the entropy thresholds of a data set (sec. 3.1 of arXiv:2504.09454): any fine ratio from one pass.

    python examples/calibrate_dvae.py --train_data_dir photos --resolution 256 --vae runs/dvae/vae
    python examples/calibrate_dvae.py --dataset_name user/images --streaming --max_images 10000 \
        --resolution 256 --region_size 16 --output calibration.json

The first form writes the result into the configuration of an autoencoder, the second into a file. The images are
resized and cropped as in training, each process counts its share, and nothing is kept but counts. Images that cannot
be used are listed in a file beside the result, `<result>.bad_images.jsonl`.
"""

import argparse
import os

from command_line import begin, make_parser, next_command, output_file, output_folder, positive
from flags import add_data_arguments, image_arguments, where


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data_arguments(parser)
    group = parser.add_argument_group("calibration")
    group.add_argument("--max_images", type=positive, help="stop after so many images")
    group.add_argument("--vae", help="folder of a DynamicAutoencoderKL, whose configuration is completed")
    group.add_argument("--region_size", type=positive, help="with --output: side of a region in pixels")
    group.add_argument("--output", type=output_file, help="with --region_size: JSON file for the result")
    args = parser.parse_args()
    if (args.vae is None) == (args.output is None) or (args.output is None) != (args.region_size is None):
        parser.error("pass either --vae, or --region_size with --output")
    if args.vae is not None and not os.path.isfile(os.path.join(args.vae, "config.json")):
        parser.error(f"--vae {args.vae} must be the folder of an autoencoder, with its config.json")
    if args.vae is not None:
        try:
            output_folder(args.vae)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--vae {error}")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

from pathlib import Path

from accelerate import Accelerator

from diffusers_d2it import DynamicAutoencoderKL
from diffusers_d2it.data import BadImages, load_images
from diffusers_d2it.files import save_folder, write_json_durably
from diffusers_d2it.training import count_entropy
from diffusers_d2it.words import counted


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    vae = None if args.vae is None else DynamicAutoencoderKL.from_pretrained(args.vae)
    region_size = args.region_size if vae is None else vae.region_size
    source = load_images(**image_arguments(args))
    accelerator.print(source)
    bad_images = BadImages(f"{os.path.normpath(args.output or args.vae)}.bad_images.jsonl")
    if accelerator.is_main_process:
        bad_images.path.unlink(missing_ok=True)  # of an earlier count
    accelerator.wait_for_everyone()
    calibration = count_entropy(accelerator, source, args.resolution, region_size, bad_images, args.max_images)
    if not accelerator.is_main_process:
        return
    if bad_images.summary():
        print(bad_images.summary())
    config = calibration.to_config(source.describe(args.resolution))
    path = Path(args.output) if vae is None else Path(args.vae) / "config.json"
    median = config["quantiles"][len(config["quantiles"]) // 2]
    regions, images = counted(config["num_regions"], "region"), counted(config["num_images"], "image")
    by = counted(accelerator.num_processes, "process")
    print(f"{regions} of {images}, counted by {by}, median {median} nats")  # before it is saved, which may fail
    if vae is None:
        write_json_durably(path, config)
    else:
        vae.register_to_config(calibration=config)
        save_folder(args.vae, vae.save_config)  # which replaces this file, and keeps the others
    print(f"{path}: the thresholds")
    if vae is not None:
        print(next_command("cache_latents.py", vae=args.vae, resolution=args.resolution, **where(args)))


if __name__ == "__main__":
    main(ARGS)
