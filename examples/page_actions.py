# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the tabs of `app.py` do: from a pipeline and what was entered to pictures and words, without a browser.

`*above` is what stands above the tabs: name of the class, seed, steps, guidance.
"""

from collections.abc import Iterator
from queue import Queue
from threading import Event, Thread
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, SchedulerMixin
from PIL import Image, ImageDraw, ImageFont

from diffusers_d2it import (
    D2iTImg2ImgPipeline,
    D2iTInpaintPipeline,
    D2iTPipeline,
    grain_map_from_boxes,
    list_samplers,
    load_sampler,
    visualize_grain_map,
)
from diffusers_d2it.grains import fine_share
from diffusers_d2it.pipelines.calls import turn_of
from diffusers_d2it.pipelines.grain_maps import DRAWN
from diffusers_d2it.pipelines.schedulers import is_flow


SIDE = 384  # pixels of a picture where it is painted on
LARGEST = 1024  # pixels of the longer side of a picture that is edited: a brush has a width in pixels of it
PAINTED = 0.2  # share of a region that strokes must cover
BUDGETS = [0.0, 0.25, 0.5, 1.0]
SURFACES = ["the picture", "an empty grid"]
EDITS = ["fill what is painted", "vary the whole picture"]
ROWS = ["samplers", "budgets"]

# ---------------------------------------------------------------------------------------------------------------------
# Drawing, step by step
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(label: str | None, seed: float | None, num_steps: float, guidance_scale: float) -> dict[str, Any]:
    """Arguments of a call from what stands above the tabs."""
    if seed is None:
        raise ValueError("the seed must be a whole number.")
    return {
        "class_labels": label or None,
        "generator": torch.Generator().manual_seed(int(seed)),
        "num_inference_steps": int(num_steps),
        "guidance_scale": guidance_scale,
    }


def steps_of(pipe: D2iTPipeline, **call: Any) -> Iterator[tuple[Any, float | str]]:
    """A call of a pipeline while it runs: (picture so far, words) a step, at last (output, milliseconds).

    Previews take half of the time at most: a step for which there is none has None for its picture. Calls of several
    people take turns on one model; the time is that of the call, without waiting and previews. One whose reader has
    gone ends at its next step.
    """
    seen, gone, begun, previews = Queue(), Event(), [], []

    def look(pipe: D2iTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> None:
        start = perf_counter()
        pipe._interrupt = gone.is_set()
        is_affordable = sum(previews) <= (start - begun[0]) / 2
        picture = pipe.decode_latents(tensors["latents"][:1])[0] if is_affordable else None
        seen.put((picture, f"step {step + 1} of {pipe.num_timesteps}"))
        previews.append(perf_counter() - start)

    def draw() -> None:
        try:
            with turn_of(pipe.transformer):
                begun.append(perf_counter())
                output = pipe(callback_on_step_end=look, **call)
                seen.put((output, 1000 * (perf_counter() - begun[0] - sum(previews))))
        except Exception as error:  # of this thread, for the one that reads
            seen.put((error, 0.0))

    Thread(target=draw, daemon=True).start()
    try:
        while True:
            picture, said = seen.get()
            if isinstance(picture, Exception):
                raise picture
            yield picture, said
            if not isinstance(said, str):
                return
    finally:
        gone.set()


def cost(pipe: D2iTPipeline, grain_maps: torch.Tensor, milliseconds: float) -> str:
    """The tokens of the maps, the share of fine regions and the time, in words."""
    tokens = sum(pipe.transformer.prepare_grain_map(grain_maps).num_tokens.values()).tolist()
    tokens = ", ".join(map(str, tokens))
    share = fine_share(grain_maps, pipe.transformer.config.num_grains).mean()
    return f"{tokens} tokens, {share:.0%} of the regions fine, {milliseconds:.0f} ms"


def with_map(pipe: D2iTPipeline, **call: Any) -> Iterator[tuple]:
    """A call while it runs: (picture or None, map laid over it or None, words) after every step."""
    for picture, said in steps_of(pipe, **call):
        if isinstance(said, str):
            yield picture, None, said
        else:
            overlay = visualize_grain_map(picture.images[0], picture.grain_maps[0], min_side=SIDE)
            yield picture.images[0], overlay, cost(pipe, picture.grain_maps, said)


def draw(pipe: D2iTPipeline, fine_ratio: float | None, *above: Any) -> Iterator[tuple]:
    """(picture or None, map laid over it or None, words) after every step."""
    yield from with_map(pipe, fine_ratio=fine_ratio, **settings_of(*above))


def draw_budgets(pipe: D2iTPipeline, *above: Any) -> Iterator[tuple]:
    """([(picture, caption)] or None, words): the same noise under every one of `BUDGETS`, then their maps."""
    settings = [settings_of(*above) for _ in BUDGETS]  # a generator each, so that a budget is what `draw` makes of it
    call = {"generator": [one["generator"] for one in settings], "num_images_per_prompt": len(BUDGETS)}
    for picture, said in steps_of(pipe, **settings[0] | call, fine_ratio=BUDGETS):
        if isinstance(said, str):
            yield None if picture is None else [(picture, said)], said
        else:
            overlays = visualize_grain_map(picture.images, picture.grain_maps)
            shown = [(image, f"{ratio:.0%} fine") for image, ratio in zip(picture.images, BUDGETS)]
            shown += [(overlay, f"map, {ratio:.0%} fine") for overlay, ratio in zip(overlays, BUDGETS)]
            yield shown, cost(pipe, picture.grain_maps, said)


# ---------------------------------------------------------------------------------------------------------------------
# Painting
# ---------------------------------------------------------------------------------------------------------------------


def surface_of(picture: Image.Image | None, size: tuple[int, int]) -> Image.Image:
    """What is painted on: a picture or nothing, under the lines of a grid of (h, w) regions."""
    surface = Image.new("RGB", (SIDE, SIDE), "#e8e8e8") if picture is None else picture.resize((SIDE, SIDE))
    pen = ImageDraw.Draw(surface, "RGBA")
    for i in range(1, size[0]):
        pen.line([0, i * SIDE // size[0], SIDE, i * SIDE // size[0]], fill="#00000060")
    for i in range(1, size[1]):
        pen.line([i * SIDE // size[1], 0, i * SIDE // size[1], SIDE], fill="#00000060")
    return surface


def strokes(editor: dict[str, Any] | None) -> np.ndarray | None:
    """What was painted, (H, W, 4) of 8 bits, transparent where nothing was; None without strokes."""
    layers = [layer.convert("RGBA") for layer in (editor or {}).get("layers") or []]
    for layer in layers[1:]:
        layers[0].alpha_composite(layer)
    return np.asarray(layers[0]) if layers and layers[0].getextrema()[3][1] else None


def read_painted(editor: dict[str, Any] | None, boxes: str, pipe: D2iTPipeline) -> torch.Tensor:
    """The map that strokes and boxes say, (h, w): the finest grain where red, 0 where blue, -1 where nothing is.

    Args:
        editor: of `gr.ImageEditor`.
        boxes: one a line, "left top right bottom" in pixels of the image, behind "coarse" where it is so.
        pipe: whose maps are painted.
    """
    size, finest = pipe.grain_map_size(), pipe.transformer.config.num_grains - 1
    held = torch.full(size, DRAWN)
    painted = strokes(editor)
    if painted is not None:
        red, _, blue, opacity = torch.from_numpy(painted.astype(np.float32)).movedim(-1, 0)
        shares = torch.stack([(opacity > 127) & (red <= blue), (opacity > 127) & (red > blue)]).float()
        coarse, fine = torch.nn.functional.adaptive_avg_pool2d(shares, size)
        held = torch.where(coarse + fine >= PAINTED, finest * (fine >= coarse), held)
    for line in filter(str.strip, boxes.splitlines()):
        words = line.replace(",", " ").split()
        grain = words.pop(0) if words[:1] in (["coarse"], ["fine"]) else "fine"
        if not all(word.replace(".", "", 1).isdecimal() for word in words):
            raise ValueError(f"a box must be left, top, right and bottom in pixels, got {line!r}.")
        inside = grain_map_from_boxes([[float(word) for word in words]], size, pipe.image_size(size)) > 0
        held = held.masked_fill(inside, 0 if grain == "coarse" else finest)
    return held


def begin_painting(pipe: D2iTPipeline, surface: str, *above: Any) -> tuple[Image.Image, dict, str]:
    """(what is painted on, what was begun, words): a picture under its own map, or an empty grid."""
    begun = {"above": above, "surface": surface, "image": None, "map": None}
    if surface == SURFACES[0]:
        output = pipe(**settings_of(*above))
        begun |= {"image": output.images[0], "map": output.grain_maps[0].cpu()}
    words = f"{above[0] or 'A picture'}, seed {above[1]:.0f}: paint regions, then redraw."
    return surface_of(begun["image"], pipe.grain_map_size()), begun, words


def paint(pipe: D2iTPipeline, editor: dict | None, boxes: str, begun: dict | None, *above: Any) -> Iterator[tuple]:
    """(picture or None, map laid over it or None, words) after every step, with the seed that was begun with.

    Of a picture what is not painted stays, map and pixels; of an empty grid the grain model draws the map of the rest.
    """
    if begun is None:
        raise ValueError("there is nothing to paint on yet: begin with a picture or an empty grid.")
    if begun["above"] != above:
        raise ValueError("this was begun with another class, seed, steps or guidance: begin anew, or set them back.")
    held, call = read_painted(editor, boxes, pipe), settings_of(*begun["above"])
    if begun["image"] is None:
        call |= {"grain_map": held}
    elif (held == DRAWN).all():
        raise ValueError("nothing is painted: cover a fifth of a region at least, or write a box.")
    else:
        new = Image.fromarray(255 * (held != DRAWN).byte().numpy()).resize(
            begun["image"].size, Image.Resampling.NEAREST
        )
        call |= {"image": begun["image"], "mask_image": new}
        call |= {"grain_map": torch.where(held == DRAWN, begun["map"], held)}
        pipe = knitting(pipe)
    yield from with_map(pipe, **call)


# ---------------------------------------------------------------------------------------------------------------------
# Editing and comparing
# ---------------------------------------------------------------------------------------------------------------------


def knitting(pipe: D2iTPipeline) -> D2iTInpaintPipeline:
    """For parts of pictures, where the model takes it with the scheduler that lets what is new follow what is kept."""
    scheduler = flow(pipe, FlowMatchLCMScheduler) if is_flow(pipe.scheduler) else pipe.scheduler
    return quiet(D2iTInpaintPipeline.from_pipe(pipe, scheduler=scheduler))


def flow(pipe: D2iTPipeline, kind: type[SchedulerMixin]) -> SchedulerMixin:
    """A scheduler of flow matching in the place of a pipeline's."""
    config = pipe.scheduler.config
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return kind(num_train_timesteps=config.num_train_timesteps, shift=shift)


