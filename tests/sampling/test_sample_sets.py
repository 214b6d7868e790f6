# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Sets of samples: who is drawn with which class and seed, the protocol, and the folder that is filled on."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import forget_group

from diffusers_d2it import D2iTPipeline, open_images
from diffusers_d2it.files import lock, verify
from diffusers_d2it.pixels import unit_to_uint8
from diffusers_d2it.sampling import NpzImages, SampleFolder, SamplePlan, describe_checkpoint, read_protocol
from diffusers_d2it.sampling.sets import new_protocol
from diffusers_d2it.words import differences


# ---- The plan ----


def test_balanced_classes_take_turns():
    plan = SamplePlan(47, 10, classes=(7, 3, 11, 5, 2))
    assert [plan.label(i) for i in range(6)] == [7, 3, 11, 5, 2, 7]
    assert Counter(map(plan.label, range(47))) == {7: 10, 3: 10, 11: 9, 5: 9, 2: 9}


def count_evenly(drawn: list, num_choices: int) -> None:
    """All are drawn, and each as often as another but for five standard deviations."""
    counts, share = Counter(drawn), len(drawn) / num_choices
    assert len(counts) == num_choices and all(abs(count - share) < 5 * share**0.5 for count in counts.values())


def test_random_classes_and_photographs_are_uniform_and_independent_of_one_another():
    plan, other = (SamplePlan(2000, 10, seed=seed, classes=(7, 3, 11, 5), scheme="random") for seed in (0, 1))
    labels, others = plan.labels(range(2000)), other.labels(range(2000))
    count_evenly(labels, 4)
    count_evenly(list(zip(labels, labels[1:])), 16)
    count_evenly(list(zip(labels, others)), 16)
    count_evenly([plan.choice(i, 5) for i in range(2000)], 5)
    count_evenly([(label, plan.choice(i, 5)) for i, label in enumerate(labels)], 20)


