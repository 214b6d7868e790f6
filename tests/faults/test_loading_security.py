# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Folders and repositories that want to run code, reach outside, or change while they are loaded."""

import json
import pickle
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, DiTTransformer2DModel
from loopback_hub import MovingBranch, Uploads, files_of, run_with_hub, serve_hub
from measuring import attempt
from safetensors import SafetensorError

from diffusers_d2it import D2iTGrainModel, D2iTPipeline, DCDiTPipeline
from diffusers_d2it.conversion import (
    convert_dcdit_checkpoint,
    convert_diffusers_dit,
    convert_dit_checkpoint,
    upcycle_dit,
)


WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"


class RunsCode:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.fixture
def canary(tmp_path) -> Path:
    """A file that any code would create that is run here; it does not exist."""
    return tmp_path / "canary"


@pytest.fixture
def planted(tmp_path, canary) -> dict[str, bytes]:
    """What to put into a folder, by what it is: each creates the canary if it is loaded the usual way."""
    torch.save({"weight": RunsCode(canary)}, tmp_path / "torch.bin")
    content = {
        "pickle": pickle.dumps(RunsCode(canary)),
        "torch": (tmp_path / "torch.bin").read_bytes(),
        "module": f"from pathlib import Path\nPath({str(canary)!r}).touch()\nclass D2iTPipeline: pass\n".encode(),
    }
    for kind, load in (
        ("pickle", pickle.loads),
        ("torch", lambda _: torch.load(tmp_path / "torch.bin", weights_only=False)),
        ("module", exec),
    ):
        load(content[kind])
        assert canary.exists(), f"{kind} is harmless, and proves nothing"
        canary.unlink()
    (tmp_path / "torch.bin").unlink()
    return content


@pytest.fixture
def pipeline(make_pipeline, tmp_path) -> Path:
    """A saved pipeline without a manifest."""
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "manifest.json").unlink()
    return tmp_path / "pipeline"


def loaders(pipeline: Path) -> dict:
    """Every way in which a pipeline or a part of it is loaded."""
    part = pipeline / "grain_model"
    return {
        "pipeline": lambda **options: D2iTPipeline.from_pretrained(pipeline, **options),
        "pipeline of diffusers": lambda **options: DiffusionPipeline.from_pretrained(pipeline, **options),
        "model": lambda **options: D2iTGrainModel.from_pretrained(part, **options),
        "part": lambda **options: D2iTGrainModel.from_pretrained(pipeline, subfolder="grain_model", **options),
        "model of diffusers": lambda **options: AutoModel.from_pretrained(str(part), **options),
    }


# ---- Code ----


