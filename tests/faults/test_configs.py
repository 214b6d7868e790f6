# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Configurations that somebody else wrote: what cannot be meant is refused by name before anything is allocated."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from alike import same_weights
from measuring import attempt

from diffusers_d2it import D2iTContentModel, D2iTGrainModel, D2iTPipeline, DCDiTModel, DynamicAutoencoderKL


# What each key holds, written down independently of the library: its kind, and whether it may be null
KINDS = {
    DynamicAutoencoderKL: {
        "in_channels": "whole", "out_channels": "whole", "latent_channels": "whole", "downsample_factors": "wholes",
        "block_out_channels": "wholes", "decoder_block_out_channels": "wholes", "layers_per_block": "whole",
        "norm_num_groups": "whole", "mid_block_add_attention": "flag", "sample_size": "whole",
        "scaling_factor": "positive", "shift_factor": "number?", "grain_ratios": "shares?", "calibration": "object?",
        "use_post_quant_conv": "flag",
    },
    D2iTGrainModel: {
        "sample_size": "whole", "num_grains": "whole", "num_layers": "whole", "num_attention_heads": "whole",
        "attention_head_dim": "whole", "mlp_ratio": "positive", "num_classes": "whole?",
        "fine_ratio_condition": "flag",
    },
    D2iTContentModel: {
        "sample_size": "whole", "in_channels": "whole", "out_channels": "whole?", "num_grains": "whole",
        "num_layers": "whole", "num_refine_layers": "whole", "num_attention_heads": "whole",
        "attention_head_dim": "whole", "mlp_ratio": "positive", "num_classes": "whole?", "window_size": "whole",
        "frequency_shift": "number",
    },
    DCDiTModel: {
        "sample_size": "whole", "in_channels": "whole", "out_channels": "whole?", "num_layers": "whole",
        "num_conv_layers": "whole", "num_attention_heads": "whole", "attention_head_dim": "whole",
        "mlp_ratio": "positive", "num_classes": "whole?", "conv_reduction": "whole", "norm_num_groups": "whole",
        "router": "text", "smoothing_sigma": "positive", "frequency_shift": "number", "conditioning_norm": "flag",
        "position_patch_size": "whole",
    },
}  # fmt: skip
CALIBRATION_KINDS = {
    "quantiles": "entropies", "region_size": "whole", "num_bins": "whole", "sigma": "positive",
    "luma_weights": "shares", "luma_range": "numbers", "num_images": "count", "num_regions": "count",
    "tie_share": "share", "source": "text",
}  # fmt: skip
NAN, INF = math.nan, math.inf
OTHERS = [[], {}, "4", "", {"a": 1}, [[8]]]
HOSTILE_NUMBERS = ["0.5", True, False, NAN, INF, -INF, 1e30, -1e30, [], {}, [0.5]]
HOSTILE = {
    "whole": [*OTHERS, True, False, 2.5, 4.0, NAN, INF, -1, 0, -(10**9), 10**9, 10**12, 10**300],
    "count": [*OTHERS, True, 2.5, NAN, INF, -1, 0, 10**300],
    "flag": [*OTHERS, 0, 1, 1.0, "true", NAN],
    "number": HOSTILE_NUMBERS,
    "positive": [*HOSTILE_NUMBERS, 0, 0.0, -1, -0.5, 1e-30],
    "share": [*HOSTILE_NUMBERS, -0.1, 1.1],
    "object": [[], "4", "", [[8]], {}, 3, True, [1.0, 2.0]],
    "text": [3, True, [], {}, None, NAN],
    "item": ["8", True, NAN, INF, -8, 2**40, [8], {}, None],  # in lists; a list of `n` of one of them
}
# Changes that a user may make, and after which the weights still fit
HARMLESS = {
    DynamicAutoencoderKL: [
        ("scaling_factor", 0.5), ("scaling_factor", 13), ("shift_factor", -0.25), ("sample_size", 512),
        ("grain_ratios", [0.3, 0.7]), ("grain_ratios", None), ("calibration", None),
    ],
    D2iTGrainModel: [("sample_size", 64)],
    D2iTContentModel: [
        ("sample_size", 64), ("frequency_shift", 1), ("out_channels", 4), ("_name_or_path", "user/repo"),
    ],
    DCDiTModel: [("sample_size", 64), ("smoothing_sigma", 2), ("position_patch_size", 2), ("out_channels", 4)],
}  # fmt: skip
# Values that a model may have, but not one with these weights
OF_OTHER_WEIGHTS = {
    DynamicAutoencoderKL: [
        ("layers_per_block", 4), ("use_post_quant_conv", True), ("latent_channels", 16),
        ("block_out_channels", [8, 8, 16, 4096]),
    ],
    D2iTGrainModel: [("num_layers", 90), ("num_classes", None), ("num_classes", 100_000), ("num_grains", 3)],
    D2iTContentModel: [
        ("num_layers", 1), ("num_refine_layers", 16), ("attention_head_dim", 64), ("window_size", 8),
    ],
    DCDiTModel: [
        ("num_layers", 1), ("num_conv_layers", 3), ("conv_reduction", 8), ("router", "cosine"),
        ("conditioning_norm", True), ("num_classes", None),
    ],
}  # fmt: skip
# Values that are each in range, and ask for hundreds of gigabytes together
HUGE = [
    (DynamicAutoencoderKL, {"block_out_channels": [8192] * 4, "layers_per_block": 32}),
    (DynamicAutoencoderKL, {"decoder_block_out_channels": [8192] * 3, "layers_per_block": 20}),
    (D2iTGrainModel, {"num_layers": 96, "num_attention_heads": 64, "attention_head_dim": 128}),
    (D2iTContentModel, {"num_attention_heads": 256, "attention_head_dim": 1024}),
    (D2iTContentModel, {"num_classes": 1_000_000, "num_attention_heads": 256, "attention_head_dim": 128}),
    (DCDiTModel, {"num_attention_heads": 256, "attention_head_dim": 1024}),
    (DCDiTModel, {"num_attention_heads": 64, "attention_head_dim": 128, "num_conv_layers": 16, "conv_reduction": 1}),
]


