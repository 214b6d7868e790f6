# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The perceptual loss of the first stage; LPIPS needs its extra, and VGG's weights are random, none are downloaded."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from vision_models import save_vision_model

from diffusers_d2it.training import PerceptualLoss


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
MEASURE = """
import sys, torchvision
from diffusers_d2it.training import PerceptualLoss
torch.manual_seed(0)
torch.save(torchvision.models.vgg16(weights=None).state_dict(), sys.argv[1])
loss, photos = PerceptualLoss("lpips"), torch.load(sys.argv[2])
assert loss(photos, photos) == 0 < loss(photos.flip(0), photos)
"""


@pytest.fixture(params=["efficientnet-lite0", "vision transformer"])
def loss_and_photos(request, tmp_path, photos):
    if request.param == "vision transformer":
        return PerceptualLoss(save_vision_model(tmp_path), resolution=42), photos
    return PerceptualLoss("efficientnet-lite0", resolution=64), photos


def test_distance_grows_with_damage_and_moves_the_reconstruction_alone(loss_and_photos):
    loss, photos = loss_and_photos
    noise = torch.randn(photos.shape, generator=torch.Generator().manual_seed(0))
    distances = [loss(photos + strength * noise, photos).item() for strength in (0, 0.05, 0.2)]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert 0 < distances[1] < distances[2] < 4
    pixels, reconstruction = photos.clone().requires_grad_(), (photos + 0.1 * noise).requires_grad_()
    loss(reconstruction, pixels).backward()
    assert pixels.grad is None
    closer = (reconstruction - 0.1 * reconstruction.grad / reconstruction.grad.norm()).detach()
    assert loss(closer, photos) < loss(reconstruction, photos)


def test_distance_is_that_of_directions_at_every_place_and_level(loss_and_photos):
    loss, photos = loss_and_photos
    pixels = F.interpolate(photos, (loss.resolution,) * 2, mode="bicubic", antialias=True)
    distances = [
        (2 - 2 * F.cosine_similarity(a, b, dim=1)).mean().item()
        for a, b in zip(loss.network.levels(pixels.flip(0)), loss.network.levels(pixels))
    ]
    weights = loss.network.level_weights
    expected = sum(weight * distance for weight, distance in zip(weights, distances)) / sum(weights)
    assert loss(photos.flip(0), photos).item() == pytest.approx(expected, rel=1e-4)


def test_logits_are_compared_as_directions_beside_the_levels(photos):
    reconstruction = photos.flip(0).requires_grad_()
    plain, loss = (PerceptualLoss("efficientnet-lite0", 64, weight) for weight in (0.0, 0.5))
    logits = [loss.network.classify(images, (64, 64))[1] for images in (reconstruction, photos)]
    found, of_logits = loss(reconstruction, photos), (2 - 2 * F.cosine_similarity(*logits)).mean()
    assert of_logits > 0.1
    torch.testing.assert_close(found, plain(reconstruction, photos) + 0.5 * of_logits)
    with_logits, without = (torch.autograd.grad(x(reconstruction, photos), reconstruction)[0] for x in (loss, plain))
    assert (with_logits - without).norm() > 0.1 * without.norm()


def test_a_network_without_logits_is_named():
    with pytest.raises(ValueError, match="`perceptual_logits`.*lpips.*0.5"):
        PerceptualLoss("lpips", 64, 0.5)


def test_a_side_that_does_not_suit_the_network_is_named(tmp_path):
    loss = PerceptualLoss(save_vision_model(tmp_path), resolution=None)
    loss.check_resolution(3 * loss.network.multiple)
    with pytest.raises(ValueError, match="`perceptual_resolution`.*33"):
        loss.check_resolution(33)


@pytest.mark.skipif(not (find_spec("lpips") and find_spec("torchvision")), reason="needs the extra lpips")
def test_lpips_is_a_distance(photos, tmp_path):
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(photos, tmp_path / "photos.pt")
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "TORCH_HOME": str(tmp_path)}
    files = map(str, (checkpoints / "vgg16-397923af.pth", tmp_path / "photos.pt"))
    subprocess.run([sys.executable, "-c", DEFINE_OPERATORS + MEASURE, *files], env=environment, check=True)