def test_no_two_images_have_the_same_noise():
    # The reason for seeds of 32 bits that count up: torch's generator of a CPU does not read the others
    a, b = (torch.randn(9, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32))
    assert torch.equal(a, b)
    plan = SamplePlan(2**32, 64, seed=3)
    first = plan.noise_seed(0)
    images = [0, 1, 2, 2**32 - first - 1, 2**32 - first, 2**32 - 1]
    assert [plan.noise_seed(i) for i in images] == [first, first + 1, first + 2, 2**32 - 1, 0, first - 1]
    noise = [torch.randn(9, generator=generator) for generator in plan.generators(range(50))]
    assert len({tuple(one.tolist()) for one in noise}) == 50
    assert abs(torch.corrcoef(torch.stack(noise)).triu(1).sum() / 1225) < 0.05
    assert len({SamplePlan(1, 1, seed=seed).noise_seed(0) // 10**6 for seed in range(20)}) > 15


@pytest.mark.parametrize("scheme", ["balanced", "random"])
def test_an_image_is_the_same_in_a_larger_set_and_other_batches(scheme):
    small = SamplePlan(10, 4, seed=5, classes=(1, 2, 3), scheme=scheme)
    large = SamplePlan(100, 7, seed=5, classes=(1, 2, 3), scheme=scheme)
    drawn = [[(p.label(i), p.noise_seed(i), p.choice(i, 1000)) for i in range(10)] for p in (small, large)]
    assert drawn[0] == drawn[1]
    assert small.batches() == [range(0, 4), range(4, 8), range(8, 10)]
    assert small.labels(range(4, 8)) == [small.label(i) for i in range(4, 8)]
    assert SamplePlan(3, 2).labels(range(2)) is None


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"num_images": 0}, "`num_images`.* 0"),
        ({"num_images": 2**32 + 1}, "`num_images`.* 4294967297"),
        ({"batch_size": 0}, "`batch_size`.* 0"),
        ({"seed": -1}, "`seed`.* -1"),
        ({"scheme": "even"}, "`scheme`.*balanced.*random.*'even'"),
        ({"classes": (3, 4, 3)}, r"`classes`.* \[3, 4, 3\]"),
        ({"classes": ()}, r"`classes`.* \(\)"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        SamplePlan(**{"num_images": 4, "batch_size": 2} | changed)


# ---- The protocol ----


def test_a_protocol_says_what_the_plan_and_the_machine_are(tmp_path):
    plan = SamplePlan(5, 2, seed=3, classes=(4, 2))
    protocol = new_protocol(plan.describe() | {"sides": (1, 2)}, torch.device("cpu"), str(tmp_path / "mine"))
    sampling = protocol["sampling"]
    assert json.loads(json.dumps(protocol)) == protocol and protocol["complete"] is False
    assert (sampling["num_images"], sampling["seed"], sampling["sides"]) == (5, 3, [1, 2])
    assert sampling["labels"]["classes"] == [4, 2] and sampling["labels"]["scheme"] == "balanced"
    by_hand = torch.Generator().manual_seed((sampling["noise_seeds"]["first"] + 4) % 2**32)
    (generator,) = plan.generators(range(4, 5))
    assert torch.equal(torch.randn(3, generator=by_hand), torch.randn(3, generator=generator))
    assert protocol["environment"]["device"] == "cpu" and protocol["environment"]["torch"] == torch.__version__
    assert protocol["run"] == {"checkpoint": "mine"}
    assert SamplePlan(5, 2).describe()["labels"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2, "sampling": {}, "environment": {}, "run": {}}'])
def test_another_file_is_no_protocol(text, tmp_path):
    (tmp_path / "protocol.json").write_text(text)
    with pytest.raises(ValueError, match="protocol.json"):
        read_protocol(tmp_path)


def changed(before: dict, after: dict) -> list[str]:
    return [line.split()[0] for line in differences(before, after)]


def test_a_checkpoint_is_known_by_its_contents(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "a")
    described = describe_checkpoint(tmp_path / "a", pipe)
    file = tmp_path / "a" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert described["weights_sha256"]["transformer"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert all(set(hashes) == {"vae", "grain_model", "transformer"} for hashes in described.values())

    make_pipeline().save_pretrained(tmp_path / "elsewhere")
    moved = D2iTPipeline.from_pretrained(tmp_path / "elsewhere")
    assert describe_checkpoint(tmp_path / "elsewhere", moved) == described
    moved.vae.register_to_config(scaling_factor=0.5)
    assert changed(described, describe_checkpoint(tmp_path / "elsewhere", moved)) == ["configs_sha256.vae"]

    tensors = load_file(file)
    tensors[next(iter(tensors))].flatten()[0] += 1
    save_file(tensors, file)
    assert changed(described, describe_checkpoint(tmp_path / "a", pipe)) == ["weights_sha256.transformer"]
    pipe.grain_model = None
    assert set(describe_checkpoint(tmp_path / "a", pipe)["weights_sha256"]) == {"vae", "transformer"}


def test_shards_are_part_of_a_checkpoint(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    pipe.transformer.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    shards = sorted((tmp_path / "transformer").glob("*.safetensors"))
    before = describe_checkpoint(tmp_path, pipe)
    assert len(shards) > 1
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"x")
    assert changed(before, describe_checkpoint(tmp_path, pipe)) == ["weights_sha256.transformer"]


# ---- The folder ----

SIZE = (16, 24)
PLAN = SamplePlan(10, 4, classes=(3, 5, 8))


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    forget_group()


def picture(image: int) -> torch.Tensor:
    """Image i, (3, H, W) in [0, 1]."""
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(image))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "set"


@pytest.fixture
def fill(accelerator, folder) -> Callable[..., tuple[list[range], dict]]:
    """fill(format, plan): draw what is missing in the folder; the batches that were, and the protocol."""

    def fill(
        format: str = "png",
        plan: SamplePlan = PLAN,
        stop_after: int | None = None,
        share: str = "fine_share",
        **sampling,
    ):
        sampling = plan.describe() | sampling
        with SampleFolder(folder, plan, sampling, SIZE, format, accelerator, "mine", share) as samples:
            for batch in samples.batches[:stop_after]:
                shares = torch.tensor([i / 16 for i in batch])
                samples.write(batch, torch.stack([picture(i) for i in batch]), shares)
            return samples.batches, samples.finish()

    return fill


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".png", ".npz")}


