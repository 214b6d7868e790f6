# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Features of metrics. Inception's network is built with random weights, where torch-fidelity is installed."""

import io
import json
import os
from functools import partial
from importlib.util import find_spec

import numpy as np
import PIL.Image
import pytest
import torch
import vision_models
from image_files import photo
from metric_inputs import crops, refused, small_network
from torch import nn
from transformers import Dinov2Model

from diffusers_d2it.evaluation import ImageSet, ModuleFeatures, evaluate, load_features


save_vision_model = partial(vision_models.save_vision_model, image_size=42)


# ---- Vision transformers ----


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
def test_class_token_of_images_as_pillow_resizes_them(tmp_path, kind):
    # As the authors of FD-DINOv2 resize: each channel in floating point, bicubic, clipped
    features = load_features(save_vision_model(tmp_path, kind, crop_size={"height": 28, "width": 28}))
    images = torch.from_numpy(np.stack([np.asarray(photo(i)) for i in range(4)])).permute(0, 3, 1, 2)
    channels = [PIL.Image.fromarray(channel.numpy()) for channel in images.flatten(0, 1).float()]
    resized = np.stack([one.resize((28, 28), PIL.Image.Resampling.BICUBIC) for one in channels]).clip(0, 255)
    mean = torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    pixels = (torch.from_numpy(resized).view(4, 3, 28, 28) / 255 - mean) / 0.2
    extra = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        expected = features.model(pixel_values=pixels, **extra).last_hidden_state[:, 0]
    torch.testing.assert_close(features(images)["pool"], expected, atol=2e-4, rtol=2e-4)
    assert features.name == kind and "28x28, bicubic" in features.describe()["preprocessing"]


@pytest.mark.parametrize("preprocessing, side", [({}, 42), ({"size": 14}, 14), ({"size": {"shortest_edge": 21}}, 21)])
def test_side_of_the_input_is_that_of_the_preprocessing(tmp_path, preprocessing, side):
    assert load_features(save_vision_model(tmp_path, **preprocessing)).side == side


def test_a_vision_model_that_cannot_be_used_is_named(tmp_path):
    refused("nowhere", load_features, str(tmp_path / "nowhere"))
    refused(" 30 .* 7", load_features, save_vision_model(tmp_path, size=30))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    refused("preprocessor_config.json.* image_std", load_features, str(tmp_path))


def test_half_precision_weights_are_used_in_single(tmp_path):
    folder = save_vision_model(tmp_path)
    features = load_features(folder)
    Dinov2Model.from_pretrained(folder).half().save_pretrained(folder)
    halved = load_features(folder)
    images = crops(3, seed=0)
    assert halved(images)["pool"].dtype == torch.float32 and halved.model.dtype == torch.float32
    torch.testing.assert_close(halved(images)["pool"], features(images)["pool"], atol=2e-2, rtol=2e-2)


# ---- Any network ----


def test_a_network_gets_images_in_minus_one_to_one():
    features = ModuleFeatures(nn.Sequential(nn.AvgPool2d(32), nn.Flatten()).eval(), "mean")
    images = crops(5, seed=0)
    torch.testing.assert_close(features(images)["pool"], images.float().mean(dim=(2, 3)) / 127.5 - 1)
    outputs = ModuleFeatures(small_network(), "small")(images)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "pool": (5, 8), "logits": (5, 12), "spatial": (5, 18)
    }  # fmt: skip
    assert not any(value.requires_grad for value in outputs.values())


def test_features_are_full_precision_inside_autocast():
    features, images = ModuleFeatures(small_network(), "small"), crops(5, seed=0)
    expected = features(images)["pool"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(images)["pool"], expected)


