# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Arguments as people have them, pictures of every kind, and two calls at once."""

import threading

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from pipeline_calls import MAP_ALONE, call_with

from diffusers_d2it import D2iTPipeline, visualize_grain_map
from diffusers_d2it.data import decode_image, to_pixels
from diffusers_d2it.pipelines.labels import class_ids


call = call_with(num_inference_steps=3, grain_num_inference_steps=3, output_type="pt")


# ---- Several calls at once ----


CALLS = [
    {"class_labels": [1], "seed": 1, "num_inference_steps": 6},
    {"class_labels": [2, 3], "seed": 2, "num_inference_steps": 4, "guidance_scale": 7.0},
    {"class_labels": [4], "seed": 3, "num_inference_steps": 9, "fine_ratio": 0.3},
    {"class_labels": [5], "seed": 4, "num_inference_steps": 5, "guidance_interval": (0.3, 0.7), "height": 64},
]


def one_pipeline(pipe, make_pipeline):
    return [pipe]


def one_model(pipe, make_pipeline):
    return [pipe, D2iTPipeline(**pipe.components)]


def one_scheduler(pipe, make_pipeline):
    return [pipe, make_pipeline(scheduler=pipe.scheduler, grain_scheduler=pipe.grain_scheduler)]


@pytest.mark.parametrize(
    "pipes_of, components",
    [
        (one_pipeline, {}),
        (one_pipeline, {"scheduler": UniPCMultistepScheduler()}),
        (one_pipeline, {"scheduler": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")}),
        (one_model, {"scheduler": UniPCMultistepScheduler()}),
        (one_scheduler, {"scheduler": UniPCMultistepScheduler()}),
    ],
)
def test_threads_get_what_they_would_get_alone(make_pipeline, pipes_of, components):
    pipes = pipes_of(make_pipeline(**components), make_pipeline)
    tasks = [(pipes[i % len(pipes)], arguments) for i, arguments in enumerate(CALLS)]
    alone = [call(pipe, **arguments) for pipe, arguments in tasks]
    together, barrier = [None] * len(tasks), threading.Barrier(len(tasks))

    def run(i):
        barrier.wait()
        together[i] = call(tasks[i][0], **tasks[i][1])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together):
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.grain_maps, expected.grain_maps)


def test_a_cast_in_another_thread_waits_for_the_end_of_a_call(make_pipeline):
    pipe, begun = make_pipeline(), threading.Event()
    expected = call(pipe, 1).images
    thread = threading.Thread(target=lambda: (begun.wait(), pipe.to(torch.bfloat16)))
    thread.start()
    images = call(pipe, 1, callback_on_step_end=lambda *args: (begun.set(), thread.join(0.1), None)[-1]).images
    thread.join()
    assert torch.equal(images, expected) and pipe.dtype == torch.bfloat16


def test_a_callback_cannot_call_its_own_pipeline_and_nothing_stays_locked(make_pipeline):
    pipe = make_pipeline()
    expected = call(pipe, 1).images
    for other in (pipe, D2iTPipeline(**pipe.components)):
        with pytest.raises(ValueError, match="`callback_on_step_end`"):
            call(pipe, 1, callback_on_step_end=lambda *args, other=other: call(other, 2))
        assert torch.equal(call(pipe, 1).images, expected)


# ---- Arguments as people write them ----


@pytest.mark.parametrize(
    "labels",
    [
        3,
        np.int64(3),
        np.uint8(3),
        np.float64(3),
        torch.tensor(3),
        "3",
        "class 3",
        [3],
        (3,),
        [[3]],
        [np.int32(3)],
        [torch.tensor(3)],
        range(3, 4),
        np.array([3]),
        np.array([[3]]),
        np.array([3.0]),
        torch.tensor([[3]]),
        pd.Series([3], index=["a"]),
        pd.Series([3.0]),
        pd.Series(["class 3"]),
        np.array(["class 3"]),
        pd.Index([3]),
        {3: "three"}.keys(),
        (id for id in [3]),
    ],
    ids=lambda labels: type(labels).__name__,
)
def test_labels_of_every_kind(labels):
    assert class_ids(labels, 10, {3: "class 3, synonym 3", 4: "class 4"}) == [3]


@pytest.mark.parametrize(
    "labels",
    [
        [],
        [[]],
        [[1, 2], [3]],
        1.5,
        float("nan"),
        True,
        [None],
        pd.Series([1, None]),
        b"cat",
        {3},
        {3: "three"},
        torch.eye(3),
        np.eye(3),
        np.array([[1, 2]]),
        pd.DataFrame({"first": [1], "second": [2]}),
        object(),
    ],
    ids=lambda labels: type(labels).__name__,
)
def test_what_is_no_label(labels):
    with pytest.raises(ValueError, match="`class_labels`"):
        class_ids(labels, 10, None)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, np.array], ids=lambda kind: kind.__name__)