def test_images_are_those_that_the_pipeline_would_have_made(fill, folder):
    batches, protocol = fill("both")
    assert batches == PLAN.batches()
    expected = VaeImageProcessor.numpy_to_pil(torch.stack([picture(i) for i in range(10)]).permute(0, 2, 3, 1).numpy())
    packed = np.load(folder / "images.npz")["arr_0"]
    for i, image in enumerate(expected):
        with Image.open(folder / f"{i:06d}.png") as stored:
            assert np.array_equal(stored, image) and np.array_equal(packed[i], image)
            assert stored.text == {"fine_share": str(i / 16), "class_label": str((3, 5, 8)[i % 3])}
    assert packed.shape == (10, *SIZE, 3)
    assert protocol == read_protocol(folder) and protocol["complete"] is True
    assert protocol["mean_fine_share"] == sum(range(10)) / 160
    run = protocol["run"]
    assert (run["format"], run["batch_sizes"], run["num_processes"], run["num_drawn"]) == ("both", [4], 1, 10)
    assert run["seconds"] > 0 and run["images_per_second"] > 0 and run["checkpoint"] == "mine"
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{i:06d}.png" for i in range(10)} | {"images.npz", "manifest.json", "protocol.json"}
    verify(folder)


def test_only_missing_and_damaged_images_are_drawn_again(fill, folder):
    fill("both")
    before = contents(folder)
    assert fill("both")[0] == [] and contents(folder) == before
    protocol = (folder / "protocol.json").read_bytes()

    (folder / "000001.png").unlink()
    with (folder / "000008.png").open("r+b") as file:
        file.truncate(300)
    kept = (folder / "000000.png").stat().st_mtime_ns
    with pytest.warns(UserWarning, match="000008.png"):
        batches, _ = fill("both")
    assert batches == [range(0, 4), range(8, 10)]
    assert contents(folder) == before and (folder / "000000.png").stat().st_mtime_ns == kept
    assert json.loads((folder / "protocol.json").read_text())["run"]["num_drawn"] == 2
    assert json.loads(protocol)["sampling"] == read_protocol(folder)["sampling"]