def test_pickled_weights_are_never_read(pipeline, planted, canary, fault):
    count = fault("pickle planted in the place of weights")
    folder = pipeline / "grain_model"
    whole = (folder / WEIGHTS).read_bytes()
    index = {"metadata": {}, "weight_map": {"patch_embed.weight": PICKLED}}
    for kind in ("pickle", "torch"):
        for names in ([WEIGHTS], [PICKLED], ["model.bin", "pytorch_model.bin"], ["model.flashpack"], "index", "both"):
            (folder / WEIGHTS).unlink(missing_ok=True)
            if names in ("index", "both"):
                (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
                (folder / f"{PICKLED}.index.json").write_text(json.dumps(index))
                names = [PICKLED, WEIGHTS] if names == "both" else [PICKLED]
            for name in names:
                (folder / name).write_bytes(planted[kind])
            for how, load in loaders(pipeline).items():
                count.refused(load, str(folder), what=(kind, names, how))
                count.tried((kind, names, how), silent=canary.exists())
            for name in [*names, f"{WEIGHTS}.index.json", f"{PICKLED}.index.json"]:
                (folder / name).unlink(missing_ok=True)
    (folder / WEIGHTS).write_bytes(whole)
    for name in (PICKLED, "optimizer.bin", "pytorch_model.bin"):
        (folder / name).write_bytes(planted["torch"])
    for how, load in loaders(pipeline).items():  # beside safetensors they are not touched
        load()
        count.tried(how, silent=canary.exists())


def test_pickled_adapters_are_never_read(make_grain_model, planted, canary, tmp_path, fault):
    count = fault("pickle planted in the place of an adapter")
    model = make_grain_model()
    for kind in ("pickle", "torch"):
        for name in ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"):
            folder = tmp_path / f"{kind}-{name}"
            folder.mkdir()
            (folder / name).write_bytes(planted[kind])
            for arguments in ({}, {"weight_name": name}, {"use_safetensors": False}):
                try:
                    model.load_lora_adapter(str(folder), **arguments, local_files_only=True)
                except (ValueError, OSError, SafetensorError):
                    count.tried((kind, name, arguments), silent=canary.exists())
                else:
                    count.tried((kind, name, arguments), silent=True)


def test_modules_in_a_folder_are_never_imported(pipeline, planted, canary, fault):
    count = fault("module planted in a pipeline")
    for name in ("pipeline.py", "D2iTPipeline.py", "vae/model.py", "vae/__init__.py", "grain_model/modeling.py"):
        (pipeline / name).write_bytes(planted["module"])
    for how, load in loaders(pipeline).items():
        load()
        count.tried(how, silent=canary.exists())
    for name in ("vae/diffusers_d2it.py", "scheduler/diffusers.py", "grain_scheduler/diffusers.py"):
        (pipeline / name).write_bytes(planted["module"])
        count.refused(partial(D2iTPipeline.from_pretrained, pipeline), str(pipeline / name), what=name)
        count.refused(partial(DiffusionPipeline.from_pretrained, pipeline), what=name)
        count.tried(name, silent=canary.exists())
        (pipeline / name).unlink()


def test_arguments_that_lead_to_code_are_refused(pipeline, planted, canary, fault):
    count = fault("argument of from_pretrained that leads to code or pickles")
    (pipeline / "pipeline.py").write_bytes(planted["module"])
    hostile = [("custom_pipeline", name) for name in (str(pipeline), "clip_guided_stable_diffusion")]
    hostile += [(name, True) for name in ("load_connected_pipeline", "use_onnx", "use_flashpack")]
    hostile += [("use_safetensors", False), ("custom_revision", "main"), ("provider", "CPUExecutionProvider")]
    for name, value in hostile:
        for how in ("pipeline", "model", "part"):
            load = partial(loaders(pipeline)[how], **{name: value})
            count.refused(load, f"`{name}`", repr(value), what=(how, name))
            count.tried((how, name), silent=canary.exists())
        load = partial(D2iTPipeline.download, "user/repo", **{name: value})
        count.refused(load, f"`{name}`", repr(value), what=("download", name))


def test_trust_runs_no_code_and_is_no_error_where_there_is_none(pipeline, planted, canary, fault):
    count = fault("trust_remote_code=True for a pipeline with code")
    (pipeline / "pipeline.py").write_bytes(planted["module"])  # nothing names it
    trusting = {how: partial(load, trust_remote_code=True) for how, load in loaders(pipeline).items()}
    del trusting["model of diffusers"]  # an AutoModel wants code if it is trusted
    for how, load in trusting.items():
        load()
        count.tried(how, silent=canary.exists())
    index = json.loads((pipeline / "model_index.json").read_text())
    named = {"None.py": {}, "vae/diffusers_d2it.py": {}, "pipeline.py": {"_class_name": ["pipeline", "D2iTPipeline"]}}
    for name, changed in named.items():
        (pipeline / name).write_bytes(planted["module"])  # diffusers would run it
        (pipeline / "model_index.json").write_text(json.dumps(index | changed))
        count.refused(trusting["pipeline"], what=name)
        count.tried(name, silent=canary.exists())
        (pipeline / name).unlink()


def test_a_checkpoint_to_be_converted_runs_no_code(planted, canary, tmp_path, fault):
    count = fault("pickle planted in a checkpoint to be converted")
    file = tmp_path / "dit.pt"
    damaged = [b"", b"PK\x03\x04", planted["torch"][:100], b"<html>404</html>", b"\x80\x02."]
    for content in (planted["pickle"], planted["torch"], *damaged):
        file.write_bytes(content)
        for convert in (convert_dit_checkpoint, convert_dcdit_checkpoint, upcycle_dit):
            count.refused(partial(convert, file), str(file), what=(convert.__name__, content[:10]))
            count.tried((convert.__name__, content[:10]), silent=canary.exists())
    DiTTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8).save_pretrained(tmp_path / "dit")
    (tmp_path / "dit" / WEIGHTS).unlink()
    (tmp_path / "dit" / PICKLED).write_bytes(planted["torch"])
    for convert in (convert_diffusers_dit, upcycle_dit):
        count.refused(partial(convert, tmp_path / "dit"), PICKLED, what=(convert.__name__, "folder"))
        count.tried((convert.__name__, "folder"), silent=canary.exists())