def hostile_values(kind: str, current: object) -> list:
    """Values that a key of a kind must not have; `current` is one that it may have."""
    nullable, kind = kind.endswith("?"), kind.rstrip("?")
    if kind in ("wholes", "shares", "numbers", "entropies"):
        length = 2 if current is None else len(current)
        values = ["ab", 3, {}, [], [[8] * length], *([item] * length for item in HOSTILE["item"])]
        values += [current[:-1], [*current, current[-1] * 2], [0] * length] if current and kind == "wholes" else []
        values += [current[::-1], [-0.5, *current[1:]], [*current[:-1], 6.0]] if kind == "entropies" else []
        values += [[0.5] * (length + 1), [1.5, -0.5], [0.1] * length] if kind == "shares" else []
    else:
        values = list(HOSTILE[kind])
    return values if nullable or None in values else [*values, None]


@pytest.fixture
def saved(tmp_path, make_pipeline, make_dcdit) -> dict[type, tuple[Path, dict, torch.nn.Module]]:
    """The folder of each class, without a manifest; its configuration; and the model."""
    pipe = make_pipeline()
    pipe.vae.register_to_config(shift_factor=0.1)
    pipe.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    models = {name: getattr(pipe, name) for name in ("vae", "grain_model", "transformer")} | {"dcdit": make_dcdit()}
    models["dcdit"].save_pretrained(tmp_path / "dcdit")
    (tmp_path / "dcdit" / "manifest.json").unlink()
    return {
        type(model): (tmp_path / name, json.loads((tmp_path / name / "config.json").read_text()), model)
        for name, model in models.items()
    }


