# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A pipeline with its code on a branch: what people see who do not have this package."""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cards import first_snippet
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from loopback_hub import files_of

from diffusers_d2it import D2iTPipeline, DCDiTPipeline, make_model_card
from diffusers_d2it.hub.remote_code import bundled, remote_files


BRANCH = "remote-code"
LOAD = "DiffusionPipeline.from_pretrained('user/tiny', revision='remote-code', trust_remote_code=True)"
# An environment without the package and what it brings that diffusers does not, whatever this one has installed
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers_d2it", "einops", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from diffusers import DiffusionPipeline
"""


WAYS = ("ratio", "painted", "drawn")


def draw(pipe, folder: str) -> None:
    """Guided images by three ways to a map, into a folder. This is also run without the package, from its source."""
    import numpy
    import torch

    painted = torch.zeros(4, 4, dtype=torch.int64)
    painted[1:3, :2] = 1
    pipe.set_progress_bar_config(disable=True)
    for way, of_map in {"ratio": {"fine_ratio": 0.3}, "painted": {"grain_map": painted}, "drawn": {}}.items():
        generator = torch.Generator().manual_seed(0)
        arguments = of_map | {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.7), "num_inference_steps": 4}
        output = pipe([3, "class 7"], generator=generator, output_type="np", **arguments)
        numpy.savez(f"{folder}/{way}.npz", images=output.images, maps=output.grain_maps.numpy())


def pushed(saved: Path, repo_id: str = "user/tiny") -> str:
    """The code that pushes a folder with its code."""
    start = "from diffusers_d2it import D2iTPipeline\n"
    return f"{start}D2iTPipeline.from_pretrained({str(saved)!r}).push_to_hub({repo_id!r}, remote_code=True)\n"


def test_the_same_images_are_drawn_where_the_package_is_missing(saved, hub, tmp_path):
    hub.run(pushed(saved, "user/tiny-1.0"))  # a name of a package that Python could not import
    card = (hub.repositories["user/tiny-1.0"] / "README.md").read_text()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    draw(D2iTPipeline.from_pretrained(saved), str(tmp_path / "here"))
    output = hub.run(f"""{WITHOUT}
{inspect.getsource(draw)}
{first_snippet(card)}
assert output.images[0].size == (32, 32)
draw(pipe, {str(tmp_path / "there")!r})
pipe.save_pretrained({str(tmp_path / "saved")!r})

again = DiffusionPipeline.from_pretrained("user/tiny-1.0", revision="remote-code", trust_remote_code=True)
assert type(again) is type(pipe) and type(again.vae) is type(pipe.vae)
pipe.save_pretrained({str(tmp_path / "saved")!r})  # code that is run again leaves it as it is
try:
    pipe.push_to_hub("user/other")
except ImportError as error:
    print("push:", error)

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
assert not [name for name in dir(diffusers) if "D2iT" in name] and "diffusers_d2it" not in LOADABLE_CLASSES
assert not [name for name in sys.modules if name.partition(".")[0] in ("diffusers_d2it", "einops", "datasets")]
""")
    for way in WAYS:
        here, there = (np.load(tmp_path / folder / f"{way}.npz") for folder in ("here", "there"))
        assert np.array_equal(here["images"], there["images"]) and np.array_equal(here["maps"], there["maps"]), way
    assert len({(tmp_path / "here" / f"{way}.npz").read_bytes() for way in WAYS}) == len(WAYS)
    assert "were not found in your environment" not in output, "diffusers finds everything that the code imports"
    assert re.search(r"push: .*pip install diffusers-d2it", output)
    assert list(hub.repositories) == ["user/tiny-1.0"]
    # What is saved without the package is a pipeline of the package
    assert D2iTPipeline.from_pretrained(tmp_path / "saved").id2label[7] == "class 7, synonym 7"
    index = (tmp_path / "saved" / "model_index.json").read_text()
    assert json.loads(index) == json.loads((saved / "model_index.json").read_text())


def test_dcdit_with_an_autoencoder_of_diffusers_too(make_dcdit_pipeline, hub, tmp_path):
    make_dcdit_pipeline().save_pretrained(tmp_path)
    hub.run(pushed(tmp_path).replace("D2iTPipeline", "DCDiTPipeline"))
    pipe, settings = DCDiTPipeline.from_pretrained(tmp_path), {"num_inference_steps": 2, "budget": 0.5}
    expected = pipe([3], generator=torch.manual_seed(0), **settings).token_counts
    card = (hub.repositories["user/tiny"] / "README.md").read_text()
    hub.run(f"""{WITHOUT}
{first_snippet(card)}
assert output.images[0].size == (32, 32) and type(pipe.vae).__module__.startswith("diffusers.models.")
import torch
assert pipe([3], generator=torch.manual_seed(0), **{settings}).token_counts.tolist() == {expected.tolist()}
pipe.save_pretrained({str(tmp_path / "saved")!r})
""")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index == json.loads((tmp_path / "model_index.json").read_text())


def test_main_stays_as_it_was_and_the_package_runs_no_code(saved, hub):
    hub.run(pushed(saved))
    main, branch = hub.repositories["user/tiny"], hub.uploads.branches["user/tiny", BRANCH]
    assert not [name for name in files_of(main) if name.endswith(".py")]
    code = set(files_of(branch)) - set(files_of(main))
    (pipeline,) = (name for name in code if "/" not in name)
    assert code == {pipeline, *(f"{part}/modeling_d2it.py" for part in ("vae", "grain_model", "transformer"))}
    same = [name for name in files_of(main) if (main / name).read_bytes() == (branch / name).read_bytes()]
    assert set(same) == set(files_of(main)) - {"model_index.json"}
    output = hub.run(f"""