def test_an_autoencoder_of_diffusers_is_no_way_in(make_dcdit_pipeline, tmp_path, planted, canary, fault):
    """diffusers reads a pickle where it finds no safetensors, and whatever class an index names."""
    count, named = fault("pickle planted in the place of weights"), fault("model_index.json that names something else")
    root = tmp_path / "dcdit"
    make_dcdit_pipeline().save_pretrained(root)
    (root / "manifest.json").unlink()
    folder, index = root / "vae", json.loads((root / "model_index.json").read_text())
    whole = (folder / WEIGHTS).read_bytes()
    for kind in ("pickle", "torch"):
        for name in (WEIGHTS, PICKLED, "pytorch_model.bin"):
            (folder / WEIGHTS).unlink(missing_ok=True)
            (folder / name).write_bytes(planted[kind])
            count.refused(partial(DCDiTPipeline.from_pretrained, root), str(folder), what=(kind, name))
            of_diffusers = attempt(partial(DiffusionPipeline.from_pretrained, root))  # in its own words
            count.tried((kind, name), silent=canary.exists() or of_diffusers.error is None)
            (folder / name).unlink()
    (folder / WEIGHTS).write_bytes(whole)
    others = [["diffusers", "UNet2DModel"], ["diffusers_d2it", "DCDiTModel"], ["os", "system"], ["transformers", "X"]]
    for value in others:
        (root / "model_index.json").write_text(json.dumps(index | {"vae": value}))
        named.refused(partial(DCDiTPipeline.from_pretrained, root), str(root / "model_index.json"), "vae", what=value)


# ---- Names ----


def hostile_indices(index: dict) -> Iterator[tuple[str, dict]]:
    """What a model_index.json may not say, with the key that must be named."""
    foreign = [["planted_module", "Model"], ["os", "system"], ["builtins", "eval"]]
    foreign += [["diffusers_d2it.hub.push", "HfApi"]]
    foreign += [["diffusers", "StableDiffusionPipeline"], ["transformers", "CLIPTextModel"], ["", ""], ["diffusers"]]
    foreign += ["diffusers_d2it", 3, {}, [1, 2], ["diffusers_d2it", None], [None, "Model"], ["diffusers", ["DDIM"]]]
    for key in ("vae", "grain_model", "transformer", "scheduler", "grain_scheduler"):
        for value in foreign:
            yield key, index | {key: value}
        if key.endswith("scheduler"):
            for name in ("SchedulerMixin", "KarrasDiffusionSchedulers", "NoSuchScheduler", "../DDIMScheduler"):
                yield key, index | {key: ["diffusers", name]}
            yield key, index | {key: ["diffusers_d2it", "TiedScheduler"]}
    yield "vae", index | {"vae": ["diffusers_d2it", "D2iTContentModel"]}
    for key in ("scheduler",):
        yield key, index | {key: [None, None]}
        yield key, {name: value for name, value in index.items() if name != key}
    for value in (["planted_module", "Pipeline"], "StableDiffusionPipeline", "DiffusionPipeline", None, 3, ""):
        yield "_class_name", index | {"_class_name": value}
    yield "_ignore_files", index | {"_ignore_files": ["vae/config.json"]}
    yield "_use_default_values", index | {"_use_default_values": ["id2label"]}
    labels = [{"a": "cat"}, {"-1": "cat"}, {"1": 2}, {"1": None}, {"1": "x" * 20_000}, {"9" * 30: "x"}]
    for value in ("cat", [1], *labels):
        yield "id2label", index | {"id2label": value}


