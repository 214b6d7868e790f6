# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Damaged and hostile files of weights: refused by name, or the model is bit for bit the one that was saved."""

import json
import random
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from alike import same_weights
from diffusers import AutoencoderKL
from measuring import Attempt, attempt
from safetensors.torch import load_file, save_file

from diffusers_d2it import D2iTGrainModel, D2iTPipeline
from diffusers_d2it.conversion import convert_autoencoder_kl
from diffusers_d2it.models.autoencoder_kl import load_autoencoder_kl


load = D2iTGrainModel.from_pretrained
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DTYPES = ["F64", "F16", "BF16", "F8_E4M3", "I32", "U32", "I64", "U8", "BOOL", "F4", "f32", "", None, 3, ["F32"]]
NUMBERS = [-1, 0, 1, 7, 2**31, 2**53, 2**63 - 1, 2**64, 10**30, 1.5, None, "8", True, [8]]


@pytest.fixture
def model() -> D2iTGrainModel:
    """A model of 6,000 weights, all of them drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = D2iTGrainModel(
            sample_size=2, num_layers=1, num_attention_heads=1, attention_head_dim=8, mlp_ratio=1, num_classes=2
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The model, saved, without a manifest."""
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    return tmp_path / "model"


def problem_of(found: Attempt, model: torch.nn.Module, *names: str) -> str | None:
    """What is wrong with a load, unless it was refused with these names, or gave the very model that was saved."""
    if found.error is not None:
        return found.problem(*names)
    return found.costs() if same_weights(found.result, model) else "was accepted with other weights"


# ---- Mutations of the bytes of a file ----


def split(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: dict | list | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def flip_in_header(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(len(content) - len(split(content)[1]))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(content)), rng.randrange(len(content))])]


def lengthen(content: bytes, rng: random.Random) -> bytes:
    return content + bytes(rng.choice([1, 4, 4096]))


