# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Are completed maps as coherent as drawn ones, in-painted photographs what they were, and seams invisible?

    python reproduction/editing.py --data imagenette --checkpoint src/diffusers_d2it/checkpoints/imagenette-128

- Maps of validation photographs; maps drawn for their classes; maps of the photographs of which the right half, or the
  centre, is drawn given the rest: how often neighbouring regions are equal, and how many regions differ from all their
  neighbours, in the whole map and across the edge of what is drawn.
- Validation photographs whose centre, half of the area, is drawn anew for their class: how often a classifier that
  trained nothing here names the class, for the photographs, their reconstructions and the in-painted ones. A picture
  of the first.
- The gradient across the edge of masks, against that of the photographs at the same places and everywhere.
- Seconds: an edit of strength 0.5 against a whole call, drawing a map given its half against drawing one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchLCMScheduler
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw
from report import RESULTS
from study import write_json

from diffusers_d2it import (
    D2iTImg2ImgPipeline,
    D2iTInpaintPipeline,
    D2iTPipeline,
    load_features,
    open_images,
    sample_grain_map,
)
from diffusers_d2it.evaluation.scores import classifies
from diffusers_d2it.pixels import from_uint8, unit_to_uint8


BATCH = 50
REPEATS = 31  # of timings, the two sides interleaved
SHOWN = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a pipeline")
    parser.add_argument(
        "--data", required=True, help="folder with a split validation, whose labels are ids of ImageNet"
    )
    parser.add_argument("--num_maps", type=int, default=500)
    parser.add_argument("--num_images", type=int, default=100, help="that are in-painted")
    parser.add_argument("--num_seams", type=int, default=20, help="photographs for seams")
    parser.add_argument("--picture", type=Path, help="where to write the picture of in-painted photographs")
    parser.add_argument("--part", choices=["maps", "judge", "seams", "seconds"], nargs="+", help="default: all")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    pipe = D2iTPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    photos = open_images(args.data, pipe.trained_side, "validation")
    file = RESULTS / f"editing-{Path(args.checkpoint).name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    parts = {
        "maps": lambda: coherence(pipe, photos, args.num_maps),
        "judge": lambda: judge(pipe, photos, args.num_images, args.picture),
        "seams": lambda: seams(pipe, photos, args.num_seams),
        "seconds": lambda: seconds(pipe, photos),
    }
    for name in args.part or parts:
        found[name] = parts[name]()
        print(name, json.dumps(found[name], indent=1), flush=True)
        write_json(file, found)


# ---- Maps ----


