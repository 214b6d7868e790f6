# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Make a DynamicAutoencoderKL of the weights of an AutoencoderKL: a starting point for stage 1.

    python examples/convert_autoencoder_kl.py --source sd-vae-ft-ema --output runs/dvae-start

The source is a local folder of diffusers' AutoencoderKL, or of a pipeline that has one. The fine path of the result
is the source; the coarse path is new and needs training. Beside the model, conversion.json says what became of every
weight.
"""

import argparse
import os
from pathlib import Path

from command_line import begin, make_parser, natural, next_command, output_folder


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="folder of an AutoencoderKL or of a pipeline")
    parser.add_argument("--output", type=output_folder, required=True, help="new folder of the model")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="JSON file of calibrate_dvae.py --output; default: that of dvae-f8f16 for regions of 16 px, else none",
    )
    parser.add_argument("--seed", type=natural, default=0, help="of what the AutoencoderKL does not have")
    args = parser.parse_args()
    if not args.source.is_dir():
        parser.error(f"--source {args.source} is not a folder; download it first.")
    if os.listdir(args.output):
        parser.error(f"--output {args.output} is not empty.")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds


import torch

from diffusers_d2it.conversion import convert_autoencoder_kl, save_converted
from diffusers_d2it.files import read_json


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    calibration = None if args.calibration is None else read_json(args.calibration)
    model, report = convert_autoencoder_kl(args.source, calibration=calibration)
    print(report)
    save_converted(model, report, args.output)
    print(f"{args.output}: {model.num_parameters() / 1e6:.1f}M parameters")
    print(next_command("train_dvae.py", init_from=args.output))


if __name__ == "__main__":
    main(ARGS)