import os
from diffusers import DiffusionPipeline
from diffusers_d2it import D2iTContentModel, D2iTPipeline
for loader in (D2iTPipeline, DiffusionPipeline):
    for trust in (True, False):
        assert type(loader.from_pretrained("user/tiny", trust_remote_code=trust)) is D2iTPipeline
D2iTContentModel.from_pretrained("user/tiny", subfolder="transformer", trust_remote_code=True)
for trust in (True, False):
    try:
        D2iTPipeline.from_pretrained("user/tiny", revision="remote-code", trust_remote_code=trust)
    except ValueError as error:
        print("refused:", error)
assert not os.path.exists(os.environ["HF_HOME"] + "/modules/diffusers_modules/local")
assert type({LOAD}) is not D2iTPipeline  # that runs it, beside the package
""")
    refused = re.findall(r"refused: .*model_index.json: .*`_class_name`.*main.*code", output)
    assert len(refused) == 2, output


def test_without_the_package_main_fails_in_words_of_diffusers_and_the_card_has_the_cure(saved, hub):
    hub.run(pushed(saved).replace("remote_code=True", "remote_code=False"))
    output = hub.run(f"""{WITHOUT}
for arguments in ({{}}, {{"trust_remote_code": True}}, {{"trust_remote_code": True, "revision": "remote-code"}}):
    try:
        DiffusionPipeline.from_pretrained("user/tiny", **arguments)
    except ValueError as error:
        print("failed:", error)
""")
    # diffusers looks for a component's library and says no more; nothing in a repository changes its words
    assert output.count("diffusers_d2it.py as defined in `model_index.json` does not exist in user/tiny") == 3
    card = (hub.repositories["user/tiny"] / "README.md").read_text()
    assert "trust_remote_code" not in card and not hub.uploads.branches
    assert "pip install diffusers-d2it" in first_snippet(card) and "import diffusers_d2it" in card


def test_a_second_push_updates_the_branch_in_one_commit(make_pipeline, make_content_model, saved, hub, tmp_path):
    hub.run(pushed(saved))
    branch = hub.uploads.branches["user/tiny", BRANCH]
    first = set(files_of(branch))
    (branch / "pipeline_d2it_0123456789ab.py").write_text("of an older version")
    (branch / "README.md").write_text("by hand")
    (hub.repositories["user/tiny"] / "README.md").write_text("by hand")
    parts = {"transformer": make_content_model(seed=5), "grain_model": None, "grain_scheduler": None}
    pipe = make_pipeline(id2label={4: "new"}, **parts)
    pipe.save_pretrained(tmp_path / "new")
    output = hub.run(pushed(tmp_path / "new"))
    assert [commit[:2] for commit in hub.uploads.commits] == [("user/tiny", "main"), ("user/tiny", BRANCH)] * 2
    assert set(files_of(branch)) == first - {"grain_model/modeling_d2it.py"}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (branch / weights).read_bytes() == (tmp_path / "new" / weights).read_bytes()
    assert (branch / "README.md").read_text() == "by hand" and "user/tiny keeps its card" in output
    hub.run(f"""{WITHOUT}
pipe = {LOAD}
assert pipe.id2label == {{4: "new"}} and pipe.grain_model is None
assert pipe("new", grain_map="fine", num_inference_steps=1).images
""")


def test_a_training_pushes_code_too(saved, hub):
    hub.run(f"""