def other_length(content: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    lengths = [0, 1, 2**20, 2**32, 2**40, 2**63, 2**64 - 1, len(content), len(content) - 8, length + 1, length - 1]
    return struct.pack("<Q", rng.choice([*lengths, rng.randrange(len(content))])) + content[8:]


def other_dtype(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    entry(header, rng)["dtype"] = rng.choice(DTYPES)
    return join(header, data)


def other_shape(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    chosen = entry(header, rng)
    shape = chosen["shape"]
    shapes = [shape[::-1], [*shape, 1], shape[1:], [1, *shape], [n + 1 for n in shape], [-n for n in shape], None]
    shapes += ["shape"]
    shapes += [[rng.choice(NUMBERS), *shape[1:]], [2**32, 2**32], [0, *shape], [2**62] * 20, [1] * 200, {}]
    chosen["shape"] = rng.choice(shapes)
    return join(header, data)


def other_offsets(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    chosen, other = entry(header, rng), entry(header, rng)
    start, stop = chosen["data_offsets"]
    pairs = [[start + 4, stop + 4], [start - 4, stop - 4], [stop, start], [start], [start, stop, stop], None, "all"]
    pairs += [[start, len(data) + 4], [rng.choice(NUMBERS), stop], [start, rng.choice(NUMBERS)], other["data_offsets"]]
    chosen["data_offsets"] = rng.choice(pairs)
    return join(header, data)


def other_name(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    name = rng.choice(names(header))
    renamed = rng.choice([name.upper(), f"{name}.0", f"module.{name}", "", "__proto__", "\x1b[31m", name[:-1], "../x"])
    return join({renamed if key == name else key: value for key, value in header.items()}, data)


def without_tensor(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    del header[rng.choice(names(header))]
    return join(header, data)


def repeated_name(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    name = rng.choice(names(header))
    repeated = f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(entry(header, rng))}}}"
    return join(repeated.encode(), data)


def odd_header(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    metadata = rng.choice([3, {"a": 1}, []])
    odd = [[], {}, [header], {"a": 1}, {**header, "extra": None}, {**header, "__metadata__": metadata}]
    odd += [b"[" * 200_000, b"{" + b'"a":{},' * 250_000 + b'"a":{}}', b"NaN", b"\xff\xfe", b"", b"1" * 5000]
    return join(rng.choice(odd), data)


def not_finite(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    changed = bytearray(data)
    at = 4 * rng.randrange(len(data) // 4)
    changed[at : at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf")]))
    return join(header, bytes(changed))


def another_file(content: bytes, rng: random.Random) -> bytes:
    others = [b"<html>404</html>" * 500, b"PK\x03\x04" + content, b"\x80\x02}q\x00.", b"version https://git-lfs"]
    return rng.choice(others)


def names(header: dict) -> list[str]:
    """Of the tensors."""
    return [name for name in header if name != "__metadata__"]


def entry(header: dict, rng: random.Random) -> dict:
    return header[rng.choice(names(header))]


MUTATIONS = [
    flip_in_header, cut, lengthen, other_length, other_dtype, other_shape, other_offsets, other_name, without_tensor,
    repeated_name, odd_header, not_finite, another_file,
]  # fmt: skip


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_mutated_file_is_refused_or_harmless(model, folder, fault, repeats, mutate):
    count = fault(f"safetensors without a manifest: {mutate.__name__}")
    content = (folder / WEIGHTS).read_bytes()
    rng = random.Random(mutate.__name__)
    num_refused = 0
    for trial in range(repeats(240 if mutate is flip_in_header else 64, 2000)):
        (folder / WEIGHTS).write_bytes(mutate(content, rng))
        found = attempt(partial(load, folder))
        num_refused += found.error is not None
        problem = problem_of(found, model, str(folder))
        count.tried(f"{trial}: {problem}", silent=problem is not None)
    assert num_refused > 0.9 * count.num_tried


def test_any_changed_byte_of_a_sealed_model_is_refused(model, tmp_path, fault, repeats):
    count = fault("safetensors with a manifest: a flipped bit anywhere")
    model.save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    rng = random.Random(0)
    for _ in range(repeats(100, 2000)):
        changed = bytearray(content)
        at = rng.randrange(len(content))
        changed[at] ^= 1 << rng.randrange(8)
        (tmp_path / WEIGHTS).write_bytes(changed)
        count.refused(partial(load, tmp_path), str(tmp_path / WEIGHTS), what=f"byte {at}")


def test_two_tensors_that_change_places_are_noticed_under_a_seal(model, tmp_path, fault):
    """Without one nothing can tell: this is what a manifest is for."""
    count = fault("safetensors with a manifest: tensors exchanged")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    first, second = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"
    save_file(weights | {first: weights[second], second: weights[first]}, tmp_path / WEIGHTS)
    count.refused(partial(load, tmp_path), str(tmp_path / WEIGHTS))
    (tmp_path / "manifest.json").unlink()
    assert torch.equal(load(tmp_path).state_dict()[first], weights[second])


# ---- Several files ----


@pytest.fixture
def index(model, folder) -> dict:
    """The index of the model, saved anew in shards, without a manifest."""
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    (folder / "manifest.json").unlink()
    return json.loads((folder / INDEX).read_text())


def test_shards_and_their_index_must_agree(model, folder, index, fault):
    count = fault("shards, or their index, changed")
    places = index["weight_map"]
    shards = sorted(set(places.values()))
    assert len(shards) > 2 and problem_of(attempt(partial(load, folder)), model) is None
    name = next(key for key, shard in places.items() if shard == shards[0])
    elsewhere = [f"../{folder.name}/{shards[0]}", str(folder / shards[0]), f"sub/{shards[0]}", f"..\\{shards[0]}"]
    no_names = ["weights.bin", ".safetensors", "", None, [shards[0]], "\x00.safetensors"]
    changes = [places | {name: place} for place in (shards[1], *elsewhere, *no_names)]
    changes += [
        places | {"extra.weight": shards[0]},
        {key: shard for key, shard in places.items() if key != name},
        {key: shard for key, shard in places.items() if shard != shards[0]},
        {}, [], None,
    ]  # fmt: skip
    for change in changes:
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": change}))
        count.refused(partial(load, folder), str(folder), what=change)
    for text in ("", "[]", "{}", json.dumps({"weight_map": places}), json.dumps(index)[:-20]):
        (folder / INDEX).write_text(text)
        count.refused(partial(load, folder), str(folder / INDEX), what=text[:20])
    (folder / INDEX).write_text(json.dumps(index))
    for shard in shards:
        content = (folder / shard).read_bytes()
        (folder / shard).unlink()
        count.refused(partial(load, folder), str(folder / shard), what=f"{shard} missing")
        (folder / shard).write_bytes(content[:-1])
        count.refused(partial(load, folder), str(folder / shard), what=f"{shard} cut")
        (folder / shard).write_bytes(content)
    assert problem_of(attempt(partial(load, folder)), model) is None


def test_a_tensor_in_two_shards_is_refused(folder, index, fault):
    """Which of the two counts would be chance."""
    count = fault("tensor in two shards")
    places = index["weight_map"]
    name, shard = next(iter(places.items()))
    other = next(place for place in places.values() if place != shard)
    zeros = torch.zeros_like(load_file(folder / shard)[name])
    save_file(load_file(folder / other) | {name: zeros}, folder / other)
    count.refused(partial(load, folder), str(folder / INDEX), other, name, what=name)


@pytest.mark.parametrize("read", [load, convert_autoencoder_kl, load_autoencoder_kl])
def test_an_absurd_header_is_refused_from_its_first_bytes(tmp_path, fault, read):
    """safetensors itself reads headers of up to 100 MB."""
    count = fault("header that is absurdly long, or contradicts itself")
    if read != load:
        AutoencoderKL(norm_num_groups=4, block_out_channels=(4,), sample_size=8).save_pretrained(tmp_path)
    else:
        D2iTGrainModel(num_layers=1, num_attention_heads=1, attention_head_dim=4).save_pretrained(tmp_path)
        (tmp_path / "manifest.json").unlink()
    header, data = split((tmp_path / WEIGHTS).read_bytes())
    first, second = sorted(names(header), key=lambda name: header[name]["data_offsets"])[:2]
    overlap = header | {second: header[second] | {"data_offsets": [n - 4 for n in header[second]["data_offsets"]]}}
    gap = {name: entry for name, entry in header.items() if name != first}
    padded = json.dumps(header).encode() + b" " * 2**21
    for changed in (padded, overlap, gap):
        (tmp_path / WEIGHTS).write_bytes(join(changed, data))
        count.refused(partial(read, tmp_path), str(tmp_path / WEIGHTS), "header")


def test_weights_that_were_not_saved_with_the_rest_are_refused_or_named(model, tmp_path, fault):
    """What another program puts beside sealed weights would be read in their place."""
    count = fault("other weights put beside sealed ones")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="8KB")
    for file in (tmp_path / "b").glob("diffusion*"):
        file.rename(tmp_path / "a" / file.name)
    count.refused(partial(load, tmp_path / "a"), str(tmp_path / "a"), "manifest.json", what="shards")
    (tmp_path / "a" / INDEX).unlink()
    assert problem_of(attempt(lambda: load(tmp_path / "a")), model) is None
    (tmp_path / "a" / WEIGHTS).rename(tmp_path / "a" / "diffusion_pytorch_model.fp16.safetensors")
    count.named(
        partial(load, tmp_path / "a", variant="fp16"), "fp16.safetensors", "manifest.json"
    )  # in no place of others


def test_an_index_that_only_diffusers_would_read_is_refused(model, tmp_path, fault):
    """It finds these for a variant, and would load shards that were not checked."""
    count = fault("index of shards of a form that is not read")
    model.save_pretrained(tmp_path, variant="fp16")
    for ending in ("fp16.safetensors.index.json", "safetensors.fp16.index.json"):
        index = tmp_path / f"diffusion_pytorch_model.{ending}"
        index.write_text(json.dumps({"metadata": {}, "weight_map": {}}))
        count.refused(partial(load, tmp_path, variant="fp16"), str(index))
        index.unlink()


def test_what_half_precision_cannot_hold_and_a_mixture_of_its_kinds_are_refused(model, folder, fault):
    count = fault("weights too large for the dtype they are cast to")
    file, weights, name = folder / WEIGHTS, load_file(folder / WEIGHTS), "norm_out.proj_out.bias"
    save_file(weights | {name: torch.tensor([1e5, 0.0])}, file)
    assert load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    count.refused(partial(load, folder, torch_dtype=torch.float16), str(file), f"`{name}`", "torch.float16")

    count = fault("float16 among bfloat16")
    save_file({key: value.bfloat16() for key, value in weights.items()}, file)
    assert load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    header, data = split(file.read_bytes())
    header[name]["dtype"] = "F16"
    file.write_bytes(join(header, data))
    count.refused(partial(load, folder), str(file), name, "F16", "BF16", what=name)


def test_a_pipeline_is_sealed_with_all_its_parts(make_pipeline, tmp_path, fault):
    count = fault("pipeline with a manifest: a part of another pipeline")
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "a")
    pipe.scheduler.register_to_config(beta_end=0.01)
    torch.nn.init.normal_(pipe.transformer.patch_embed.bias)
    pipe.save_pretrained(tmp_path / "b")
    for name in (f"transformer/{WEIGHTS}", "scheduler/scheduler_config.json"):
        content = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        count.named(partial(D2iTPipeline.from_pretrained, tmp_path / "a"), str(tmp_path / "a" / name), what=name)
        (tmp_path / "a" / name).write_bytes(content)
    # A part that is saved by itself answers for itself: this is how a user exchanges one
    torch.nn.init.zeros_(pipe.transformer.patch_embed.bias)
    pipe.transformer.save_pretrained(tmp_path / "a" / "transformer")
    assert (D2iTPipeline.from_pretrained(tmp_path / "a").transformer.patch_embed.bias == 0).all()
    pipe.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / "transformer" / "manifest.json").exists()
    assert D2iTPipeline.from_pretrained(tmp_path / "a").scheduler.config.beta_end == 0.01


# ---- Weights of other libraries ----


def test_foreign_weights_are_read_with_the_same_care(tmp_path, fault, repeats):
    count = fault("safetensors to be converted, mutated")
    AutoencoderKL(norm_num_groups=4, block_out_channels=(4,), sample_size=8).save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    expected = convert_autoencoder_kl(tmp_path)[0]
    rng = random.Random(0)
    harmful = [mutate for mutate in MUTATIONS if mutate is not not_finite]
    for trial in range(repeats(len(harmful), 1000)):
        mutate = harmful[trial % len(harmful)]
        (tmp_path / WEIGHTS).write_bytes(mutate(content, rng))

        def convert() -> torch.nn.Module:
            torch.manual_seed(0)
            return convert_autoencoder_kl(tmp_path)[0]

        found = attempt(convert)
        problem = found.problem(tmp_path.name)
        if found.error is None:
            fine = {key for key in expected.state_dict() if ".f2." not in key and "down_blocks.1" not in key}
            same = all(torch.equal(found.result.state_dict()[key], expected.state_dict()[key]) for key in fine)
            problem = None if same else "was accepted with other weights"
        count.tried(f"{mutate.__name__}: {problem}", silent=problem is not None)


def test_an_autoencoder_kl_is_read_with_the_same_care(tmp_path, fault, repeats):
    count = fault("safetensors of an AutoencoderKL, mutated")
    model = AutoencoderKL(norm_num_groups=4, block_out_channels=(4,), sample_size=8)
    model.save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    rng = random.Random(0)
    for trial in range(repeats(len(MUTATIONS), 1000)):
        mutate = MUTATIONS[trial % len(MUTATIONS)]
        (tmp_path / WEIGHTS).write_bytes(mutate(content, rng))
        problem = problem_of(attempt(partial(load_autoencoder_kl, tmp_path)), model, tmp_path.name)
        count.tried(f"{mutate.__name__}: {problem}", silent=problem is not None)
