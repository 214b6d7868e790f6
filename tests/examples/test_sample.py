# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of samples by the script: the same whoever draws them and however often they are interrupted."""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from loopback_hub import run_with_hub, serve_hub
from PIL import Image
from script_runs import as_code, call, in_processes, together

from diffusers_d2it import D2iTImg2ImgPipeline, D2iTPipeline, DCDiTPipeline, load_sampler
from diffusers_d2it.sampling import SampleFolder


SCRIPT = "sample.py"
LITE = {"budget": 0.5, "null_budget": 0.1}
NAMES = {4: "astronaut", 1: "cat", 7: "coffee"}  # as three of the class folders of photographs are called


@pytest.fixture(scope="module")
def checkpoint(make_pipeline, tmp_path_factory) -> Path:
    """A tiny pipeline of 32-pixel images and three named classes."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_pipeline(id2label=NAMES).save_pretrained(folder)
    return folder


def flags(checkpoint: Path, output: Path, **changed) -> list:
    values = {"checkpoint": checkpoint, "output_dir": output, "num_images": 10, "batch_size": 4}
    values |= {"num_inference_steps": 2} | changed
    return [word for name, value in values.items() for word in (f"--{name}", *np.atleast_1d(value))]


def draw(checkpoint: Path, output: Path, **changed) -> dict:
    """Run the script in this process; the protocol."""
    call(SCRIPT, *flags(checkpoint, output, **changed))
    return json.loads((output / "protocol.json").read_text())


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


def texts(folder: Path) -> list[dict[str, str]]:
    return [Image.open(path).text for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module")
def drawn(checkpoint, tmp_path_factory) -> tuple[Path, dict]:
    """A set, and its protocol."""
    folder = tmp_path_factory.mktemp("drawn") / "set"
    return folder, draw(checkpoint, folder)


@pytest.fixture(scope="module")
def dcdit(make_dcdit_pipeline, tmp_path_factory) -> Path:
    """A tiny pipeline of DC-DiT, of 32-pixel images and the same classes."""
    folder = tmp_path_factory.mktemp("dcdit")
    make_dcdit_pipeline(id2label=NAMES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn_by_dcdit(dcdit, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("drawn_by_dcdit") / "set"
    return folder, draw(dcdit, folder, **LITE)


# ---- The same set ----


def test_an_image_is_what_its_protocol_says(checkpoint, drawn):
    folder, protocol = drawn
    sampling = protocol["sampling"]
    pipe = D2iTPipeline.from_pretrained(checkpoint)
    for i, (image, text) in enumerate(zip(pixels(folder), texts(folder), strict=True)):
        label = sampling["labels"]["classes"][i % 3]
        seed = (sampling["noise_seeds"]["first"] + i) % 2**32
        output = pipe(label, num_inference_steps=2, generator=torch.Generator().manual_seed(seed))
        assert np.abs(image - np.asarray(output.images[0])).max() <= 1
        assert text == {"class_label": str(label), "fine_share": str(output.grain_maps.float().mean().item())}
    assert sampling["labels"]["classes"] == [1, 4, 7]


def test_an_image_of_dcdit_is_what_its_protocol_says(dcdit, drawn_by_dcdit):
    folder, protocol = drawn_by_dcdit
    sampling = protocol["sampling"]
    pipe, shares = DCDiTPipeline.from_pretrained(dcdit), []
    for i, (image, text) in enumerate(zip(pixels(folder), texts(folder), strict=True)):
        how = {"budget": sampling["budget"], "null_budget": sampling["null_budget"], "return_boundary_maps": "all"}
        seed = (sampling["noise_seeds"]["first"] + i) % 2**32
        label, generator = sampling["labels"]["classes"][i % 3], torch.Generator().manual_seed(seed)
        output = pipe(label, num_inference_steps=2, generator=generator, **how)
        assert np.abs(image - np.asarray(output.images[0])).max() <= 1
        shares.append(output.boundary_maps.float().mean().item())
        assert text == {"class_label": str(label), "token_share": str(shares[-1])}
    assert len(set(shares)) > 1 and protocol["mean_token_share"] == pytest.approx(np.mean(shares))
    assert "mean_fine_share" not in protocol and "grain_maps" not in sampling
    assert (sampling["budget"], sampling["null_budget"], sampling["resolution"]) == (0.5, 0.1, [32, 32])
    hashes = sampling["checkpoint"]["weights_sha256"]
    assert hashes == {
        name: hashlib.sha256((dcdit / name / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
        for name in ("vae", "transformer")
    }


def test_two_processes_draw_the_same_files(checkpoint, drawn, tmp_path):
    output = tmp_path / "two"
    said = together(partial(call, SCRIPT, *flags(checkpoint, output, format="both")))
    assert pngs(output) == pngs(drawn[0])
    assert said.count("10 of 10 images") == 1
    assert np.array_equal(np.load(output / "images.npz")["arr_0"], pixels(output))
    protocol = json.loads((output / "protocol.json").read_text())
    assert protocol["run"]["num_processes"] == 2 and protocol["run"]["num_drawn"] == 10
    for part in ("complete", "sampling", "environment", "mean_fine_share"):
        assert protocol[part] == drawn[1][part]


def draw_with_two_processes(checkpoint: Path, output: Path) -> list[list]:
    """What each of two processes draws, the first image of each batch; or the error with which it ends."""

    def drawn_batches() -> list:
        write, said = SampleFolder.write, []

        def noted(samples: SampleFolder, batch: range, *images) -> None:
            said.append(batch.start)
            write(samples, batch, *images)

        SampleFolder.write = noted
        try:
            call(SCRIPT, *flags(checkpoint, output))
        except ValueError as error:
            return [str(error)]
        return said

    return in_processes(drawn_batches)


def test_two_processes_share_what_is_missing(checkpoint, drawn, tmp_path):
    output = shutil.copytree(drawn[0], tmp_path / "set")
    for name in ("000005.png", "000006.png"):
        (output / name).unlink()
    (output / "000008.png").write_bytes(b"")
    assert draw_with_two_processes(checkpoint, output) == [[4], [8]]
    assert pngs(output) == pngs(drawn[0])
    assert json.loads((output / "protocol.json").read_text())["run"]["num_drawn"] == 3


def test_another_batch_size_changes_at_most_the_last_bit(checkpoint, drawn, tmp_path):
    protocol = draw(checkpoint, tmp_path, batch_size=7)
    assert np.abs(pixels(tmp_path) - pixels(drawn[0])).max() <= 1
    assert protocol["mean_fine_share"] == drawn[1]["mean_fine_share"]


def test_a_set_goes_on_where_it_was_killed(checkpoint, drawn, tmp_path):
    output = tmp_path / "set"
    pid = os.fork()
    if pid == 0:
        write = SampleFolder.write

        def killed_at_the_last_batch(samples: SampleFolder, batch: range, *images) -> None:
            if batch.start == 8:
                samples._pending[0].result()
                os.kill(os.getpid(), signal.SIGKILL)
            write(samples, batch, *images)

        SampleFolder.write = killed_at_the_last_batch
        sys.stdout = sys.stderr = open(os.devnull, "w")
        call(SCRIPT, *flags(checkpoint, output))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    written = pngs(output)
    assert 0 < len(written) < 10 and list(output.glob(".staging-*"))
    assert json.loads((output / "protocol.json").read_text())["complete"] is False

    protocol = draw(checkpoint, output)
    assert pngs(output) == pngs(drawn[0]) and not list(output.glob(".staging-*"))
    assert protocol["complete"] and protocol["run"]["num_drawn"] == 10 - len(written)


def test_a_moved_checkpoint_goes_on_and_another_is_refused(checkpoint, drawn, make_pipeline, tmp_path):
    call(SCRIPT, *flags(checkpoint, tmp_path / "set"))
    before = pngs(tmp_path / "set")
    make_pipeline(id2label=NAMES).save_pretrained(tmp_path / "moved")
    draw(tmp_path / "moved", tmp_path / "set")
    pipe = make_pipeline(id2label=NAMES)
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(1e-3)
    pipe.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=' sampling.checkpoint.weights_sha256.transformer "[^;]*$'):
        draw(tmp_path / "trained", tmp_path / "set")
    differ = "sampling.num_inference_steps 2, not 3; sampling.guidance.scale 5.0, not 1.5"
    with pytest.raises(ValueError, match=differ):
        draw(checkpoint, tmp_path / "set", num_inference_steps=3, guidance_scale=1.5)
    assert pngs(tmp_path / "set") == before == pngs(drawn[0])


def test_a_pipeline_of_the_hub_is_drawn_by_its_kind(dcdit, drawn_by_dcdit, tmp_path):
    with serve_hub({"user/dcdit": dcdit}) as endpoint:
        run_with_hub(as_code(SCRIPT, *flags("user/dcdit", tmp_path / "set", **LITE)), endpoint, tmp_path / "hf")
    assert pngs(tmp_path / "set") == pngs(drawn_by_dcdit[0])


def test_a_pipeline_for_editing_draws_as_well(checkpoint, drawn, tmp_path):
    pipe = D2iTImg2ImgPipeline.from_pipe(D2iTPipeline.from_pretrained(checkpoint))
    pipe.save_pretrained(tmp_path / "editing")
    draw(tmp_path / "editing", tmp_path / "set")
    assert pngs(tmp_path / "set") == pngs(drawn[0])


# ---- What is drawn ----


def test_random_labels_and_chosen_classes(checkpoint, tmp_path):
    chosen = {"labels": "random", "class_labels": ["coffee", "4"], "num_images": 12}
    protocol = draw(checkpoint, tmp_path, **chosen, format="both", num_inference_steps=1)
    labels = [text["class_label"] for text in texts(tmp_path)]
    assert protocol["sampling"]["labels"]["classes"] == [7, 4] and protocol["sampling"]["labels"]["scheme"] == "random"
    assert set(labels) == {"4", "7"} and labels != ["7", "4"] * 6 and Counter(labels)["4"] in range(2, 11)


def test_maps_of_photographs_are_those_of_the_class(checkpoint, folder, tmp_path):
    protocol = draw(checkpoint, tmp_path, grain_source="true", reference_data=folder, fine_ratio=0.4)
    pipe = D2iTPipeline.from_pretrained(checkpoint)
    shares = {}
    for label, name in NAMES.items():
        (path,) = (folder / name).iterdir()
        photograph = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        shares[str(label)] = pipe.grain_map_from_image(photograph, fine_ratio=0.4).float().mean().item()
    assert len(set(shares.values())) > 1
    for text in texts(tmp_path):
        assert float(text["fine_share"]) == shares[text["class_label"]]
    described = protocol["sampling"]["grain_maps"]
    assert described["source"] == "true" and described["fine_ratio"] == 0.4
    assert described["reference_data"]["photographs"] == "photos, 32x32"


@pytest.mark.parametrize(
    "changed, shares",
    [
        ({"grain_source": "coarse"}, {"0.0"}),
        ({"grain_source": "fine"}, {"1.0"}),
        ({"grain_source": "random", "fine_ratio": 1}, {"1.0"}),
        ({"fine_ratio": 0.25}, {"0.25"}),
    ],
)
def test_maps_of_other_sources(checkpoint, changed, shares, tmp_path):
    protocol = draw(checkpoint, tmp_path, num_images=3, num_inference_steps=1, **changed)
    assert {text["fine_share"] for text in texts(tmp_path)} == shares
    assert protocol["mean_fine_share"] == float(*shares)
    assert protocol["sampling"]["grain_maps"]["source"] == changed.get("grain_source", "predicted")


def test_a_fast_sampler_and_half_precision(checkpoint, drawn, tmp_path):
    protocol = draw(checkpoint, tmp_path, scheduler="unipc", dtype="bfloat16", guidance_interval=[0.2, 0.8])
    sampling = protocol["sampling"]
    scheduler = load_sampler("unipc", D2iTPipeline.from_pretrained(checkpoint).scheduler)
    assert sampling["scheduler"]["class"] == "UniPCMultistepScheduler"
    assert sampling["scheduler"]["config"]["solver_order"] == scheduler.config.solver_order
    assert sampling["guidance"] == {"scale": 5.0, "interval": [0.2, 0.8], "power": None}
    assert sampling["dtype"] == "bfloat16"
    assert sampling["checkpoint"] == drawn[1]["sampling"]["checkpoint"]
    assert np.abs(pixels(tmp_path) - pixels(drawn[0])).max() > 1


@pytest.mark.parametrize("out_channels, variance", [(None, "fixed_small"), (8, "learned_range")])
def test_ancestral_sampling_draws_with_the_variance_of_the_model(
    make_pipeline, make_content_model, out_channels, variance, tmp_path
):
    pipe = make_pipeline(transformer=make_content_model(out_channels=out_channels))
    pipe.save_pretrained(tmp_path / "checkpoint")
    protocol = draw(tmp_path / "checkpoint", tmp_path / "set", num_images=2, scheduler="ddpm")
    scheduler = protocol["sampling"]["scheduler"]
    assert (scheduler["class"], scheduler["config"]["variance_type"]) == ("DDPMScheduler", variance)
    assert scheduler["config"]["beta_end"] == 2e-2


@pytest.mark.parametrize("sampler", [None, "unipc", "dpmsolver++"])
def test_ancestral_sampling_of_a_flow_is_refused(make_pipeline, sampler, tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler = scheduler if sampler is None else load_sampler(sampler, scheduler)
    make_pipeline(scheduler=scheduler).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="--scheduler ddpm"):
        draw(tmp_path / "checkpoint", tmp_path / "set", scheduler="ddpm")


def test_an_unconditional_model_with_a_scheduler_that_draws_noise(make_pipeline, tmp_path):
    make_pipeline(num_classes=None, scheduler=DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path / "pipe")
    for batch_size in (2, 5):
        protocol = draw(tmp_path / "pipe", tmp_path / str(batch_size), num_images=5, batch_size=batch_size)
    assert protocol["sampling"]["labels"] is None and protocol["sampling"]["guidance"] is None
    assert [set(text) for text in texts(tmp_path / "2")] == [{"fine_share"}] * 5
    assert np.abs(pixels(tmp_path / "2") - pixels(tmp_path / "5")).max() <= 1
    assert len(np.unique(pixels(tmp_path / "2").reshape(5, -1), axis=0)) == 5
    for flag in ({"guidance_scale": 2}, {"labels": "balanced"}):
        with pytest.raises(ValueError, match=f"--{next(iter(flag))}"):
            draw(tmp_path / "pipe", tmp_path / "set", **flag)


def test_dcdit_without_classes_and_without_flags(make_dcdit_pipeline, tmp_path):
    make_dcdit_pipeline(num_classes=None).save_pretrained(tmp_path / "pipe")
    protocol = draw(tmp_path / "pipe", tmp_path / "set", num_images=2, scheduler="unipc", format="both")
    sampling = protocol["sampling"]
    assert sampling["scheduler"]["class"] == "UniPCMultistepScheduler"
    assert (sampling["guidance"], sampling["budget"], sampling["null_budget"]) == (None, 1.0, None)
    assert [set(text) for text in texts(tmp_path / "set")] == [{"token_share"}] * 2
    with pytest.raises(ValueError, match="--null_budget needs .*classes"):
        draw(tmp_path / "pipe", tmp_path / "none", null_budget=0.1)


def test_passes_without_a_label_have_the_budget_of_the_others(dcdit, tmp_path):
    protocols = [
        draw(dcdit, tmp_path / f"{len(given)}", num_images=2, **given)
        for given in ({"budget": 0.4}, {"budget": 0.4, "null_budget": 0.4})
    ]
    assert protocols[0]["sampling"] == protocols[1]["sampling"]
    assert pngs(tmp_path / "1") == pngs(tmp_path / "2")


# ---- What is refused ----


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"class_labels": ["coffe"]}, "'coffee'"),
        ({"class_labels": ["5"]}, "`class_labels`"),
        ({"class_labels": ["cat", "1"]}, "`classes`"),
        ({"guidance_interval": [0.5, 0.2]}, "`guidance_interval`"),
        ({"grain_source": "true"}, "--reference_data"),
        ({"reference_data": "photos"}, "--reference_data needs --grain_source"),
        ({"grain_source": "fine", "fine_ratio": 0.5}, "--fine_ratio needs --grain_source"),
        ({"grain_source": "random", "grain_num_inference_steps": 5}, "--grain_num_inference_steps needs"),
        ({"budget": 0.5}, "--budget needs a checkpoint of DCDiTPipeline"),
        ({"null_budget": 0.5}, "--null_budget needs a checkpoint of DCDiTPipeline"),
    ],
)
def test_flags_that_make_no_sense_are_refused_and_nothing_is_written(checkpoint, changed, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(checkpoint, tmp_path / "set", **changed)
    assert not list((tmp_path / "set").iterdir())


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"grain_source": "predicted"}, "--grain_source needs a checkpoint of D2iTPipeline"),
        ({"reference_data": "photos"}, "--reference_data needs a checkpoint of D2iTPipeline"),
        ({"fine_ratio": 0.5}, "--fine_ratio needs a checkpoint of D2iTPipeline"),
        ({"grain_guidance_scale": 1}, "--grain_guidance_scale needs a checkpoint of D2iTPipeline"),
        ({"grain_num_inference_steps": 5}, "--grain_num_inference_steps needs a checkpoint of D2iTPipeline"),
        ({"budget": 0}, "`budget`"),
        ({"null_budget": 0}, "`null_budget`"),
    ],
)
def test_flags_that_dcdit_has_no_use_for_are_refused(dcdit, changed, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(dcdit, tmp_path / "set", **changed)
    assert not list((tmp_path / "set").iterdir())


@pytest.mark.parametrize("name", ["DiTPipeline", ["pipeline", "D2iTPipeline"], None])
def test_a_pipeline_of_another_class_is_refused_by_name(checkpoint, name, tmp_path):
    index = json.loads((checkpoint / "model_index.json").read_text()) | {"_class_name": name}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"model_index.json.*D2iTPipeline.*DCDiTPipeline.*{re.escape(repr(name))}"):
        draw(tmp_path / "other", tmp_path / "set")


def test_photographs_that_cannot_be_used_are_left_out(checkpoint, folder, tmp_path, caplog):
    photos, true = tmp_path / "photos", {"grain_source": "true", "num_images": 6, "class_labels": ["coffee"]}
    shutil.copytree(folder, photos)
    for name in ("0.png", "zz.png"):  # before and after the only one that can be used
        (photos / "coffee" / name).write_bytes(b"no image")
    draw(checkpoint, tmp_path / "set", **true, reference_data=photos)
    draw(checkpoint, tmp_path / "whole", **true, reference_data=folder)
    for name in (f"{i:06}.png" for i in range(6)):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {"0.png", "zz.png"} & {Path(record.args[0]).name for record in caplog.records if record.args}
    (usable,) = (folder / "coffee").iterdir()
    (photos / "coffee" / usable.name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"coffee.*\.png"):
        draw(checkpoint, tmp_path / "none", **true, reference_data=photos)


def test_photographs_that_do_not_fit_are_refused(checkpoint, folder, make_pipeline, tmp_path):
    other = make_pipeline(id2label={0: "astronaut", 3: "zebra"}, grain_model=None, grain_scheduler=None)
    other.save_pretrained(tmp_path / "pipe")
    true = {"grain_source": "true", "reference_data": folder}
    with pytest.raises(ValueError, match=r"photos .*3 \(zebra\)"):
        draw(tmp_path / "pipe", tmp_path / "set", **true)
    with pytest.raises(ValueError, match="cat .*classes"):
        draw(checkpoint, tmp_path / "set", **true | {"reference_data": folder / "cat"})
    with pytest.raises(ValueError, match="nowhere"):
        draw(checkpoint, tmp_path / "set", **true | {"reference_data": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match="--grain_source predicted"):
        draw(tmp_path / "pipe", tmp_path / "set")
    draw(tmp_path / "pipe", tmp_path / "set", **true, class_labels="astronaut", num_images=1)


def test_all_processes_end_when_the_folder_is_refused(checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for said in draw_with_two_processes(checkpoint, tmp_path):
        assert "notes.txt" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