from diffusers_d2it import D2iTPipeline
from diffusers_d2it.hub import publish
hub = dict(push_to_hub=True, hub_model_id="user/tiny", hub_private_repo=True, license=None, hub_remote_code=True)
print(publish(D2iTPipeline.from_pretrained({str(saved)!r}), {str(saved)!r}, **hub, train_steps=5))
""")
    branch = hub.uploads.branches["user/tiny", BRANCH]
    assert "trust_remote_code=True" in first_snippet((branch / "README.md").read_text())
    assert json.loads((branch / "model_index.json").read_text())["vae"] == ["modeling_d2it", "DynamicAutoencoderKL"]


# ---- Refusals ----


def test_code_of_other_packages_is_not_known(make_pipeline, saved):
    class Other(D2iTPipeline):
        pass

    with pytest.raises(ValueError, match="`remote_code`.*Other"):
        remote_files(saved, Other)
    index = json.loads((saved / "model_index.json").read_text())
    (saved / "model_index.json").write_text(json.dumps(index | {"scheduler": ["mine", "MyScheduler"]}))
    with pytest.raises(ValueError, match="`scheduler`.*'mine'"):
        remote_files(saved, D2iTPipeline)
    for arguments in ({"create_pr": True}, {"subfolder": "small"}):
        with pytest.raises(ValueError, match=f"`remote_code`.*`{[*arguments][0]}`"):
            make_pipeline().push_to_hub("user/tiny", remote_code=True, **arguments)


def test_a_card_shows_code_of_pipelines_with_a_name_alone(make_pipeline, make_vae):
    for model, arguments in (
        (make_vae(), {"repo_id": "user/tiny"}),
        (make_pipeline(), {"repo_id": None}),
        (make_pipeline(), {"repo_id": "user/tiny", "subfolder": "small"}),
    ):
        with pytest.raises(ValueError, match="`remote_code`"):
            make_model_card(model, license=None, remote_code=True, **arguments)
    card = make_model_card(make_pipeline(), repo_id="user/tiny", license=None, remote_code=True, variant="fp16")
    assert 'variant="fp16", revision="remote-code", trust_remote_code=True' in first_snippet(card.text)
    assert "diffusers_d2it" not in first_snippet(card.text) and "pip install diffusers-d2it" in card.text


# ---- Modules in one file ----

MODULES = {
    "a": "_width = 2.5\n\ndef area(side):\n    '''Größe'''\n    return side * _width\n",
    "b": "from .a import area\n_width = 10.5; größe = _width\n\ndef volume(side):\n    return area(side) * _width\n",
    "c": "from .b import (\n    area,\n    volume,\n)\nimport math\n\nclass Pipe:\n    _models = {}\n"
    "    def both(self):\n        return area(1), math.floor(volume(1))\n"
    "    def push(self):\n        from .d import push\n        return push()\n",
}


@pytest.fixture
def pipe_of(tmp_path, monkeypatch, request):
    """Makes a package of modules, each by its source, and returns the class Pipe of its module c."""

    def make(modules: dict[str, str]) -> type:
        name = f"made_{abs(hash(tmp_path))}"
        (tmp_path / name).mkdir()
        for module, source in ({"__init__": ""} | modules).items():
            (tmp_path / name / f"{module}.py").write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        request.addfinalizer(lambda: [sys.modules.pop(key) for key in [*sys.modules] if key.startswith(name)])
        return importlib.import_module(f"{name}.c").Pipe

    return make


def test_names_of_several_modules_stay_apart(pipe_of):
    code = bundled(pipe_of(MODULES))
    scope = {"__name__": "bundle"}
    exec(code, scope)
    pipe = scope["Pipe"]()
    assert pipe.both() == (2.5, 26)
    with pytest.raises(ImportError, match="diffusers-d2it"):
        pipe.push()
    exec(code, scope)
    assert type(pipe) is scope["Pipe"], "run again, it changes nothing"


@pytest.mark.parametrize(
    "source, named",
    [
        ("from .a import area\ndef volume(_width):\n    return _width\n_width = 3\n", "_width"),
        ("from .a import area\nfrom math import pi as _width\ndef volume(side):\n    return _width\n", "_width"),
        ("from .a import area\n_width = 3\ndef volume(side):\n    return f'{_width}'\n", "_width"),
        ("from .a import area\n_width = 3\ndef volume(side):\n    global _width\n    _width = 4\n", "_width"),
        ("from .a import area\n_width = 3\nclass C:\n    _width = 4\ndef volume(side):\n    return 1\n", "_width"),
        ("from .a import area as area_of\narea = volume = area_of\n", "area as area_of"),
        ("from . import a\narea = volume = a.area\n", "import a"),
    ],
)
def test_what_cannot_be_kept_apart_is_refused(pipe_of, source, named):
    with pytest.raises(ValueError) as raised:
        bundled(pipe_of(MODULES | {"b": source}))
    assert ".b" in str(raised.value) and named in str(raised.value)


def test_the_code_is_read_by_diffusers_as_one_file(tmp_path):
    code = bundled(D2iTPipeline)
    (tmp_path / "code.py").write_text(code)
    assert get_relative_imports(tmp_path / "code.py") == []
    assert not re.search(r"^\s*(from|import)\s+\S*diffusers_d2it", code, re.M)
    assert code == bundled(D2iTPipeline) and "# diffusers_d2it/hub" not in code