def test_an_index_cannot_name_other_components(pipeline, canary, planted, tmp_path, fault, monkeypatch):
    count = fault("model_index.json that names something else")
    (tmp_path / "planted_module.py").write_bytes(planted["module"])
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((pipeline / "model_index.json").read_text())
    load = partial(D2iTPipeline.from_pretrained, pipeline)
    for key, changed in hostile_indices(index):
        (pipeline / "model_index.json").write_text(json.dumps(changed))
        what = (key, changed.get(key))
        count.refused(load, str(pipeline / "model_index.json"), key, what=what)
        count.tried(what, silent=canary.exists() or "planted_module" in sys.modules)
    for key in ("safety_checker", "feature_extractor", "../vae", "id2labels"):  # not used, and nothing is imported
        (pipeline / key).mkdir(exist_ok=True)
        (pipeline / key / "planted_module.py").write_bytes(planted["module"])
        (pipeline / "model_index.json").write_text(json.dumps(index | {key: ["planted_module", "Model"]}))
        count.named(load, str(pipeline / "model_index.json"), key, what=key)
        count.tried(key, silent=canary.exists() or "planted_module" in sys.modules)
    (pipeline / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(pipeline / "vae")  # diffusers would look at the top of the folder instead
    count.refused(load, str(pipeline / "vae"), what="vae missing")


@contextmanager
def nobody_calls() -> Iterator[int]:
    """A port of this machine; fails if somebody connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_url_is_opened(fault):
    count = fault("URL in the place of a name")
    with nobody_calls() as port:
        names = [f"http://127.0.0.1:{port}/model", f"HTTPS://127.0.0.1:{port}/a/b", f"http:/127.0.0.1:{port}/model"]
        names += ["hf://user/repo", "s3://bucket/model", "file:///etc/passwd", "zip::http://host/a.zip", "git+ssh://a"]
        for name in names:
            for load in (D2iTPipeline.from_pretrained, D2iTGrainModel.from_pretrained, D2iTPipeline.download):
                count.refused(partial(load, name), repr(name), "URL", what=(load, name))


def test_names_do_not_lead_out_of_the_folder(pipeline, fault):
    count = fault("name that leads out of its folder")
    subfolders = ["../other", "a/../../other", "..\\other", "/etc", "http://host/a"]
    options = [("subfolder", value) for value in subfolders]
    options += [("variant", value) for value in ("../x", "x/../../y", "", 3)]
    for option, value in options:
        for name in (str(pipeline), "user/repo"):
            load = partial(D2iTGrainModel.from_pretrained, name, **{option: value})
            count.refused(load, f"`{option}`", repr(value), what=(name, option, value))


def test_what_is_neither_folder_nor_name_is_refused(tmp_path, fault):
    count = fault("neither a folder nor a name of the Hub")
    (tmp_path / "file").touch()
    for name in (tmp_path / "none" / "such", str(tmp_path / "file"), "a/b/c", "user/re po", "..", "", None, 3):
        for cls in (D2iTPipeline, D2iTGrainModel):
            count.refused(partial(cls.from_pretrained, name), str(name), what=(cls, name))


# ---- The Hub ----


def test_one_commit_serves_all_calls_of_a_load(make_pipeline, tmp_path, fault):
    """The branch moves after every look at it: whoever looks twice gets parts of two commits."""
    count = fault("branch that moves during a load")
    folders = [tmp_path / f"commit-{number}" for number in range(12)]
    pipe = make_pipeline()
    for number, folder in enumerate(folders):
        for model in (pipe.vae, pipe.grain_model, pipe.transformer):
            torch.nn.init.constant_(next(model.parameters()), number)
        pipe.vae.register_to_config(scaling_factor=number + 1.0)
        pipe.save_pretrained(folder, max_shard_size="60KB")
        (folder / "vae" / "evil.py").write_text("raise SystemExit")
    code = """
import huggingface_hub.constants
from diffusers import AutoModel
from diffusers_d2it import D2iTContentModel, D2iTPipeline, DynamicAutoencoderKL

def versions(*models):
    found = {int(next(model.parameters()).unique().item()) for model in models}
    return found | {int(model.config.scaling_factor) - 1 for model in models if "scaling_factor" in model.config}

def load_pipeline(**options):
    pipe = D2iTPipeline.from_pretrained("user/repo", **options)
    assert pipe.config._name_or_path == "user/repo"
    return versions(pipe.vae, pipe.grain_model, pipe.transformer)

def load_part(cls, name):
    return lambda **options: versions(cls.from_pretrained("user/repo", subfolder=name, **options))

ways = {
    "pipeline": load_pipeline,
    "transformer": load_part(D2iTContentModel, "transformer"),
    "auto": load_part(AutoModel, "vae"),
    "vae": load_part(DynamicAutoencoderKL, "vae"),
}
for name, load in ways.items():
    print("online", name, *load())
    print("cached", name, *load(local_files_only=True))
print("commit", "pipeline", *load_pipeline(revision="0" * 39 + "3"))
huggingface_hub.constants.HF_HUB_OFFLINE = True
print("offline", "pipeline", *load_pipeline(revision="0" * 39 + "3"))
print("offline", "vae", *ways["vae"]())
for load in (D2iTPipeline.from_pretrained, D2iTContentModel.from_pretrained):
    try:
        load("user/unknown")
    except OSError as error:
        assert "'user/unknown'" in str(error), error
    else:
        raise AssertionError("nothing was raised")
"""
    branch = MovingBranch(folders)
    with serve_hub({"user/repo": branch}) as endpoint:
        printed = run_with_hub(code, endpoint, tmp_path / "hf")
    kinds = ("online", "cached", "commit", "offline")
    lines = [line.split() for line in printed.splitlines() if line.startswith(kinds)]
    expected = [[kind, name] for name in ("pipeline", "transformer", "auto", "vae") for kind in ("online", "cached")]
    expected += [["commit", "pipeline"], ["offline", "pipeline"], ["offline", "vae"]]
    assert [line[:2] for line in lines] == expected
    seen = [version for kind, _, *versions in lines for version in versions]
    for kind, name, *versions in lines:
        count.tried((kind, name, versions), silent=len(versions) != 1)
    # Every load asked once, the next one found the next commit, and the last one seen is what is known offline
    assert seen == ["0", "0", "1", "1", "2", "2", "3", "3", "2", "2", "3"] and branch.num_asked == 4
    downloaded = {path.name for path in (tmp_path / "hf").rglob("*")}
    assert "evil.py" not in downloaded and "manifest.json" not in downloaded


def test_a_model_pushes_what_it_wrote_and_nothing_else(make_grain_model, tmp_path, fault):
    count = fault("secrets in the folder of a model that is pushed")
    folder = tmp_path / "tiny"
    make_grain_model().save_pretrained(folder)
    (folder / ".env").write_text("a secret")
    (folder / "notes.txt").write_text("a secret")
    uploads, repositories = Uploads(tmp_path / "hub"), {}
    with serve_hub(repositories, uploads) as endpoint:
        code = f"""
from diffusers_d2it import D2iTGrainModel
model = D2iTGrainModel.from_pretrained({str(folder)!r})
model.save_pretrained({str(folder)!r}, push_to_hub=True, private=True)
"""
        run_with_hub(code, endpoint, tmp_path / "hf")
    pushed = files_of(repositories["user/tiny"])
    count.tried(pushed, silent=not set(pushed) <= {"README.md", "config.json", WEIGHTS, "manifest.json"})
    assert {"config.json", WEIGHTS} <= set(pushed) and uploads.visibility == {"user/tiny": "private"}
    for name in pushed:
        content = (repositories["user/tiny"] / name).read_bytes()
        count.tried(name, silent=b"a secret" in content or str(tmp_path).encode() in content)