def test_numbers_of_every_kind(make_pipeline, kind):
    pipe, plain = make_pipeline(), {"guidance_scale": 3.0, "guidance_interval": (0.25, 0.75), "fine_ratio": 0.5}
    written = {"guidance_scale": kind(3.0), "guidance_interval": kind((0.25, 0.75)), "fine_ratio": kind(0.5)}
    whole = {"float32": np.int16, "float64": np.uint64}.get(kind.__name__, kind)
    counts = {"num_inference_steps": 3, "num_images_per_prompt": 2, "height": 32, "grain_num_inference_steps": 2}
    found = call(pipe, 1, **written, **{name: whole(count) for name, count in counts.items()})
    assert torch.equal(found.images, call(pipe, 1, **plain, **counts).images)


def test_settings_that_are_no_numbers_stay_refused(make_pipeline):
    pipe = make_pipeline()
    wrong = {
        "num_inference_steps": [np.float64(2.5), torch.tensor([2, 3]), "3", True],
        "guidance_scale": [torch.tensor([1.0, 2.0]), np.nan, "4"],
        "fine_ratio": [np.float32(1.5), torch.tensor(True)],
        "guidance_interval": [np.array([0.2, 0.5, 0.8]), torch.tensor(0.5)],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}`"):
                call(pipe, 1, **{name: value})


def test_a_callback_that_returns_nothing_only_looks(make_pipeline):
    pipe, seen = make_pipeline(), []
    output = call(pipe, 1, callback_on_step_end=lambda pipe, step, t, tensors: seen.append(step))
    assert seen == [0, 1, 2]
    assert torch.equal(output.images, call(pipe, 1).images)
    for wrong in ([], torch.zeros(1, 4, 8, 8), "latents"):
        with pytest.raises(ValueError, match="`callback_on_step_end`"):
            call(pipe, 1, callback_on_step_end=lambda *args, wrong=wrong: wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_every_precision(make_pipeline, dtype):
    pipe, noise = make_pipeline(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(call(pipe, 1, latents=noise).images, call(pipe, 1, latents=noise.float()).images)


# ---- Maps ----


ROWS = [[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    "grain_map",
    [
        ROWS,
        [ROWS],
        np.array(ROWS),
        np.array(ROWS, np.uint8),
        np.array(ROWS, float),
        np.array(ROWS, bool),
        torch.tensor(ROWS, dtype=torch.int32),
        torch.tensor(ROWS, dtype=torch.bfloat16),
        torch.tensor(ROWS) > 0,
        [torch.tensor(row) for row in ROWS],
        [[bool(one) for one in row] for row in ROWS],
    ],
    ids=lambda grain_map: f"{type(grain_map).__name__} {getattr(grain_map, 'dtype', '')}",
)
def test_maps_of_every_kind(make_pipeline, grain_map):
    output = call(make_pipeline(), 1, grain_map=grain_map, **MAP_ALONE)
    assert torch.equal(output.grain_maps, torch.tensor([ROWS]))


def test_of_a_mask_true_is_the_finest_grain(make_pipeline):
    mask = torch.tensor(ROWS) > 0
    assert torch.equal(call(make_pipeline(3), 1, grain_map=mask, **MAP_ALONE).grain_maps, 2 * torch.tensor([ROWS]))


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"grain_map": np.zeros((8, 16), int)}, ["`grain_map` of 8x16", "64x128", "4x4"]),
        ({"latents": torch.zeros(1, 4, 8, 16)}, ["`latents` of 4x8", "32x64", "4x4"]),
        ({"grain_map": ROWS}, []),
        ({"height": 64, "grain_map": np.zeros((8, 4), bool)}, []),  # asked for
    ],
)
def test_a_map_that_asks_for_another_size_says_so(make_pipeline, caplog, arguments, told):
    caplog.set_level("WARNING")
    call(make_pipeline(), 1, **arguments, **MAP_ALONE)
    assert len(caplog.messages) == bool(told)
    assert all(part in caplog.messages[0] for part in told)


# ---- Pictures ----


def map_of(pipe, image, **settings):
    return pipe.grain_map_from_image(image, height=64, width=64, **settings)


def save(path, image, **options):
    image.save(path, **options)
    return path


def with_transparency(photo):
    image = photo.convert("RGBA")
    image.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    return image


def sixteen_bits(photo):
    values = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    values[::2] ^= 0x3F
    return PIL.Image.fromarray(values)


def turned():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    return exif


FILES = {
    "plain.png": lambda photo, path: save(path, photo),
    "quality.jpg": lambda photo, path: save(path, photo, quality=95),
    "turned.jpg": lambda photo, path: save(path, photo, quality=95, exif=turned()),
    "turned.png": lambda photo, path: save(path, photo, exif=turned()),
    "grey.png": lambda photo, path: save(path, photo.convert("L")),
    "one bit.png": lambda photo, path: save(path, photo.convert("1")),
    "deep.png": lambda photo, path: save(path, sixteen_bits(photo)),
    "deep.tif": lambda photo, path: save(path, sixteen_bits(photo)),
    "clear.png": lambda photo, path: save(path, with_transparency(photo)),
    "clear.webp": lambda photo, path: save(path, with_transparency(photo), lossless=True),
    "palette.png": lambda photo, path: save(path, photo.convert("P", palette=PIL.Image.Palette.ADAPTIVE)),
    "palette clear.png": lambda photo, path: save(path, photo.quantize(16), transparency=3),
    "four inks.jpg": lambda photo, path: save(path, photo.convert("CMYK"), quality=95),
    "one colour.png": lambda photo, path: save(path, photo, transparency=photo.getpixel((0, 0))),
}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_is_read_as_in_training(make_pipeline, photos, tmp_path, name):
    pipe = make_pipeline()
    [photo] = pipe.image_processor.postprocess(photos[1:2], output_type="pil")
    path = FILES[name](photo, tmp_path / name)
    trained = to_pixels(decode_image({"path": str(path)}), 64)[None]
    expected = pipe.vae.encode(trained, fine_ratio=0.5).grain_map
    with PIL.Image.open(path) as opened:
        for image in (path, str(path), opened, [path], [opened]):
            assert torch.equal(map_of(pipe, image, fine_ratio=0.5), expected)
    assert torch.equal(map_of(pipe, [path, photo], fine_ratio=0.5)[:1], expected)


def test_arrays_and_tensors_of_every_depth(make_pipeline, photos):
    pipe = make_pipeline()
    expected = pipe.vae.encode(photos[:2], fine_ratio=0.5).grain_map
    levels = ((photos[:2] + 1) * 127.5).round().to(torch.uint8)
    array = levels.permute(0, 2, 3, 1).numpy()
    for image in (levels, array, list(levels), list(array), array / 255, levels / 255, (levels / 255).double()):
        assert torch.equal(map_of(pipe, image, fine_ratio=0.5), expected)
    deep, alpha = array.astype(np.uint16) * 257, np.full_like(array[..., :1], 255)
    for image in (deep, list(deep), torch.from_numpy(deep).movedim(-1, 1), np.concatenate([array, alpha], -1)):
        assert torch.equal(map_of(pipe, image, fine_ratio=torch.tensor(0.5)), expected)
    grey = array[..., 0]
    assert torch.equal(map_of(pipe, array[..., :1]), map_of(pipe, list(grey)))
    assert torch.equal(map_of(pipe, list(grey)), map_of(pipe, np.stack([grey] * 3, -1)))
    assert torch.equal(map_of(pipe, list(grey.astype(np.uint16) * 257)), map_of(pipe, list(grey)))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_map_is_drawn_on_any_output(make_pipeline, output_type):
    pipe = make_pipeline()
    output, pictures = (call(pipe, [1, 2], output_type=kind) for kind in (output_type, "pil"))
    expected = np.array([*map(visualize_grain_map, pictures.images, output.grain_maps)], int)
    for drawn in (visualize_grain_map(*output.values()), map(visualize_grain_map, output.images, output.grain_maps)):
        assert np.abs(np.array([*drawn], int) - expected).max() <= 1
    with pytest.raises(ValueError, match="`grain_map`.*2.*1"):
        visualize_grain_map(output.images, output.grain_maps[:1])
    latents = call(pipe, 1, output_type="latent").images
    for wrong in (latents[0], "photo.png", None, np.zeros((4, 4))):
        with pytest.raises(ValueError, match="`image`"):
            visualize_grain_map(wrong, output.grain_maps[0])


def test_a_map_is_drawn_on_a_picture_as_it_is_seen(photos, tmp_path, make_pipeline):
    [photo] = make_pipeline().image_processor.postprocess(photos[1:2], output_type="pil")
    for name, make in FILES.items():
        seen = decode_image({"path": str(make(photo, tmp_path / name))})
        with PIL.Image.open(tmp_path / name) as opened:
            drawn = visualize_grain_map(opened, np.array(ROWS))
        assert np.array_equal(np.asarray(drawn), np.asarray(visualize_grain_map(seen, np.array(ROWS)))), name


@pytest.mark.parametrize("dtype", [bool, float, np.uint8, torch.bool, torch.bfloat16, torch.int32])
def test_maps_of_every_kind_are_drawn(dtype):
    image, expected = PIL.Image.new("RGB", (8, 8)), visualize_grain_map(PIL.Image.new("RGB", (8, 8)), np.array(ROWS))
    grain_map = torch.tensor(ROWS).to(dtype) if isinstance(dtype, torch.dtype) else np.array(ROWS, dtype)
    assert np.array_equal(np.asarray(visualize_grain_map(image, grain_map, np.int64(2))), np.asarray(expected))
    for wrong in (np.array(ROWS) / 2, np.full((4, 4), np.nan), np.array([["fine"]])):
        with pytest.raises(ValueError, match="`grain_map`"):
            visualize_grain_map(image, wrong)
    for wrong in (1, 0, "2", 2.5):
        with pytest.raises(ValueError, match="`num_grains`"):
            visualize_grain_map(image, grain_map, wrong)
