# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A photograph, its entropy, and at several budgets its map, what an autoencoder gives back, and from how many codes.

    python examples/reconstruct.py --images cat.jpg coffee.png --output budgets.jpg

Red regions are fine (four codes), blue ones coarse (one code). Photographs are resized and cropped as in training.
"""

import argparse

from command_line import begin, make_parser, picture_file, share


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--images", nargs="+", required=True, metavar="FILE", help="photographs, a row of each")
    parser.add_argument("--output", type=picture_file, default="budgets.jpg", help="where to write the picture")
    parser.add_argument("--checkpoint", help="folder or Hub name of a pipeline; default: the bundled imagenette-128")
    parser.add_argument("--fine_ratios", type=share, nargs="+", default=[0.0, 0.3, 0.6, 1.0], help="a column of each")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_d2it import D2iTPipeline, bundled_checkpoint, visualize_grain_map
from diffusers_d2it.data import decode_image, to_pixels
from diffusers_d2it.pipelines.pictures import to_pil
from diffusers_d2it.words import counted


LINE = 20  # pixels of the line above the columns, and of that under each row
GAP = 4


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    pipe = D2iTPipeline.from_pretrained(args.checkpoint or bundled_checkpoint("imagenette-128"))
    vae, side = pipe.vae, pipe.vae.config.sample_size
    names = ["photograph", "entropy"]
    names += [f"{name} {ratio:g}" for ratio in args.fine_ratios for name in ("map,", "fine ratio")]
    step = side + GAP
    sheet = Image.new("RGB", (len(names) * step - GAP, LINE + len(args.images) * (step + LINE) - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for column, name in enumerate(names):
        pen.text((column * step + 2, 2), name, fill="black", font=font)
    for row, path in enumerate(args.images):
        pixels, top = to_pixels(decode_image({"path": path}), side), LINE + row * (step + LINE)
        entropy = vae.region_entropy(pixels[None]).expand(3, -1, -1)
        low, high = entropy.aminmax()
        shade = (2 * (entropy - low) / (high - low).clamp(min=1e-6) - 1).clamp(-1, 1)  # white has most
        shown = [(to_pil(pixels), ""), (to_pil(shade), "")]
        for ratio in args.fine_ratios:
            encoded = vae.encode(pixels[None], fine_ratio=ratio)
            reconstruction = vae.decode(encoded.latent_dist.mode()).sample[0]
            grain_map = encoded.grain_map[0]
            codes = f"{(4**grain_map).sum()} of {4 ** (vae.num_grains - 1) * grain_map.numel()} codes"
            shown += [(visualize_grain_map(shown[0][0], grain_map, min_side=1), ""), (to_pil(reconstruction), codes)]
        for column, (picture, words) in enumerate(shown):
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (column * step, top))
            pen.text((column * step + 2, top + side + 1), words, fill="black", font=font)
    sheet.save(args.output, quality=90)
    print(
        f"{args.output}: {counted(len(args.images), 'photograph')} at {counted(len(args.fine_ratios), 'fine ratio')}"
    )


if __name__ == "__main__":
    main(ARGS)
