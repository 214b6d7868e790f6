# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""LPIPS in the first stage. Needs the extra `lpips`; VGG's weights are random here, as nothing is downloaded."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
from script_runs import run, train


# torchvision built for another torch lacks two operators, and importing it fails. LPIPS does not need them.
DEFINE_OPERATORS = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    try:
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass
"""
SAVE_RANDOM_VGG = """
import sys, torch, torchvision
torch.manual_seed(0)
torch.save(torchvision.models.vgg16(weights=None).state_dict(), sys.argv[1])
"""


@pytest.mark.skipif(not (find_spec("lpips") and find_spec("torchvision")), reason="needs the extra lpips")
def test_lpips_is_trained_with(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(DEFINE_OPERATORS)
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    paths = [path for path in sys.path if path]
    environment = {"PYTHONPATH": ":".join([str(tmp_path), *paths]), "TORCH_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SAVE_RANDOM_VGG, str(checkpoints / "vgg16-397923af.pth")]
    subprocess.run(command, env=environment, check=True)
    run("photo_crops.py", "--output_dir", tmp_path / "photos", "--resolution", 32, "--crops", 1)
    losses = {}
    for weight in (1, 0):
        output = tmp_path / f"weight-{weight}"
        arguments = ["--train_data_dir", tmp_path / "photos", "--preset", "dvae-tiny", "--perceptual_weight", weight]
        result = train("train_dvae.py", output, 1, *arguments, **environment)
        losses[weight] = float(result.stderr.rsplit("loss=", 1)[1].split("]")[0])
    assert losses[1] > losses[0]  # a distance was added to the same reconstruction
