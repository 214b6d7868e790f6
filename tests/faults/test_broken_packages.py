# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A package that is installed and broken breaks only what needs it, and its name is said. In real processes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from image_files import encode, photo, write_folder
from script_runs import EXAMPLES

from diffusers_d2it import D2iTPipeline, bundled_checkpoint
from diffusers_d2it.optional import import_optional, naming_what_is_broken


HERE = Path(__file__).parent

# How packages are broken in the wild: the text of their __init__.py
BROKEN = {
    "bitsandbytes": "raise ImportError('libbitsandbytes.so: undefined symbol: cget_managed_ptr')",
    "flash_attn": "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi')",
    "kornia": "import kornia_rs",  # which is not installed
    "lpips": "import torchvision",
    "matplotlib": "raise AttributeError('_ARRAY_API not found')",
    "onnxruntime": "raise AttributeError('_ARRAY_API not found')",
    "peft": "def broken(:",
    "skimage": "raise ValueError('numpy.dtype size changed, may indicate binary incompatibility')",
    "tensorboard": "raise TypeError('Descriptors cannot be created directly')",
    "torch_fidelity": "raise KeyError('FID')",
    "torchmetrics": "from pkg_resources_of_old import parse_version",
    "torchsde": "from numpy import no_such_name",
    "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
    "wandb": "from . import sdk",  # and there the error
    "xformers": "raise OSError('libcudart.so.12: cannot open shared object file')",
    "zstandard": "from .backend_c import *",  # which its wheel was built without
}
# Those without which diffusers can be imported and a pipeline loaded, and of these those that we ask for
HARMLESS = "flash_attn lpips matplotlib skimage tensorboard torch_fidelity torchmetrics wandb".split()
ASKED_FOR = {*HARMLESS} - {"skimage"}


def broken(parent: Path, *packages: str) -> str:
    """A folder for sys.path in which packages are installed and broken, in version 9.9."""
    root = parent / f"without-{len(list(parent.iterdir()))}"
    for package in packages:
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text(BROKEN[package])
        (root / package / "sdk.py").write_text("raise AssertionError('protobuf')")
        metadata = root / f"{package}-9.9.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
    return str(root)


def start(*command: object, path: str = "") -> subprocess.CompletedProcess:
    """Run a Python script to its end, with a folder before all others in its path."""
    path = os.pathsep.join(filter(None, [path, str(EXAMPLES.parent / "tests"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def is_named(packages: Iterable[str], text: str) -> bool:
    """Whether a text says of one of some packages, by name and version, that it is broken."""
    return any(f"{package} 9.9" in text for package in packages)


def test_an_image_is_drawn_or_what_is_broken_is_named(fault, repeats, tmp_path):
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    image = pipe("lion", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    digest = hashlib.sha256(image.tobytes()).hexdigest()

    fatal = [package for package in BROKEN if package not in HARMLESS]
    groups = [HARMLESS, *([package] for package in fatal[:: repeats(3, 1)])]
    if repeats(0, 1):
        groups += [[package] for package in HARMLESS]
        groups += [["lpips", "torchvision"], *map(list, zip(fatal, HARMLESS))]
    tasks = [(broken(tmp_path, *group), sorted(ASKED_FOR & {*group})) for group in groups]
    result = start(HERE / "without_packages.py", json.dumps(tasks))
    assert result.returncode == 0, result.stderr

    count = fault("a broken package, an image is drawn")
    for group, found in zip(groups, map(json.loads, result.stdout.splitlines()), strict=True):
        in_the_way = [package for package in group if package in fatal]
        for package in group:
            error = found["errors"].get(package, "")
            # Of flash_attn diffusers itself has said at the start that it is broken
            refused = "flash" in error if package == "flash_attn" else is_named([package], error)
            if in_the_way:
                count.tried((group, found), silent=not is_named(in_the_way, found["error"]))
            else:
                lost = found.get("image") != digest
                count.tried((package, found), lost=lost, silent=package in ASKED_FOR and not refused)


# Two scripts in one process, as starting it takes longest: the first must be refused, the second must train
TWO_SCRIPTS = """
import json, sys
from script_runs import call
refused, trained = map(json.loads, sys.argv[1:])
try:
    call("train_dvae.py", *refused)
except ValueError as error:
    print("refused:", error)
call("train_grain.py", *trained)
"""


def test_scripts_train_without_what_they_do_not_need(fault, make_vae, tmp_path):
    photos = write_folder(tmp_path / "photos", {f"a/{i}.png": encode(photo(i)) for i in range(4)})
    make_vae().save_pretrained(tmp_path / "vae")
    common = ["--train_data_dir", photos, "--resolution", 32, "--max_train_steps", 1, "--train_batch_size", 2]
    common += ["--report_to", "none"]
    refused = [*common, "--preset", "dvae-tiny", "--perceptual_weight", 0, "--output_dir", tmp_path / "dvae"]
    trained = [*common, "--preset", "grain-tiny", "--vae", tmp_path / "vae", "--output_dir", tmp_path / "grain"]
    (tmp_path / "two_scripts.py").write_text(TWO_SCRIPTS)

    packages = [package for package in HARMLESS if package != "skimage"]
    arguments = [json.dumps(list(map(str, flags))) for flags in (refused, trained)]
    result = start(tmp_path / "two_scripts.py", *arguments, path=broken(tmp_path, *packages))

    count = fault("a broken package, a script that needs it not")
    lost = result.returncode != 0 or not (tmp_path / "grain" / "grain_model" / "config.json").is_file()
    for package in packages:
        count.tried((package, result.stdout, result.stderr), lost=lost)
    count = fault("a broken package, a script that needs it")
    said = re.search("^refused: .*", result.stdout, re.MULTILINE)[0]
    count.tried(result.stdout + result.stderr, silent=not is_named(["torchmetrics"], said))
    result = start(EXAMPLES / "demo.py", "--output", tmp_path / "demo.png", path=broken(tmp_path, "torchvision"))
    count.tried(result.stderr, silent=result.returncode == 0 or not is_named(["torchvision"], result.stderr))
    result = start(EXAMPLES / "photo_crops.py", "--output_dir", tmp_path / "crops", path=broken(tmp_path, "skimage"))
    count.tried(result.stderr, silent=result.returncode == 0 or "skimage" not in result.stderr)


def test_import_optional(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(broken(tmp_path, "kornia", "wandb"))
    assert import_optional("json.decoder", "reading").__name__ == "json.decoder"
    said = {"no_such_package": [], "kornia": ["9.9", "kornia_rs"], "wandb": ["9.9", "protobuf"]}
    for package, words in said.items():
        with pytest.raises(ValueError, match=package) as raised:
            import_optional(package, "the purpose", extra="training")
        for word in ["the purpose", "diffusers-d2it[training]", *words]:
            assert word in str(raised.value)
        assert raised.value.__cause__ is not None


def test_errors_of_no_import_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), naming_what_is_broken("dividing"):
        raise ZeroDivisionError
