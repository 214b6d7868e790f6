# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A page on which people draw, paint the grain map, edit pictures and compare, in their browser.

    pip install -c constraints.txt -e ".[demo]"
    python examples/app.py

What a tab does is a function from the pipeline and what was entered to pictures and words; `make_page` lays them out.
"""

import argparse

from command_line import begin, make_parser, number


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", help="folder or Hub name of a pipeline; default: the bundled imagenette-128")
    parser.add_argument("--host", help="address to listen at; default: this machine alone, or GRADIO_SERVER_NAME")
    parser.add_argument("--port", type=number(int, 1, 65535), help="default: the first that is free from 7860 on")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import html
import random
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import gradio as gr
import torch
from PIL import Image

from diffusers_d2it import D2iTPipeline, bundled_checkpoint
from page_actions import (
    EDITS,
    ROWS,
    SIDE,
    SURFACES,
    begin_painting,
    compare,
    draw,
    draw_budgets,
    edit,
    paint,
    quiet,
    reduced,
)


FINE, COARSE, MASK = "#d62728", "#1f77b4", "#ff7f0e"
MISTAKES = (ValueError, TypeError, RuntimeError, OSError)  # what the library says of arguments, pictures and machines
STYLE = """
.picture img { width: 100%; height: 100%; object-fit: contain; }
.budgets .fixed-height { max-height: none; }
@media (max-width: 640px) { .budgets .grid-container { grid-template-columns: 1fr 1fr !important; } }
button[role=tab] { color: var(--body-text-color) !important; }
.empty.wrap, .empty.wrap .or { color: #52525b !important; }
.said p { margin: 0; font-size: 1rem; }
.said .mistake { color: var(--error-text-color); font-weight: 600; }
"""

# ---------------------------------------------------------------------------------------------------------------------
# Parts of the page
# ---------------------------------------------------------------------------------------------------------------------


def said(words: str, is_mistake: bool = False) -> str:
    """Words of the page, which a screen reader reads out as they change."""
    return f'<p role="status"{" class=mistake" * is_mistake}>{html.escape(words)}</p>'


def words_box(words: str) -> gr.HTML:
    return gr.HTML(said(words), elem_classes="said")


def marked(picture: Any) -> Any:
    """What the page shows: of None what it has; of a picture one with a mark, as gradio keeps equal ones in one file.

    It would write that file again while somebody reads it.
    """
    if picture is None:
        return gr.skip()
    if isinstance(picture, Image.Image):
        picture.info["drawing"] = uuid4().hex
    return picture


def on(event: Callable, function: Callable, inputs: list, outputs: list, name: str) -> None:
    """Let an event of the page call a function whose last output is words; mistakes are said there, the rest stays."""

    def answer(*values):
        try:
            answers = function(*values)
            for *answered, words in answers if isinstance(answers, Iterator) else [answers]:
                yield *map(marked, answered), said(words)
        except MISTAKES as error:
            yield *[gr.skip()] * (len(outputs) - 1), said(str(error), is_mistake=True)

    event(answer, inputs, outputs, show_progress="hidden", api_name=name)


def picture_box(label: str, alt_text: str, height: int | None = SIDE) -> gr.Image:
    return gr.Image(
        label=label,
        alt_text=alt_text,
        type="pil",
        format="png",
        height=height,
        interactive=False,
        elem_classes="picture",
        buttons=["download", "fullscreen"],
        min_width=240,
    )


def editor_box(label: str, colours: list[str]) -> gr.ImageEditor:
    return gr.ImageEditor(
        label=label,
        type="pil",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=20, colors=colours, default_color=colours[0], color_mode="fixed"),
        eraser=gr.Eraser(default_size=20),
        canvas_size=(SIDE, SIDE),
        height=SIDE + 90,
    )


def on_canvas(picture: Image.Image) -> dict[str, Any]:
    return {"background": marked(picture), "layers": [], "composite": None}


# ---------------------------------------------------------------------------------------------------------------------
# The tabs. `above` is what stands above them: class, seed, steps, guidance
# ---------------------------------------------------------------------------------------------------------------------


def draw_tab(pipe: D2iTPipeline, above: list, page: gr.Blocks) -> gr.Image:
    with gr.Row():
        model_decides = gr.Checkbox(True, label="The grain model decides how much is fine", min_width=240)
        budget = gr.Slider(0, 100, 30, step=1, label="Budget: percent of the regions that are fine", min_width=240)
    with gr.Row():
        button, four = gr.Button("Draw", variant="primary"), gr.Button("The same under four budgets")
    words = words_box("Choose a class, then draw.")
    with gr.Row():
        picture = picture_box("Picture", "The picture that was drawn")
        overlay = picture_box("Its grain map: red is fine, blue is coarse", "The picture under its grain map")
    hidden = {"visible": False, "height": "auto", "elem_classes": "budgets"}
    gallery = gr.Gallery(label="The same under four budgets, and their maps", columns=4, format="png", **hidden)

    def by_budget(decides: bool, percent: float, *above: Any) -> Iterator[tuple]:
        return draw(pipe, None if decides else percent / 100, *above)

    def four_budgets(*above: Any) -> Iterator[tuple]:
        for pictures, words in draw_budgets(pipe, *above):
            shown = [(marked(one), caption) for one, caption in pictures or []]
            yield gr.Gallery(shown, visible=True) if shown else None, words

    budget.input(None, None, model_decides, js="() => false", api_name=False)
    inputs, outputs = [model_decides, budget, *above], [picture, overlay, words]
    on(button.click, by_budget, inputs, outputs, "draw")
    on(above[1].submit, by_budget, inputs, outputs, "draw_seed")
    on(page.load, by_budget, inputs, outputs, "draw_first")
    on(four.click, four_budgets, above, [gallery, words], "draw_budgets")
    return picture


def paint_tab(pipe: D2iTPipeline, above: list, tab: gr.Tab) -> None:
    begun = gr.State()
    with gr.Row():
        with gr.Column(min_width=300):
            surface = gr.Radio(SURFACES, value=SURFACES[0], label="Paint on", info="Red is fine, blue is coarse")
            editor = editor_box("Paint", [FINE, COARSE])
            boxes = gr.Textbox(
                label="Or boxes, by the keyboard",
                info="One a line: left top right bottom, in pixels of the picture; with coarse before them, coarse",
                placeholder="32 32 96 96",
                lines=2,
            )
            with gr.Row():
                button, again = gr.Button("Redraw", variant="primary"), gr.Button("Begin anew")
            words = words_box("Paint regions, then redraw.")
        with gr.Column(min_width=300):
            picture = picture_box("Redrawn with the same seed", "The picture drawn under the painted map")
            overlay = picture_box("Its grain map", "The redrawn picture under its grain map")

    def begin(surface: str, begun: dict | None, *above: Any) -> tuple:
        surface, begun, words = begin_painting(pipe, surface, *above)
        return on_canvas(surface), begun, words

    def go_on(surface: str, begun: dict | None, *above: Any) -> tuple:
        """As `begin` where something else was begun than what stands above now."""
        if begun is not None and (begun["above"], begun["surface"]) == (above, surface):
            return gr.skip(), begun, "Paint regions, then redraw."
        return begin(surface, begun, *above)

    def redraw(editor: dict, boxes: str, begun: dict | None, *above: Any) -> Iterator[tuple]:
        return paint(pipe, editor, boxes, begun, *above)

    inputs, outputs = [surface, begun, *above], [editor, begun, words]
    on(tab.select, go_on, inputs, outputs, "go_on_painting")
    on(surface.input, begin, inputs, outputs, "paint_on")
    on(again.click, begin, inputs, outputs, "begin_painting")
    on(button.click, redraw, [editor, boxes, begun, *above], [picture, overlay, words], "paint")


def edit_tab(pipe: D2iTPipeline, above: list, drawn: gr.Image) -> None:
    with gr.Row():
        with gr.Column(min_width=300):
            with gr.Row(equal_height=True):
                # A box of its own: the editor would draw and send a photograph at the size of the camera
                upload = gr.Image(
                    label="Upload a picture",
                    placeholder="drop or choose it",
                    sources=["upload", "clipboard"],
                    type="pil",
                    height=120,
                    buttons=[],
                )
                take = gr.Button("Take the drawn picture")
            editor = editor_box("What is edited", [MASK])
            how = gr.Radio(EDITS, value=EDITS[0], label="What to do")
            strength = gr.Slider(
                0, 1, 0.5, step=0.05, label="Strength of a variation: 0 keeps the picture", visible=False
            )
            button = gr.Button("Edit", variant="primary")
            words = words_box("Upload a picture, or take the drawn one; then paint over what is to be new.")
        with gr.Column(min_width=300):
            picture = picture_box("Edited", "The picture after the edit", SIDE + 90)

    def take_drawn(picture: Image.Image | None) -> tuple:
        if picture is None:
            raise ValueError("no picture has been drawn yet.")
        return on_canvas(picture.resize((SIDE, SIDE))), "Paint over what is to be new."

    def begin_edit(editor: dict | None, how: str, strength: float, *above: Any) -> Iterator[tuple]:
        return edit(pipe, editor, how, strength, *above)

    def uploaded(picture: Image.Image) -> tuple:
        picture, words = reduced(picture)
        return gr.Image(None), on_canvas(picture), words

    def varies(how: str) -> dict:
        return gr.update(visible=how == EDITS[1])

    how.change(varies, how, strength, show_progress="hidden", api_name=False)
    on(upload.upload, uploaded, [upload], [upload, editor, words], "uploaded")
    on(take.click, take_drawn, [drawn], [editor, words], "take_drawn")
    on(button.click, begin_edit, [editor, how, strength, *above], [picture, words], "edit")


def compare_tab(pipe: D2iTPipeline, above: list) -> None:
    names = list(pipe.labels)
    with gr.Row():
        columns = {"label": "Classes, one a column", "multiselect": True, "max_choices": 8, "visible": bool(names)}
        labels = gr.Dropdown(names, value=names[:4], min_width=240, **columns)
        kind = gr.Radio(ROWS, value=ROWS[0], label="Rows", min_width=240)
    button = gr.Button("Compare", variant="primary")
    words = words_box("All pictures of a comparison are of the same noise.")
    grid = picture_box("Comparison", "One row a sampler or budget, one column a class", height=None)

    def begin_comparing(labels: list[str], kind: str, *above: Any) -> Iterator[tuple]:
        return compare(pipe, labels, kind, *above)

    on(button.click, begin_comparing, [labels, kind, *above], [grid, words], "compare")


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def make_page(pipe: D2iTPipeline) -> gr.Blocks:
    """The page of a pipeline."""
    names = list(quiet(pipe).labels)
    first = names[1 % len(names)] if names else None
    with gr.Blocks(title="D²iT", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# D²iT: detail where you want it")
        with gr.Row(equal_height=True):
            classes = {"label": "Class", "allow_custom_value": True, "visible": bool(names), "min_width": 200}
            label = gr.Dropdown(names, value=first, **classes)
            seed = gr.Number(3, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=100)
            dice = gr.Button("⚄ Roll a seed", min_width=190, scale=0)
        with gr.Accordion("Steps and guidance", open=False), gr.Row():
            num_steps = gr.Slider(1, 50, 20, step=1, label="Steps", min_width=240)
            guidance_scale = gr.Slider(1, 10, 5, step=0.5, label="Guidance: 1 is without", min_width=240)
        above = [label, seed, num_steps, guidance_scale]
        dice.click(lambda: random.randrange(10_000), None, seed, show_progress="hidden", api_name=False)
        with gr.Tab("Draw"):
            drawn = draw_tab(pipe, above, page)
        with gr.Tab("Paint") as tab:
            paint_tab(pipe, above, tab)
        with gr.Tab("Edit"):
            edit_tab(pipe, above, drawn)
        with gr.Tab("Compare"):
            compare_tab(pipe, above)
    return page.queue(default_concurrency_limit=4)


def look() -> dict[str, Any]:
    """How the page looks, for `launch`: fonts of the reader's machine, and colours that can be read."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    subdued = ("body_text_color_subdued", "block_label_text_color", "block_title_text_color", "block_info_text_color")
    colours = {
        "button_primary_background_fill": "*primary_700",
        "button_primary_background_fill_hover": "*primary_800",
        "button_primary_text_color": "white",
    }
    colours |= {f"{name}_dark": colour for name, colour in colours.items()}
    colours |= {name: "*neutral_600" for name in subdued} | {f"{name}_dark": "*neutral_300" for name in subdued}
    colours |= {"input_placeholder_color": "*neutral_500", "input_placeholder_color_dark": "*neutral_400"}
    return {"theme": gr.themes.Default(primary_hue="blue", **fonts).set(**colours), "css": STYLE}


def main(args: argparse.Namespace) -> None:
    pipe = D2iTPipeline.from_pretrained(args.checkpoint or bundled_checkpoint("imagenette-128"))
    page = make_page(pipe.to("cuda" if torch.cuda.is_available() else "cpu"))
    _, address, _ = page.launch(
        quiet=True,
        prevent_thread_lock=True,
        server_name=args.host,
        server_port=args.port,
        footer_links=[],
        show_error=True,  # of the code: those of MISTAKES are words in the page
        run_history=False,
        ssr_mode=False,  # which would need node
        max_file_size="20mb",
        **look(),
    )
    print(f"open {address} in a browser; Ctrl+C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main(ARGS)