def coherence(pipe: D2iTPipeline, photos, number: int) -> dict[str, dict[str, float]]:
    chosen = _spread(len(photos), number)
    pixels, labels = torch.stack([photos[i] for i in chosen]), photos.labels[chosen]
    real = torch.cat([pipe.grain_map_from_image(part) for part in pixels.split(BATCH)])
    drawn = _draw_maps(pipe, labels, torch.full_like(real, -1))
    right = torch.zeros(real.shape[1:], dtype=torch.bool)
    right[:, right.shape[1] // 2 :] = True
    found = {}
    for name, mask in {"right half": right, "centre": centre_mask(real.shape[1])}.items():
        maps = {
            "real": real,
            "drawn": drawn,
            "completed": _draw_maps(pipe, labels, real.masked_fill(mask, -1)),
            "unrelated": torch.where(mask, drawn, real),  # what no knowledge of the rest gives
        }
        found[name] = {one: _coherence(values, mask) for one, values in maps.items()}
    return found


def _draw_maps(pipe: D2iTPipeline, labels: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    generator, size = torch.Generator().manual_seed(0), tuple(held.shape[1:])
    parts = []
    for ids, part in zip(labels.split(BATCH), held.split(BATCH)):
        around = None if (part == -1).all() else part
        options = {"generator": generator, "held": around}
        parts.append(sample_grain_map(pipe.grain_model, pipe.grain_scheduler, size, ids, len(part), **options))
    return torch.cat(parts)


def _coherence(maps: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """Means over maps, each with its standard error; the edge is that of a mask (h, w)."""
    edge = torch.cat([mask.float().diff(dim=dim).flatten() != 0 for dim in (1, 0)])
    beside, below = maps[:, :, 1:] == maps[:, :, :-1], maps[:, 1:] == maps[:, :-1]
    equal = torch.cat([beside.flatten(1), below.flatten(1)], 1).float().mean(1)
    lonely = torch.ones_like(maps, dtype=torch.bool)
    lonely[:, :, 1:] &= ~beside
    lonely[:, :, :-1] &= ~beside
    lonely[:, 1:] &= ~below
    lonely[:, :-1] &= ~below
    measured = {
        "fine share": maps.float().mean((1, 2)),
        "equal neighbours": equal,
        "isolated regions": lonely.float().mean((1, 2)),
        "equal across the edge": torch.cat([beside.flatten(1), below.flatten(1)], 1)[:, edge].float().mean(1),
    }
    found = {}
    for name, values in measured.items():
        found[name] = values.mean().item()
        found[f"{name}, standard error"] = (values.std() / len(values) ** 0.5).item()
    return found


# ---- In-painting ----


def centre_mask(side: int, area: float = 0.5) -> torch.Tensor:
    inner = round(side * area**0.5)
    start = (side - inner) // 2
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[start : start + inner, start : start + inner] = True
    return mask


def judge(pipe: D2iTPipeline, photos, number: int, picture: Path | None) -> dict[str, float]:
    inpaint, edit = D2iTInpaintPipeline.from_pipe(pipe), D2iTImg2ImgPipeline.from_pipe(pipe)
    fresh = D2iTInpaintPipeline.from_pipe(pipe, scheduler=FlowMatchLCMScheduler.from_config(pipe.scheduler.config))
    for one in (inpaint, fresh, edit):
        one.set_progress_bar_config(disable=True)
    chosen = _spread(len(photos), number)
    pixels, labels = torch.stack([photos[i] for i in chosen]), photos.labels[chosen]
    mask = centre_mask(pixels.shape[-1])
    sets = {"photographs": pixels, "reconstructions": [], "in-painted": [], "in-painted, FlowMatchLCM": []}
    for part, ids in zip(pixels.split(BATCH), labels.split(BATCH)):
        options = {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}
        sets["reconstructions"].append(edit(ids, part, 0.0, **options).images)
        sets["in-painted"].append(inpaint(ids, part, mask, **options).images)
        sets["in-painted, FlowMatchLCM"].append(fresh(ids, part, mask, **options).images)
    sets = {name: unit_to_uint8(torch.cat(one)) if isinstance(one, list) else one for name, one in sets.items()}
    extract, classes = load_features("efficientnet-lite2"), photos.labels.unique()
    found: dict[str, float] = {"images": number, "share of the area that is new": mask.float().mean().item()}
    for name, images in sets.items():
        logits = torch.cat([extract(part)["imagenet"] for part in images.split(BATCH)]).cpu()
        found[f"top-1, {name}"] = classifies(logits, labels, classes).float().mean().item()
    if picture is not None:
        spread = _spread(number, SHOWN)
        _show(pixels[spread], mask, sets["in-painted, FlowMatchLCM"][spread], picture)
    return found


def _show(photographs: torch.Tensor, mask: torch.Tensor, painted: torch.Tensor, file: Path) -> None:
    """Photographs with what is masked in grey, above what was drawn there."""
    side, shown = photographs.shape[-1], []
    for row in range(0, len(photographs), 8):
        masked = torch.where(mask, torch.tensor(128, dtype=torch.uint8), photographs[row : row + 8])
        shown += [*masked, *painted[row : row + 8]]
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in shown]
    make_image_grid(pictures, rows=len(shown) // 8, cols=8, resize=max(side, 128)).save(file, quality=88)


# ---- Seams ----


def seams(pipe: D2iTPipeline, photos, number: int) -> dict[str, float]:
    inpaint = D2iTInpaintPipeline.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    chosen = _spread(len(photos), number)
    pixels, labels = torch.stack([photos[i] for i in chosen]), photos.labels[chosen]
    side = pixels.shape[-1]
    ellipse = Image.new("1", (side, side))
    ImageDraw.Draw(ellipse).ellipse([side * 0.3, side * 0.2, side * 0.75, side * 0.7], fill=1)
    bar = Image.new("1", (side, side))
    ImageDraw.Draw(bar).line([0, side * 0.4, side, side * 0.7], fill=1, width=max(side // 24, 2))
    found: dict[str, float] = {"photographs": number}
    for name, mask in {"ellipse": ellipse, "centre": None, "narrow bar": bar}.items():
        mask = centre_mask(side) if mask is None else torch.from_numpy(np.array(mask))
        options = {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}
        images = unit_to_uint8(inpaint(labels, pixels, mask, **options).images)
        for what, values in (("in-painted", images), ("photographs there", pixels)):
            found[f"{name}: gradient across the edge, {what}"] = _across(values, mask)
    everywhere = [from_uint8(pixels).diff(dim=dim).abs().mean().item() / 2 for dim in (2, 3)]
    found["gradient of the photographs everywhere"] = statistics.mean(everywhere)
    return found


def _across(images: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean difference, in units of the whole range, of neighbouring pixels of which one is masked."""
    values = from_uint8(images) / 2
    total = [(values.diff(dim=dim).abs() * mask.float().diff(dim=dim - 2).abs()).sum() for dim in (2, 3)]
    pairs = [mask.float().diff(dim=dim).abs().sum() * values.shape[0] * values.shape[1] for dim in (0, 1)]
    return (sum(total) / sum(pairs)).item()


# ---- Seconds ----


def seconds(pipe: D2iTPipeline, photos) -> dict[str, float]:
    edit = D2iTImg2ImgPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    label, photo = int(photos.labels[0]), photos[0]
    size = pipe.grain_map_size()
    held = torch.full(size, -1)
    held[:, : size[1] // 2] = 1
    guided = {"guidance_interval": (0.0, 1.0), "output_type": "latent"}  # as many passes in every step

    def draw(grain_map: torch.Tensor) -> Callable[[], object]:
        return lambda: _draw_maps(pipe, torch.tensor([label]), grain_map[None])

    pairs = {
        "strength 0.5 / whole": (
            lambda: edit(label, photo, 0.5, **guided),
            lambda: edit(label, photo, 1.0, **guided),
        ),
        "map given its half / map": (draw(held), draw(torch.full(size, -1))),
    }
    found = {}
    for name, sides in pairs.items():
        times = [[], []]
        for repeat in range(REPEATS + 1):
            for side, call in enumerate(sides):
                start = time.perf_counter()
                call()
                if repeat:  # the first is to warm up
                    times[side].append(time.perf_counter() - start)
        found[name] = statistics.median(a / b for a, b in zip(*times))
        found[f"{name}, seconds"] = [statistics.median(side) for side in times]
    return found


def _spread(total: int, number: int) -> list[int]:
    """Places that lie evenly among all, so that all classes are met."""
    return [i * total // number for i in range(number)]


if __name__ == "__main__":
    main()
