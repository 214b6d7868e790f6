# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Make a D2iTContentModel of the weights of a DiT: a starting point for fine-tuning.

    python examples/convert_dit.py --source DiT-XL-2-256x256.pt --output runs/dit-xl
    python examples/convert_dit.py --source DiT-XL-2-256 --frequency_shift 0 --output runs/dit-xl

The source is a checkpoint of the original DiT (.pt), or a local folder of diffusers' DiTTransformer2DModel or
DiTPipeline. With an all-fine map the result computes what the source computes. Beside the model, conversion.json says
what became of every weight.
"""

import argparse
import os
from pathlib import Path

from command_line import begin, make_parser, natural, next_command, number, output_folder, positive


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help=".pt file of the original DiT, or diffusers folder")
    parser.add_argument("--output", type=output_folder, required=True, help="new folder of the model")
    parser.add_argument(
        "--num_refine_layers", type=positive, help="blocks of each RefineNet; default: a sixth of the DiT"
    )
    parser.add_argument("--num_grains", type=number(int, 2), default=2, help="k; the DiT has patch size 2 ** (k - 1)")
    parser.add_argument("--window_size", type=positive, default=4, help="side of RefineNet's windows in tokens")
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
    if args.source.is_dir() and args.num_attention_heads is not None:
        parser.error("--num_attention_heads is read from the configuration of a folder.")
    if args.source.is_file() and args.frequency_shift is not None:
        parser.error("--frequency_shift is for folders of diffusers; the original DiT has 0.")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import torch

from diffusers_d2it.conversion import convert_diffusers_dit, convert_dit_checkpoint, save_converted


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    options = {key: getattr(args, key) for key in ("num_refine_layers", "num_grains", "window_size")}
    if args.source.is_file():
        model, report = convert_dit_checkpoint(args.source, num_attention_heads=args.num_attention_heads, **options)
    else:
        shift = 1.0 if args.frequency_shift is None else args.frequency_shift
        model, report = convert_diffusers_dit(args.source, frequency_shift=shift, **options)
    print(report)
    save_converted(model, report, args.output)
    print(f"{args.output}: {model.num_parameters() / 1e6:.1f}M parameters")
    print(next_command("train_d2it.py", init_from=args.output))


if __name__ == "__main__":
    main(ARGS)
