# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Make a DCDiTModel of public weights: of DC-DiT as its authors released it, or of a DiT to be trained on.

    python examples/convert_dcdit.py --source DC-DiT-B.pt --output runs/dcdit-b
    python examples/convert_dcdit.py --source DiT-XL-2-256x256.pt --upcycle --output runs/dcdit-xl
    python examples/convert_dcdit.py --source DiT-XL-2-256 --upcycle --frequency_shift 0 --output runs/dcdit-xl

The source is a checkpoint of the release (.pt), and the result computes what it computes. With --upcycle it is one of
the original DiT, or a local folder of diffusers' DiTTransformer2DModel or DiTPipeline: the result has its blocks and
embedders, and all else is new. Beside the model, conversion.json says what became of every weight.
"""

import argparse
import os
from pathlib import Path

from command_line import begin, make_parser, natural, output_folder, positive


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help=".pt file, or with --upcycle diffusers folder")
    parser.add_argument("--output", type=output_folder, required=True, help="new folder of the model")
    parser.add_argument("--upcycle", action="store_true", help="the source is a DiT, of which the blocks are taken")
    parser.add_argument("--num_attention_heads", type=positive, help=".pt only: for a width other than S, B, L and XL")
    parser.add_argument(
        "--frequency_shift", type=float, help="folder only: 1 computes what diffusers does (default), 0 the original"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of what the DiT does not have")
    args = parser.parse_args()
    if not args.source.exists():
        parser.error(f"--source {args.source} does not exist; download it first.")
    if os.listdir(args.output):
        parser.error(f"--output {args.output} is not empty.")
    if not args.upcycle and (args.source.is_dir() or args.frequency_shift is not None):
        parser.error("a folder of diffusers and its --frequency_shift are for --upcycle.")
    if args.source.is_dir() and args.num_attention_heads is not None:
        parser.error("--num_attention_heads is read from the configuration of a folder.")
    if args.source.is_file() and args.frequency_shift is not None:
        parser.error("--frequency_shift is for folders of diffusers; the original DiT has 0.")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import torch

from diffusers_d2it.conversion import convert_dcdit_checkpoint, save_converted, upcycle_dit


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    options = {"num_attention_heads": args.num_attention_heads}
    if args.upcycle:
        model, report = upcycle_dit(args.source, frequency_shift=args.frequency_shift, **options)
    else:
        model, report = convert_dcdit_checkpoint(args.source, **options)
    print(report)
    save_converted(model, report, args.output)
    print(f"{args.output}: {model.num_parameters() / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main(ARGS)
