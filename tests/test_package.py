# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Names that other people's code builds on, the direction of imports, and loading through diffusers."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import diffusers
import pytest
import torch
from alike import same_weights
from script_runs import EXAMPLES

import diffusers_d2it
from diffusers_d2it import D2iTContentModel, D2iTPipeline
from diffusers_d2it.models.layers import DiTBlock


ROOT = Path(diffusers_d2it.__file__).parent
PUBLIC = {
    "D2iTCFGCutoffCallback",
    "bundled_checkpoint",
    "D2iTContentModel",
    "DCDiTModel",
    "DCDiTPipeline",
    "DCDiTPipelineOutput",
    "D2iTGrainModel",
    "D2iTImg2ImgPipeline",
    "D2iTInpaintPipeline",
    "D2iTPipeline",
    "D2iTPipelineOutput",
    "DynamicAutoencoderKL",
    "evaluate",
    "foveated_grain_map",
    "grain_map_from_boxes",
    "grain_map_from_image",
    "grain_map_from_mask",
    "GrainLayout",
    "LatentCodec",
    "list_bundled_checkpoints",
    "list_presets",
    "list_samplers",
    "load_features",
    "load_preset",
    "load_sampler",
    "make_model_card",
    "ModelMixin",
    "open_images",
    "region_entropy",
    "sample_grain_map",
    "tie",
    "visualize_boundary_map",
    "visualize_grain_map",
}


def test_public_names():
    assert set(diffusers_d2it.__all__) == PUBLIC
    assert all(hasattr(diffusers_d2it, name) for name in PUBLIC)


def test_importing_the_package_loads_no_extra():
    extras = ("torchvision", "datasets", "tensorboard", "lpips", "gradio", "skimage")
    code = f"import sys, diffusers_d2it; print([m for m in {extras} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


# Who may import whom: a folder may import those that stand before it; the first is the roof, what lies in none.
FOLDERS = ["", "files", "models", "hub", "data", "pipelines", "conversion", "sampling", "evaluation", "training"]


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports, as dotted names below the package."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            found.add(".".join((*base, *(node.module or "").split("."))).strip("."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers_d2it"):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith(("diffusers_d2it", "examples"))}
    return found


def folder_of(module: str) -> str:
    return module.split(".")[0] if module.split(".")[0] in FOLDERS else ""


def source_files() -> dict[str, Path]:
    """The files by their modules, dotted names below the package; that of the package itself is the front door."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    del files["__init__"]
    return files


def test_imports_go_one_way():
    imports = {module: imported_modules(path) for module, path in source_files().items()}
    for module, imported in imports.items():
        ours, theirs = FOLDERS.index(folder_of(module)), [FOLDERS.index(folder_of(name)) for name in imported]
        late = [name for name, rank in zip(imported, theirs) if rank > ours]
        assert not late, f"{module} must not import {late}"


def test_no_folder_imports_in_a_circle():
    imports = {module.removesuffix(".__init__"): imported_modules(path) for module, path in source_files().items()}
    within = {
        module: {name for name in names if folder_of(name) == folder_of(module)} for module, names in imports.items()
    }
    TopologicalSorter(within).prepare()  # raises a CycleError


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("train_*.py")), ids=lambda path: path.stem)
def test_a_training_script_imports_from_few_of_our_modules(script):
    nodes = [
        node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = [getattr(node, "module", None) or node.names[0].name for node in nodes]
    ours = [name for name in names if name.startswith("diffusers_d2it")]
    assert 1 <= len(ours) <= 6 and not [name for name in ours if name.count(".") > 1], ours


def test_every_folder_says_what_it_is_for():
    for folder in FOLDERS[1:]:
        package = import_module(f"diffusers_d2it.{folder}")
        assert package.__doc__ and package.__all__ and all(hasattr(package, name) for name in package.__all__), folder


def test_internals_of_diffusers_that_registration_relies_on():
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    assert LOADABLE_CLASSES["diffusers_d2it"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    assert TransformerBlockRegistry.get(DiTBlock).return_hidden_states_index == 0
    assert diffusers.D2iTContentModel is D2iTContentModel


def same_pipelines(a: D2iTPipeline, b: D2iTPipeline) -> bool:
    models = all(same_weights(getattr(a, name), getattr(b, name)) for name in ("vae", "grain_model", "transformer"))
    configs = ({key: v for key, v in p.vae.config.items() if not key.startswith("_")} for p in (a, b))
    same_config = len({json.dumps(config, sort_keys=True) for config in configs}) == 1
    return models and type(a) is type(b) and a.id2label == b.id2label and same_config


@pytest.fixture
def saved(make_pipeline, tmp_path) -> Path:
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_model_index_names_the_package_not_a_module_path(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers_d2it", "D2iTContentModel"]
    assert index["id2label"]["3"] == "class 3, synonym 3"


def test_dtype_and_variant(saved, make_pipeline, tmp_path):
    pipe = D2iTPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    pipe.save_pretrained(tmp_path / "bf16", variant="bf16")
    again = D2iTPipeline.from_pretrained(tmp_path / "bf16", variant="bf16", dtype=torch.bfloat16)
    assert same_pipelines(pipe, again)


def test_presets_ship_with_the_package():
    assert set(diffusers_d2it.list_presets()) == {
        "dvae-f8f16", "grain-s", "content-b", "content-l", "content-xl", "dvae-tiny", "grain-tiny", "content-tiny",
        "dcdit-s", "dcdit-b", "dcdit-l", "dcdit-xl", "dcdit-tiny"
    }  # fmt: skip
