# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the page does, tab by tab, without a browser."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from huggingface_hub import RepoCard
from PIL import Image
from script_runs import EXAMPLES, load_script, run  # finds the folder of the scripts

from page_actions import (
    BUDGETS,
    EDITS,
    ROWS,
    SURFACES,
    begin_painting,
    compare,
    cost,
    draw,
    draw_budgets,
    edit,
    paint,
    read_painted,
    reduced,
    steps_of,
)


COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")  # of a card of a Space
ABOVE = ("class 3", 5, 4, 3.0)  # class, seed, steps, guidance


@pytest.fixture(scope="module")
def pipe(make_pipeline):
    return make_pipeline()


def alone(pipe, **call) -> tuple[np.ndarray, torch.Tensor]:
    """The picture and the map of a call with what stands above the tabs."""
    call = {"class_labels": ABOVE[0], "num_inference_steps": ABOVE[2], "guidance_scale": ABOVE[3]} | call
    output = pipe(generator=torch.Generator().manual_seed(ABOVE[1]), **call)
    return np.asarray(output.images[0]), output.grain_maps[0]


def strokes(red: list[tuple[int, int]], blue: list[tuple[int, int]] = (), side: int = 64, regions: int = 4) -> dict:
    """What the editor sends of regions (row, column) painted over in their middle halves."""
    layer, region = np.zeros((side, side, 4), dtype=np.uint8), side // regions
    for colour, painted in ((214, 39, 40, 255), red), ((31, 119, 180, 255), blue):
        for row, column in painted:
            top, left = row * region + region // 4, column * region + region // 4
            layer[top : top + region // 2, left : left + region // 2] = colour
    return {"background": Image.new("RGB", (side, side)), "layers": [Image.fromarray(layer)], "composite": None}


def test_a_picture_is_drawn_step_by_step(pipe):
    *steps, (picture, overlay, words) = draw(pipe, None, *ABOVE)
    assert [said for *_, said in steps] == [f"step {i} of 4" for i in (1, 2, 3, 4)]
    assert steps[0][0].size == (32, 32) and all(overlay is None for _, overlay, _ in steps)
    image, grain_map = alone(pipe)
    assert np.array_equal(picture, image) and overlay.size == (384, 384)
    assert words.startswith(f"{16 + 4 * int(grain_map.sum())} tokens") and words.endswith(" ms")


def test_a_budget_is_kept(pipe):
    *_, (picture, _, words) = draw(pipe, 0.25, *ABOVE)
    assert np.array_equal(picture, alone(pipe, fine_ratio=0.25)[0])
    assert words.startswith("32 tokens, 25% of the regions fine")


def test_of_three_grains_the_finest_is_fine(make_pipeline):
    words = cost(make_pipeline(num_grains=3), torch.tensor([[[0, 1, 2], [1, 1, 0], [2, 1, 1]]]), 7)
    assert "22% of the regions fine" in words


def test_one_noise_under_four_budgets(pipe):
    *steps, (pictures, words) = draw_budgets(pipe, *ABOVE)
    assert len(steps) == 4 and len(pictures) == 2 * len(BUDGETS)
    assert [caption for _, caption in pictures[:4]] == ["0% fine", "25% fine", "50% fine", "100% fine"]
    for (image, _), budget in zip(pictures, BUDGETS):
        assert np.allclose(np.asarray(image, int), np.asarray(alone(pipe, fine_ratio=budget)[0], int), atol=1)
    assert words.startswith("16, 32, 48, 80 tokens")


def test_strokes_and_boxes_are_a_map_in_part(pipe):
    held = read_painted(strokes([(0, 0), (1, 2)], [(3, 3)]), "coarse 0 24 8 32\n\n16,24, 24 32", pipe)
    expected = torch.full((4, 4), -1)
    expected[0, 0] = expected[1, 2] = expected[3, 2] = 1
    expected[3, 3] = expected[3, 0] = 0
    assert torch.equal(held, expected)
    assert (read_painted(None, "", pipe) == -1).all()


@pytest.mark.parametrize("boxes", ["0 0 8", "0 0 64 8", "a b c d", "fine", "0 0 8 nan", ","])
def test_a_box_that_is_none_is_refused(pipe, boxes):
    with pytest.raises(ValueError, match="box"):
        read_painted(None, boxes, pipe)


def test_what_is_not_painted_stays_map_and_pixels(pipe):
    surface, begun, words = begin_painting(pipe, SURFACES[0], *ABOVE)
    assert surface.size == (384, 384) and "seed 5" in words
    image, grain_map = alone(pipe)
    painted = torch.zeros(4, 4, dtype=torch.bool)
    painted[1:3, 1] = True
    is_fine = (grain_map[1:3, 1] == 0).tolist()  # each becomes what it was not
    red, blue = ([(1 + i, 1) for i, fine in enumerate(is_fine) if fine == grain] for grain in (True, False))
    *steps, (picture, overlay, _) = paint(pipe, strokes(red, blue), "", begun, *ABOVE)
    assert len(steps) == 4 and overlay.size == (384, 384)
    changed = (np.asarray(picture) != image).any(axis=-1)
    inside = painted.numpy().repeat(8, 0).repeat(8, 1)
    assert changed[inside].any() and not changed[~inside].any()


def test_on_an_empty_grid_the_grain_model_draws_the_rest(pipe):
    _, begun, _ = begin_painting(pipe, SURFACES[1], *ABOVE)
    held = torch.full((4, 4), -1)
    held[2, 1] = 1
    *_, (picture, _, _) = paint(pipe, strokes([(2, 1)]), "", begun, *ABOVE)
    assert np.array_equal(picture, alone(pipe, grain_map=held)[0])


def test_a_painted_mask_is_filled_and_the_rest_stays(pipe):
    editor = strokes([(1, 1)])
    editor["background"] = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    *steps, (picture, _) = edit(pipe, editor, EDITS[0], 0.5, *ABOVE)
    changed = (np.asarray(picture) != np.asarray(editor["background"])).any(axis=-1)
    mask = np.asarray(editor["layers"][0])[..., 3] > 0
    assert len(steps) == 4 and picture.size == (64, 64) and changed[mask].any() and not changed[~mask].any()


def test_a_whole_picture_is_varied(pipe):
    editor = strokes([])
    *steps, (picture, words) = edit(pipe, editor, EDITS[1], 0.5, *ABOVE)
    assert len(steps) == 2 and picture.size == (32, 32) and "tokens" in words


@pytest.mark.parametrize("kind, names", [(ROWS[0], ["dpmsolver++", "unipc"]), (ROWS[1], ["0% fine", "as drawn"])])
def test_a_comparison_has_a_row_for_each(pipe, kind, names):
    *first, (grid, words) = compare(pipe, ["class 1", "class 2"], kind, *ABOVE)
    assert grid.width == 110 + 2 * 160 and grid.height == 28 + 160 * (len(first) + 1)
    assert all(name in words for name in names)


def test_mistakes_are_the_words_of_the_library(pipe):
    with pytest.raises(ValueError, match="class 3"):
        list(draw(pipe, None, "klass 3", *ABOVE[1:]))
    for call in (
        lambda: draw(pipe, None, ABOVE[0], None, 4, 3.0),
        lambda: paint(pipe, None, "", None),
        lambda: edit(pipe, None, EDITS[0], 0.5, *ABOVE),
        lambda: edit(pipe, strokes([]), EDITS[0], 0.5, *ABOVE),
        lambda: compare(pipe, [], ROWS[0], *ABOVE),
    ):
        with pytest.raises(ValueError):
            list(call())


def test_what_was_painted_is_too_little_or_too_much(pipe):
    begun = begin_painting(pipe, SURFACES[0], *ABOVE)[1]
    with pytest.raises(ValueError, match="nothing is painted: cover a fifth"):
        list(paint(pipe, strokes([]), "", begun, *ABOVE))
    with pytest.raises(ValueError, match="begun with another class"):
        list(paint(pipe, strokes([(2, 1)]), "", begun, "another", *ABOVE[1:]))
    across = {"background": Image.new("RGB", (96, 40)), "layers": [Image.new("RGBA", (96, 8), "red")]}
    with pytest.raises(ValueError, match="longer than the shorter side"):
        list(edit(pipe, across, EDITS[0], 0.5, *ABOVE))


def test_people_at_the_same_time_get_what_each_would_get_alone(pipe):
    seeds, drawn = range(6), {}

    def person(seed: int) -> None:
        *_, (drawn[seed], _, _) = draw(pipe, None, ABOVE[0], seed, *ABOVE[2:])

    people = [threading.Thread(target=person, args=(seed,)) for seed in seeds]
    for one in people:
        one.start()
    for one in people:
        one.join()
    for seed in seeds:
        *_, (picture, _, _) = draw(pipe, None, ABOVE[0], seed, *ABOVE[2:])
        assert np.array_equal(drawn[seed], picture)


def test_who_leaves_holds_nobody_up(pipe):
    steps = steps_of(pipe, class_labels=ABOVE[0], num_inference_steps=1000)
    next(steps)
    steps.close()
    *_, (picture, _, _) = draw(pipe, None, *ABOVE)
    assert np.array_equal(picture, alone(pipe)[0])


@pytest.mark.parametrize("num_classes", [10, None])
def test_the_page_of_any_pipeline_is_made(make_pipeline, num_classes):
    pytest.importorskip("gradio", reason="the page needs the extra demo")
    app = load_script("app.py")
    page = app.make_page(make_pipeline(num_classes=num_classes))
    assert {"draw", "draw_budgets", "paint", "edit", "compare"} <= {fn.api_name for fn in page.fns.values()}
    assert "http" not in str(app.look()["theme"]._stylesheets)


def test_a_space_is_made_and_stands_alone(tmp_path):
    run("make_space.py", "--output_dir", tmp_path)
    for name in ("README.md", "requirements.txt"):
        assert (tmp_path / name).read_text() == (EXAMPLES / "space" / name).read_text(), "run `make space`"
    _, front, _ = (tmp_path / "README.md").read_text().split("---\n", 2)
    card = RepoCard.load(tmp_path / "README.md", repo_type="space").data.to_dict()
    assert front and card["sdk"] == "gradio" and (tmp_path / card["app_file"]).is_file()
    assert f"gradio=={card['sdk_version']}\n" in (tmp_path / "requirements.txt").read_text()
    assert len(card["title"]) and len(card["short_description"]) <= 60 and card["colorFrom"] in COLOURS
    code = "import page_actions, diffusers_d2it; from diffusers_d2it import *; print(diffusers_d2it.__file__)\n"
    code += "pipe = D2iTPipeline.from_pretrained(bundled_checkpoint('imagenette-128'))\n"
    code += "print([*page_actions.draw(pipe, None, 'church', 0, 2, 5.0)][-1][-1])"
    command, where = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith(str(tmp_path)) and done.stdout.endswith(" ms\n"), done.stderr


def test_pictures_that_are_larger_than_a_brush_can_paint_are_reduced():
    smaller, words = reduced(Image.new("RGB", (4000, 3000)))
    assert smaller.size == (1024, 768) and "4000x3000" in words and "1024x768" in words
    assert reduced(Image.new("RGB", (1024, 300)))[0].size == (1024, 300)