def test_digest_tells_weights_apart(tmp_path):
    digests = [ModuleFeatures(small_network(seed), "small").digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert load_features("metric_inputs:small_network").digest == digests[0]
    assert ModuleFeatures(small_network().bfloat16(), "small").digest != digests[0]
    folders = [tmp_path / name for name in ("a", "b", "c")]
    digests = [load_features(save_vision_model(folder, seed=seed)).digest for folder, seed in zip(folders, (0, 0, 1))]
    assert digests[0] == digests[1] != digests[2]


def test_a_network_that_cannot_be_used_is_refused():
    images = crops(2, seed=0)
    refused("'small'.*training", ModuleFeatures, small_network().train(), "small")
    for name in ("", "inception"):
        refused(f"`name`.*got '{name}'", ModuleFeatures, small_network(), name)
    refused(r"'image'.*'pool': \(2, 3, 32, 32\)", ModuleFeatures(nn.Identity().eval(), "image"), images)

    class Tokens(nn.Module):
        def forward(self, pixels):
            return {"tokens": pixels.flatten(1)}

    class First(nn.Module):
        def forward(self, pixels):
            return pixels[:1].flatten(1)

    refused(r"'first'.* 2 .*\(1, 3072\)", ModuleFeatures(First().eval(), "first"), images)
    refused(r"'tokens'.*'tokens': \(2, 3072\)", ModuleFeatures(Tokens().eval(), "tokens"), images)
    for wrong in (images.float(), images[:, :1], images[0]):
        refused("`images`.*uint8", ModuleFeatures(small_network(), "small"), wrong)


def test_what_a_command_line_names_is_loaded_or_refused():
    images = crops(2, seed=0)
    features = load_features("metric_inputs:small_network")
    assert features.name == "small_network"
    assert torch.equal(features(images)["pool"], ModuleFeatures(small_network(), "small")(images)["pool"])
    refused("'no_such_module:load'", load_features, "no_such_module:load")
    refused("'metric_inputs:load'", load_features, "metric_inputs:load")
    refused("'builtins:dict'.* dict", load_features, "builtins:dict")
    refused("`weights`.*'inception'", load_features, "metric_inputs:small_network", weights="weights.pth")


# ---- Inception ----

needs_fidelity = pytest.mark.skipif(
    not (find_spec("torch_fidelity") and find_spec("torchvision")), reason="needs the extra inception"
)


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_without_torch_fidelity_the_way_to_get_it_is_told():
    refused(r'torch_fidelity: `pip install "diffusers-d2it\[incep', load_features, "inception")


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> str:
    """A file of random weights for torch-fidelity's network, which cannot be built without a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Unloaded("inception", ["2048"], feature_extractor_weights_path=empty)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # or all images would have equal features
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return str(path)


@needs_fidelity
def test_inception_gives_what_its_network_gives(inception_weights):
    features, images = load_features("inception", inception_weights), crops(3, seed=0, side=48)
    blocks = []
    features.network.Mixed_6d.register_forward_hook(lambda module, inputs, output: blocks.append(output))
    outputs = features(images)
    pool, logits = features.network(images)
    assert torch.equal(outputs["pool"], pool) and torch.equal(outputs["logits"], logits)
    assert torch.equal(logits, pool @ features.network.fc.weight.T)  # without bias
    # The 1x1 branch stands first in its block; rows, columns, channels as TensorFlow lays them out
    assert torch.equal(outputs["spatial"], blocks[0].movedim(1, 3)[..., :7].reshape(3, 2023))
    assert features.name == "inception" and outputs["spatial"].std() > 0


@needs_fidelity
def test_wrong_weights_of_inception_are_refused_and_the_right_ones_named(inception_weights, tmp_path, monkeypatch):
    import torch_fidelity.feature_extractor_inceptionv3 as module

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save(small_network().state_dict(), tmp_path / "another.pth")
    torch.save({"fc.weight": Hostile()}, tmp_path / "hostile.pth")
    with open(inception_weights, "rb") as file:
        (tmp_path / "cut.pth").write_bytes(file.read(100_000))
    for name in ("nowhere", "another", "hostile", "cut"):
        said = f"{name}.pth .*weights-inception-2015-12-05"
        refused(said, load_features, "inception", str(tmp_path / f"{name}.pth"))
    assert not (tmp_path / "made").exists()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(module, "URL_INCEPTION_V3", "http://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth")
    refused("`weights`.*hub/checkpoints", load_features, "inception")


@needs_fidelity
def test_figures_are_those_of_torch_fidelity(inception_weights):
    from torch_fidelity import calculate_metrics

    class Images(list, torch.utils.data.Dataset):
        """A list, as the library wants it."""

    images, real = crops(24, seed=0), crops(20, seed=1)
    theirs = calculate_metrics(
        input1=Images(images), input2=Images(real), fid=True, isc=True, kid=True, prc=True, cuda=False, verbose=False,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=inception_weights, batch_size=16,
        kid_subset_size=10, kid_subsets=100, rng_seed=2020,
    )  # fmt: skip
    sets = [ImageSet.from_tensor(one, "images") for one in (images, real)]
    metrics = ["fid", "is", "kid", "precision", "recall"]
    with pytest.warns(UserWarning, match="2048 features"):
        found = evaluate(*sets, metrics, load_features("inception", inception_weights), kid_subset_size=10, seed=2020)
    assert [one.metric for one in found] == metrics
    keys = {"fid": "frechet_inception_distance", "is": "inception_score_mean", "kid": "kernel_inception_distance_mean"}
    for one in found:
        assert one.value == pytest.approx(theirs[keys.get(one.metric, one.metric)], rel=1e-3), one.metric
    assert found[0].value > 0.01


def test_networks_of_equal_weights_are_told_apart():
    """Pooling has no weights, and changes every feature."""
    layer = nn.Conv2d(3, 4, 3)
    networks = [nn.Sequential(layer, pool(3), nn.AdaptiveAvgPool2d(1)).eval() for pool in (nn.AvgPool2d, nn.MaxPool2d)]
    one, same, other = (ModuleFeatures(network, "net") for network in (networks[0], *networks))
    assert one.digest == other.digest and one.describe() != other.describe() and one.describe() == same.describe()