def changed(saved, cls: type, changes: dict) -> Callable[[], torch.nn.Module]:
    """Change config.json of a model; what loads it then."""
    folder, config, _ = saved[cls]
    (folder / "config.json").write_text(json.dumps(config | changes))
    return partial(cls.from_pretrained, folder)


def all_hostile(saved) -> list[tuple[type, str, object]]:
    """Every key of every class, and of the calibration, with every value that it must not have."""
    found = []
    for cls, kinds in KINDS.items():
        config = saved[cls][1]
        for key, kind in kinds.items():
            found += [(cls, key, value) for value in hostile_values(kind, config[key])]
    calibration = saved[DynamicAutoencoderKL][1]["calibration"]
    for key, kind in CALIBRATION_KINDS.items():
        for value in hostile_values(kind, calibration[key]):
            found.append((DynamicAutoencoderKL, "calibration", calibration | {key: value}))
    return found


def changed_in(changes: dict, config: dict) -> tuple[str, object]:
    """The key that has been changed and its value, inside of the calibration if it is there."""
    key, value = next(iter(changes.items()))
    if key == "calibration" and isinstance(value, dict) and value.keys() == (config[key] or {}).keys():
        return next((k, v) for k, v in value.items() if json.dumps(v) != json.dumps(config[key][k]))
    return key, value


def test_values_that_cannot_be_meant_are_refused_with_key_value_and_file(saved, fault):
    from_file, direct = fault("config.json with a hostile value"), fault("constructor with a hostile value")
    mutations = all_hostile(saved)
    assert len(mutations) > 600
    for cls, key, value in mutations:
        folder, config, _ = saved[cls]
        name, item = changed_in({key: value}, config)
        what = f"{cls.__name__} {name}={repr(item)[:60]}"
        file = str(folder / "config.json")
        from_file.refused(changed(saved, cls, {key: value}), file, name, said(item), what=what)
        public = {k: v for k, v in (config | {key: value}).items() if k[0] != "_"}
        direct.refused(partial(cls, **public), name, said(item), what=what)


def said(value: object) -> str:
    """How an error shows a value: whole if it is short. Long lists are named by their worst item at least."""
    return repr(value) if len(repr(value)) < 60 else ""


def of_classes(table: dict[type, list[tuple]]) -> list[tuple[type, str, object]]:
    return [(cls, key, value) for cls, changes in table.items() for key, value in changes]


def test_values_in_range_make_the_model_they_describe_or_do_not_fit_its_weights(saved, fault):
    harmless, unfit = fault("config.json with another value in range"), fault("config.json of other weights")
    for cls, key, value in of_classes(HARMLESS):
        _, _, original = saved[cls]
        loaded = attempt(changed(saved, cls, {key: value}))
        assert loaded.error is None, (cls, key, value, loaded.error)
        same = same_weights(loaded.result, original)
        found = loaded.result.config[key]
        described = key[0] == "_" or (found == value and type(found) is type(value))
        harmless.tried((cls, key, value, loaded.costs()), silent=not (same and described) or bool(loaded.costs()))
    for cls, key, value in of_classes(OF_OTHER_WEIGHTS):
        load = changed(saved, cls, {key: value})
        unfit.refused(load, str(saved[cls][0]), cls.__name__, "weight", what=(cls, key, value))


def test_values_that_ask_for_too_much_together_are_refused(saved, fault):
    count = fault("config.json that asks for hundreds of gigabytes")
    for cls, changes in HUGE:
        load, file = changed(saved, cls, changes), str(saved[cls][0] / "config.json")
        count.refused(load, file, next(iter(changes)), "parameters", what=(cls, changes))


