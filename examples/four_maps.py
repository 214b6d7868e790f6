# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The idea in one picture: one class and one seed under four grain maps, and the image under each.

    python examples/four_maps.py --output four_maps.png

Red regions are fine (four codes), blue ones coarse (one code): all coarse, 30 % fine, as the grain model draws them,
and painted by hand. The noise is the same in all four.
"""

import argparse

from command_line import begin, make_parser, natural, picture_file


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=picture_file, default="four_maps.png", help="where to write the picture")
    parser.add_argument("--checkpoint", help="folder or Hub name of a pipeline; default: the bundled one")
    parser.add_argument("--class_label", default="monarch", help="name of the class")
    parser.add_argument("--seed", type=natural, default=3, help="another seed draws another image")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_d2it import D2iTPipeline, bundled_checkpoint, visualize_grain_map


SIDE = 192  # pixels of a picture; the samples of the bundled checkpoint have 64
LABEL = 24  # pixels of the line above them
GAP = 8


def painted_map(rows: int, columns: int) -> torch.Tensor:
    """A fine disc on coarse ground, (rows, columns)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    return (x**2 + y**2 < 0.65).long()


def main(args: argparse.Namespace) -> None:
    pipe = D2iTPipeline.from_pretrained(args.checkpoint or bundled_checkpoint())
    regions = pipe.transformer.config.sample_size // pipe.transformer.patch_size
    maps = {
        'grain_map="coarse"': {"grain_map": "coarse"},
        "fine_ratio=0.3": {"fine_ratio": 0.3},
        "predicted": {},
        "painted": {"grain_map": painted_map(regions, regions)},
    }
    sheet = Image.new("RGB", (len(maps) * (SIDE + GAP) - GAP, LABEL + 2 * SIDE + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    blank = Image.new("RGB", (SIDE // regions * regions,) * 2, "white")
    for i, (name, arguments) in enumerate(maps.items()):
        generator = torch.Generator().manual_seed(args.seed)
        output = pipe(args.class_label, generator=generator, **arguments)
        left = i * (SIDE + GAP)
        pen.text((left + 2, 2), name, fill="black", font=font)
        grain_map = visualize_grain_map(blank, output.grain_maps[0], min_side=1).resize(
            (SIDE, SIDE), Image.Resampling.NEAREST
        )
        image = output.images[0].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(grain_map, (left, LABEL))
        sheet.paste(image, (left, LABEL + SIDE + GAP))
    sheet.save(args.output)
    print(f"{args.output}: {args.class_label} under {len(maps)} grain maps (red fine, blue coarse)")


if __name__ == "__main__":
    main(ARGS)