def test_cuts_and_flipped_bits_of_an_image_are_noticed(fill, folder):
    fill()
    path = folder / "000002.png"
    whole = path.read_bytes()
    damaged = [whole[:length] for length in (*range(0, len(whole), 97), len(whole) - 12, len(whole) - 1)]
    for position in (*range(0, len(whole), 101), len(whole) - 12, len(whole) - 1):
        damaged.append(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
    for data in damaged:
        path.write_bytes(data)
        with pytest.warns(UserWarning, match="000002.png"):
            assert fill()[0] == [range(0, 4)]
        assert path.read_bytes() == whole


def test_a_set_that_was_left_off_is_not_complete_and_goes_on(fill, folder):
    with pytest.raises(ValueError, match="000004.png"):
        fill(stop_after=1)
    assert read_protocol(folder)["complete"] is False
    other_batches = SamplePlan(10, 3, classes=(3, 5, 8))
    batches, protocol = fill(plan=other_batches)
    assert batches == [range(3, 6), range(6, 9), range(9, 10)]
    assert protocol["complete"] and protocol["run"]["batch_sizes"] == [3, 4] and protocol["run"]["num_drawn"] == 6


def test_another_protocol_is_refused_and_its_fields_named(fill, folder):
    with pytest.raises(ValueError):  # a mistake, and nothing drawn yet
        fill(steps=500, stop_after=0)
    fill(steps=50)
    before = contents(folder)
    with pytest.raises(ValueError, match="sampling.steps 50, not 20"):
        fill(steps=20)
    with pytest.raises(ValueError, match="sampling.num_images 10, not 9; sampling.labels.classes"):
        fill(plan=SamplePlan(9, 4, classes=(3, 5)), steps=50)
    protocol = read_protocol(folder)
    protocol["environment"]["torch"] = "1.0"
    (folder / "protocol.json").write_text(json.dumps(protocol))
    with pytest.raises(ValueError, match='environment.torch "1.0", not "'):
        fill(steps=50)
    assert contents(folder) == before


def test_folders_that_hold_something_else_are_left_alone(fill, folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="thesis.tex"):
        fill()
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    (folder / "thesis.tex").unlink()
    fill()
    for pixels in (Image.new("RGB", SIZE[::-1]), Image.open(folder / "000001.png")):
        pixels.save(folder / "000004.png")
        mine = (folder / "000004.png").read_bytes()
        with pytest.raises(ValueError, match="000004.png .*image 4"):
            fill()
        assert (folder / "000004.png").read_bytes() == mine
    folder.rename(folder.with_name("old"))
    folder.write_text("")
    with pytest.raises(ValueError, match="set.* file"):
        fill()


def test_a_share_stands_in_pngs_and_protocol_by_its_name(fill, folder):
    protocol = fill(share="token_share")[1]
    assert protocol["mean_token_share"] == sum(range(10)) / 160 and "mean_fine_share" not in protocol
    with Image.open(folder / "000003.png") as stored:
        assert stored.text == {"token_share": "0.1875", "class_label": "3"}
    with pytest.raises(ValueError, match="000000.png .*fine_share"):
        fill(share="fine_share", format="both")


def test_one_run_at_a_time(fill, folder):
    fill()
    (folder / "000001.png").unlink()
    with lock(folder), pytest.raises(ValueError, match=re.escape(str(folder))):
        fill()
    assert len(fill()[0]) == 1


def test_an_npz_alone(fill, folder):
    fill("npz")
    assert sorted(contents(folder)) == ["images.npz"]
    assert np.array_equal(NpzImages(folder / "images.npz").read(3, 4)[0], unit_to_uint8(picture(3)).permute(1, 2, 0))
    before = contents(folder)
    assert fill("npz")[0] == [] and contents(folder) == before
    (folder / "images.npz").write_bytes(before["images.npz"][:-2000])
    with pytest.warns(UserWarning, match="images.npz"):
        assert fill("npz")[0] == PLAN.batches()
    assert contents(folder) == before
    assert fill("both")[0] == PLAN.batches()
    assert len(contents(folder)) == 11 and contents(folder)["images.npz"] == before["images.npz"]
    with pytest.raises(ValueError, match="`format` 'npz'.*'both'"):
        fill("npz")
    assert len(contents(folder)) == 11


def test_a_set_that_was_not_sealed_is_checked_and_sealed(fill, folder):
    fill("both")
    before = contents(folder)
    (folder / "manifest.json").unlink()  # killed right before it
    assert fill("both")[0] == [] and contents(folder) == before
    verify(folder)


def test_pngs_can_be_packed_later_and_both_tell_their_classes(fill, folder):
    drawn = fill("png")[1]["run"]["seconds"]
    labels = open_images(folder).labels.tolist()
    assert labels == [PLAN.label(image) for image in range(PLAN.num_images)]
    batches, protocol = fill("both")
    assert open_images(folder / "images.npz").labels.tolist() == labels
    assert batches == [] and "images.npz" in contents(folder)
    assert protocol["run"]["format"] == "both" and protocol["run"]["seconds"] == drawn


def test_a_disk_that_fails_is_noticed(accelerator, folder):
    with pytest.raises(OSError):
        with SampleFolder(folder, PLAN, PLAN.describe(), SIZE, "png", accelerator, "mine", "fine_share") as samples:
            os.rmdir(samples._staging)
            samples.write(range(0, 4), torch.zeros(4, 3, *SIZE), torch.zeros(4))
            samples.finish()
    assert [path.name for path in folder.iterdir()] == ["protocol.json"]
    assert read_protocol(folder)["complete"] is False


def test_no_more_than_one_batch_waits_to_be_written(accelerator, folder):
    plan = SamplePlan(60, 3)
    with SampleFolder(folder, plan, plan.describe(), SIZE, "png", accelerator, "mine", "fine_share") as samples:
        for batch in samples.batches:
            samples.write(batch, torch.zeros(len(batch), 3, *SIZE), torch.zeros(len(batch)))
            assert len(samples._pending) <= 3
        assert samples.finish()["complete"]
