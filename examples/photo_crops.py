# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Cut a small set of real photographs, with classes, out of those that come with scikit-image: nothing is downloaded.

    python examples/photo_crops.py --output_dir photos --resolution 64

For trying the training scripts (`make train-tiny`): square crops of random place and size, a sub-folder for each
photograph. It is no data set to learn anything about images from.
"""

import argparse

from command_line import begin, make_parser, natural, next_command, positive


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="new folder, with a sub-folder for each class")
    parser.add_argument("--resolution", type=positive, default=64, help="side of a crop in pixels after scaling")
    parser.add_argument("--crops", type=positive, default=64, help="crops of each photograph")
    parser.add_argument("--seed", type=natural, default=0, help="fixes places and sizes")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image


PHOTOGRAPHS = {
    "astronaut": skimage.data.astronaut,
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "galaxies": skimage.data.hubble_deep_field,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "retina": skimage.data.retina,
    "rocket": skimage.data.rocket,
    "tissue": skimage.data.immunohistochemistry,
}


def main(args: argparse.Namespace) -> None:
    draw = np.random.default_rng(args.seed)
    for name, load in PHOTOGRAPHS.items():
        photograph = Image.fromarray(load()).convert("RGB")
        folder = Path(args.output_dir) / name
        folder.mkdir(parents=True)
        shorter = min(photograph.size)
        for index in range(args.crops):
            side = int(shorter * draw.uniform(0.6, 1))
            left, top = (int(draw.integers(extent - side + 1)) for extent in photograph.size)
            crop = photograph.crop((left, top, left + side, top + side))
            crop = crop.resize((args.resolution, args.resolution), Image.Resampling.LANCZOS)
            crop.save(folder / f"{index:03d}.png")
    print(f"{args.output_dir}: {len(PHOTOGRAPHS)} folders of crops, one for each photograph")
    print(next_command("train_dvae.py", train_data_dir=args.output_dir, resolution=args.resolution))


if __name__ == "__main__":
    main(ARGS)