def quiet(pipe: D2iTPipeline) -> D2iTPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reduced(picture: Image.Image) -> tuple[Image.Image, str]:
    """(it, or a smaller one where a brush would be too thin, words) of a picture that was uploaded."""
    smaller = picture.copy()
    smaller.thumbnail((LARGEST, LARGEST))
    if smaller.size == picture.size:
        return picture, "Paint over what is to be new, or vary the whole picture."
    return smaller, (
        f"The picture of {picture.width}x{picture.height} pixels was reduced to {smaller.width}x{smaller.height}."
    )


def edit(pipe: D2iTPipeline, editor: dict | None, how: str, strength: float, *above: Any) -> Iterator[tuple]:
    """(picture or None, words) after every step: what is painted filled, or a variation of the whole."""
    picture = (editor or {}).get("background")
    if picture is None:
        raise ValueError("there is no picture yet: upload one, or take the drawn one.")
    picture, call = picture.convert("RGB"), settings_of(*above)
    if how == EDITS[1]:
        pipe, call = quiet(D2iTImg2ImgPipeline.from_pipe(pipe)), call | {"image": picture, "strength": strength}
    else:
        painted = strokes(editor)
        if painted is None:
            raise ValueError("nothing is painted: paint over what is to be new, or vary the whole picture.")
        mask = Image.fromarray(painted[..., 3]).resize(picture.size)
        is_large = min(picture.size) > min(pipe.image_size(pipe.grain_map_size()))
        box = mask.getbbox() or (0, 0, 0, 0)
        if is_large and max(box[2] - box[0], box[3] - box[1]) > min(picture.size):  # no square part holds it
            raise ValueError("what is painted is longer than the shorter side of the picture: paint less at a time.")
        crop = min(picture.size) // 16 if is_large else None  # pixels around what is new, drawn at the model's size
        call |= {"image": picture, "mask_image": mask, "padding_mask_crop": crop}
        pipe = knitting(pipe)
    for picture, said in steps_of(pipe, **call):
        if isinstance(said, str):
            yield picture, said
        else:
            yield picture.images[0], cost(pipe, picture.grain_maps, said)


