# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A package that is installed and broken breaks only what needs it, and its name is said. In real processes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import encode, photo, write_folder
from script_runs import EXAMPLES, run, train

from diffusers_d2it import D2iTPipeline, bundled_checkpoint
from diffusers_d2it.broken_packages import call_around


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
FOUND_AT_IMPORT = "bitsandbytes kornia onnxruntime peft torchsde torchvision xformers zstandard".split()
# On a GPU only, by nothing, by a script, by lpips, by torch
NOT_ASKED_FOR = "bitsandbytes matplotlib skimage torchvision zstandard".split()


@pytest.fixture
def broken(tmp_path) -> Callable[..., dict[str, str]]:
    """broken(*packages): the environment of a process where they are installed and broken."""

    def make(*packages: str) -> dict[str, str]:
        root = tmp_path / f"without-{len(list(tmp_path.iterdir()))}"
        for package in packages:
            (root / package).mkdir(parents=True)
            (root / package / "__init__.py").write_text(BROKEN[package])
            (root / package / "sdk.py").write_text("raise AssertionError('protobuf')")
            metadata = root / f"{package}-9.9.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
        return {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}

    return make


def start(*command: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a Python script to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def is_named(package: str, text: str) -> bool:
    return package.replace("_", "") in text.lower().replace("_", "").replace("-", "")


def test_images_are_drawn_and_what_is_broken_is_named(fault, repeats, broken):
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    image = pipe("lion", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    digest = hashlib.sha256(image.tobytes()).hexdigest()

    together = [package for package in BROKEN if package not in ("torchmetrics", "skimage")]
    count = fault("a broken package, an image is drawn")
    for packages in [together, *([package] for package in BROKEN if repeats(0, 1))]:
        asked = [package for package in packages if package not in NOT_ASKED_FOR]
        result = start(HERE / "without_packages.py", *asked, **broken(*packages))
        drawn = json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else {"image": result.stderr}
        for package in packages:
            if drawn["image"] != digest:
                count.tried((packages, drawn["image"]), lost=True)
                continue
            warned = sum(warning.startswith(f"{package} 9.9") for warning in drawn["warnings"])
            warned += f"{package} is installed but failed to import" in result.stderr  # by diffusers itself
            error = drawn["errors"].get(package, "")
            refused = package in NOT_ASKED_FOR or is_named(package, error)
            if package == "lpips" and "torchvision" in packages:  # the fault is not its own
                refused = refused and "torchvision 9.9 is installed and cannot be imported" in error
            enough = warned == 1 or (warned == 0 and package not in FOUND_AT_IMPORT)
            count.tried((package, drawn, result.stderr), silent=not (enough and refused))


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


def train_all(output: Path, environment: dict[str, str]) -> bool:
    """The scripts one after another; whether the last one has drawn its picture."""
    run("photo_crops.py", "--output_dir", output / "photos", "--resolution", 64, "--crops", 1)
    data, weights = ["--train_data_dir", output / "photos"], ["--perceptual_weight", 0]
    train("train_dvae.py", output / "dvae", 2, *data, *weights, "--preset", "dvae-tiny", **environment)
    vae, cache = ["--vae", output / "dvae" / "vae"], ["--latent_cache", output / "cache"]
    run("cache_latents.py", *data, *vae, "--resolution", 32, "--output_dir", output / "cache", **environment)
    train("train_grain.py", output / "grain", 2, *cache, *vae, "--preset", "grain-tiny", **environment)
    arguments = [*cache, *vae, "--grain", output / "grain", "--preset", "content-tiny"]
    train("train_d2it.py", output / "d2it", 2, *arguments, **environment)
    drawn = ["--checkpoint", output / "d2it" / "pipeline", "--output", output / "demo.png"]
    run("demo.py", *drawn, "--num_inference_steps", 2, **environment)
    return (output / "demo.png").is_file()


def test_scripts_train_without_what_they_do_not_need(fault, repeats, broken, make_vae, tmp_path):
    photos = write_folder(tmp_path / "photos", {f"a/{i}.png": encode(photo(i)) for i in range(4)})
    make_vae().save_pretrained(tmp_path / "vae")
    common = ["--train_data_dir", photos, "--resolution", 32, "--max_train_steps", 1, "--train_batch_size", 2]
    common += ["--report_to", "none"]
    refused = [*common, "--preset", "dvae-tiny", "--perceptual_weight", 0, "--output_dir", tmp_path / "dvae"]
    trained = [*common, "--preset", "grain-tiny", "--vae", tmp_path / "vae", "--output_dir", tmp_path / "grain"]
    (tmp_path / "two_scripts.py").write_text(TWO_SCRIPTS)

    packages = ["torchvision", "torchmetrics", "tensorboard", "lpips", "peft"]
    environment = broken(*packages)
    environment["PYTHONPATH"] += os.pathsep + str(EXAMPLES.parent / "tests")
    arguments = [json.dumps(list(map(str, flags))) for flags in (refused, trained)]
    result = start(tmp_path / "two_scripts.py", *arguments, **environment)

    count = fault("a broken package, a script that needs it not")
    lost = result.returncode != 0 or not (tmp_path / "grain" / "grain_model" / "config.json").is_file()
    for package in packages:
        count.tried((package, result.stdout, result.stderr), lost=lost)
    for packages in [["torchvision"], ["torchvision", "peft", "xformers"]][: repeats(0, 2)]:
        count.tried(packages, lost=not train_all(tmp_path / "-".join(packages), broken(*packages)))
    count = fault("a broken package, a script that needs it")
    needed = "scoring reconstructions needs a package that is broken: torchmetrics 9.9 is installed"
    count.tried(result.stdout + result.stderr, silent=f"refused: {needed}" not in result.stdout)
    count.tried(result.stderr, silent="RuntimeWarning: torchvision 9.9 is installed" not in result.stderr)
    result = start(EXAMPLES / "photo_crops.py", "--output_dir", tmp_path / "crops", **broken("skimage"))
    count.tried(result.stderr, silent=result.returncode == 0 or "skimage" not in result.stderr)


def test_where_nothing_is_broken_it_is_one_plain_call():
    calls = []
    assert call_around(lambda: calls.append(1) or "result") == "result"
    with pytest.raises(ZeroDivisionError):
        call_around(lambda: calls.append(1) or 1 / 0)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        call_around(lambda: calls.append(1) or __import__("no_such_package"))
    assert len(calls) == 3