UNKNOWN = [
    ({"heads": 4}, "'heads'"),
    ({"auto_map": {"AutoModel": "evil.Model"}, "dtype": "bfloat16"}, "'auto_map', 'dtype'"),
    ({"self": 4}, "'self'"),
    ({"\x1b[31mred": 1}, r"'\x1b[31mred'"),
]
FOREIGN = [
    *(
        ({"_class_name": name}, "`_class_name`", repr(name))
        for name in ("UNet2DModel", "D2iTPipeline", None, ["os", "x"])
    ),
    *(({"_use_default_values": value}, "`_use_default_values`") for value in (["sample_size", "num_classes"], 3)),
    ({"quantization_config": "bitsandbytes"}, "`quantization_config`", "'bitsandbytes'"),
    ({"decay": "fast"}, "`decay`", "'fast'"),
]


def test_keys_that_no_model_has_are_named_and_not_used(saved, fault):
    count = fault("config.json with an unknown key")
    for cls in KINDS:
        folder, _, original = saved[cls]
        for changes, expected in UNKNOWN:
            load = changed(saved, cls, changes)
            count.named(load, str(folder / "config.json"), expected, what=(cls, changes))
            assert same_weights(load(), original)


def test_other_classes_and_hostile_keys_are_refused(saved, fault):
    count = fault("config.json with a foreign class or hostile key")
    for cls in KINDS:
        for changes, *expected in FOREIGN:
            file = str(saved[cls][0] / "config.json")
            count.refused(changed(saved, cls, changes), file, *expected, what=(cls, changes))


@pytest.mark.parametrize("name", ["config.json", "model_index.json", "scheduler_config.json"])
def test_files_that_are_no_configuration_are_refused(saved, fault, name):
    count = fault("configuration that is no JSON object")
    root = saved[D2iTGrainModel][0].parent
    file = {"config.json": "grain_model/config.json", "scheduler_config.json": "grain_scheduler/scheduler_config.json"}
    file = root / file.get(name, name)
    whole = file.read_bytes()
    contents = [b"", whole[: len(whole) // 2], b"<html>404</html>", b"[]", b"null", b"3", b'"config"', b"\xff\xfe"]
    contents += [b"{}", b"[" * 10**6, b'{"a":' * 10**5, b"[" + b"[]," * 10**6 + b"[]]", b" " * 2**23, b"1" * 5000]
    load = partial(D2iTPipeline.from_pretrained, root)
    for content in contents:
        file.write_bytes(content)
        count.refused(load, str(file), what=content[:20])
    file.unlink()
    count.refused(load, str(file), what="missing")


SCHEDULER = {
    "num_train_timesteps": [0, -1, 10**9, 10**13, "1000", 1000.5, NAN, None, True],
    "beta_start": [NAN, INF, -1, 2, "0.1", None],
    "beta_end": [NAN, -INF, -0.1, 10, [0.1]],
    "trained_betas": [[NAN], [], "betas", [-1.0], ["0.1"], {"a": 1}],
    "_class_name": [None, 3, ["evil", "Scheduler"]],
    "_use_default_values": [["beta_start"], 3],
}


def test_schedulers_out_of_range_are_refused(saved, fault):
    count = fault("scheduler_config.json with a hostile value")
    root = saved[D2iTGrainModel][0].parent
    file = root / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    for key, values in SCHEDULER.items():
        for value in values:
            file.write_text(json.dumps(config | {key: value}))
            count.refused(partial(D2iTPipeline.from_pretrained, root), str(file), f"`{key}`", what=(key, value))


def test_what_could_not_be_loaded_is_not_saved(make_vae, tmp_path, fault):
    count = fault("configuration of a model made hostile before saving")
    for key, value in (("scaling_factor", NAN), ("scaling_factor", 0.0), ("shift_factor", INF), ("sample_size", "64")):
        vae = make_vae()
        vae.register_to_config(**{key: value})
        problem = attempt(lambda vae=vae: vae.save_pretrained(tmp_path / "vae")).problem(f"`{key}`", repr(value))
        count.tried((key, value, problem), silent=problem is not None or (tmp_path / "vae").exists())