def rows_of(pipe: D2iTPipeline, kind: str) -> dict[str, tuple[D2iTPipeline, float | None]]:
    """What the rows of a comparison are called, and the pipeline and the share of fine regions of each."""
    if kind == ROWS[1]:
        return {f"{ratio:.0%} fine": (pipe, ratio) for ratio in BUDGETS} | {"as drawn": (pipe, None)}
    schedulers = {name: load_sampler(name, pipe.scheduler) for name in list_samplers()}
    if is_flow(pipe.scheduler):
        schedulers |= {"Euler": flow(pipe, FlowMatchEulerDiscreteScheduler), "LCM": flow(pipe, FlowMatchLCMScheduler)}
    return {name: (quiet(D2iTPipeline.from_pipe(pipe, scheduler=one)), None) for name, one in schedulers.items()}


def compare(pipe: D2iTPipeline, labels: list[str], kind: str, *above: Any) -> Iterator[tuple]:
    """(labelled grid, words) after every row: one column a class, all of the same noise."""
    if not labels and pipe.labels:
        raise ValueError("choose one class at least.")
    columns, rows, words = labels or [""], {}, []
    for name, (one, fine_ratio) in rows_of(pipe, kind).items():
        call = settings_of(None, *above[1:])
        seeds = [torch.Generator().manual_seed(call["generator"].initial_seed()) for _ in columns]
        start = perf_counter()
        call |= {"class_labels": labels or None, "generator": seeds, "fine_ratio": fine_ratio}
        rows[name] = one(**call).images
        words.append(f"{name} {1000 * (perf_counter() - start):.0f} ms")
        yield draw_grid(columns, rows), ", ".join(words)


def draw_grid(columns: list[str], rows: dict[str, list[Image.Image]], side: int = 160) -> Image.Image:
    """Pictures under the names of their columns, beside those of their rows."""
    font, left, top = ImageFont.load_default(size=15), 110, 28
    grid = Image.new("RGB", (left + side * len(columns), top + side * len(rows)), "white")
    pen = ImageDraw.Draw(grid)
    for i, column in enumerate(columns):
        pen.text((left + side * (i + 0.5), top / 2), column[:20], fill="black", font=font, anchor="mm")
    for j, (name, images) in enumerate(rows.items()):
        pen.text((8, top + side * (j + 0.5)), name, fill="black", font=font, anchor="lm")
        for i, image in enumerate(images):
            grid.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left + side * i, top + side * j))
    return grid
