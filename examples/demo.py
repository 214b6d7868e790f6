# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Draw a labelled grid of samples with their grain maps from the checkpoint that comes with the package.

    python examples/demo.py --output demo.png

Red regions are fine (four codes), blue ones coarse (one code).
"""

import argparse

from command_line import begin, make_parser, natural, picture_file, positive, weight


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=picture_file, default="demo.png", help="where to write the picture")
    parser.add_argument("--checkpoint", help="folder or Hub name of a pipeline; default: the bundled one")
    parser.add_argument("--class_labels", nargs="+", help="class names; default: all that the checkpoint knows")
    parser.add_argument("--num_inference_steps", type=positive, default=20, help="denoising steps")
    parser.add_argument("--guidance_scale", type=weight, default=5.0, help="classifier-free guidance")
    parser.add_argument("--seed", type=natural, default=0, help="another seed draws other images")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_d2it import D2iTPipeline, bundled_checkpoint, visualize_grain_map
from diffusers_d2it.words import counted


SIDE = 128  # pixels of a picture in the grid; the samples have 64
LABEL = 18  # pixels of the line with its name
COLUMNS = 5
BAR = "{desc}{n_fmt} of {total_fmt} steps, {rate_inv_fmt}"


def draw_grid(names: list[str], images: list[Image.Image], maps: list[Image.Image]) -> Image.Image:
    """Each image beside its map, under its name."""
    font = ImageFont.load_default(size=12)
    rows = -(-len(images) // COLUMNS)
    grid = Image.new("RGB", (COLUMNS * (2 * SIDE + 8), rows * (SIDE + LABEL)), "white")
    pen = ImageDraw.Draw(grid)
    for i, (name, image, grain_map) in enumerate(zip(names, images, maps)):
        left, top = i % COLUMNS * (2 * SIDE + 8), i // COLUMNS * (SIDE + LABEL)
        pen.text((left + 4, top + 2), name, fill="black", font=font)
        grid.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top + LABEL))
        grid.paste(grain_map.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left + SIDE, top + LABEL))
    return grid


def main(args: argparse.Namespace) -> None:
    pipe = D2iTPipeline.from_pretrained(args.checkpoint or bundled_checkpoint())
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(bar_format=BAR, unit="step")
    names = args.class_labels or list((pipe.id2label or {}).values())
    generator = torch.Generator().manual_seed(args.seed)
    number = len(names) or 2 * COLUMNS  # an unconditional model has no names to draw
    print(f"drawing {counted(number, 'picture')} at once on {pipe.device}: first their grain maps, then the steps")
    output = pipe(
        names or None,
        num_images_per_prompt=number // max(1, len(names)),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=generator,
    )
    maps = visualize_grain_map(output.images, output.grain_maps, min_side=1)
    names = names or [f"sample {i + 1}" for i in range(len(maps))]
    draw_grid(names, output.images, maps).save(args.output)
    print(f"{args.output}: {counted(len(maps), 'sample')}, each beside its grain map (red fine, blue coarse)")
    print("next: make page, on which you paint the map, in your browser")


if __name__ == "__main__":
    main(ARGS)
