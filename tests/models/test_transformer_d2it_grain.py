# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The grain model: a DiT with a token a region, and the states that it is given."""

import math

import pytest
import torch
import torch.nn.functional as F
from grain_maps import random_map

from diffusers_d2it import D2iTGrainModel
from diffusers_d2it.losses import grain_loss
from diffusers_d2it.models.layers import sincos_positions


KINDS = pytest.mark.parametrize("num_grains", [2, 3])


def inputs(num_grains: int = 2, batch: int = 3, height: int = 4, width: int = 6, seed: int = 0) -> dict:
    """A noised map that is not square, and a timestep, a label and a ratio of its own for every image."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, num_grains, height, width, generator=generator),
        "timestep": torch.tensor([10, 500, 999, 3])[:batch],
        "class_labels": torch.tensor([0, 9, 10, 4])[:batch],  # 10 is "no class"
        "fine_ratio": torch.tensor([0.3, math.nan, 1.0, 0.0])[:batch],
    }


# ---- Output ----


@KINDS
def test_before_training_every_grain_is_equally_likely_and_the_way_out_is_open(make_grain_model, num_grains):
    """adaLN-Zero and the zero output layer block most gradients at first."""
    model = make_grain_model(num_grains, randomize=False).train()
    logits = model(**inputs(num_grains)).logits
    assert torch.equal(logits.softmax(dim=1), torch.full_like(logits, 1 / num_grains))
    grain_loss(logits, torch.ones(3, 4, 6, dtype=torch.int64))["loss"].backward()
    assert model.norm_out.proj_out.weight.grad.abs().max() > 0


# ---- Positions and conditions ----


@KINDS
@torch.no_grad()
def test_the_model_is_a_dit_with_a_token_a_region(make_grain_model, num_grains):
    model, arguments = make_grain_model(num_grains), inputs(num_grains, batch=4)
    ratios = [
        model.null_fine_ratio if ratio.isnan() else model.fine_ratio_embed(1000 * ratio[None], torch.float32)[0]
        for ratio in arguments["fine_ratio"]
    ]
    conditioning = model.time_embed(arguments["timestep"], torch.float32) + torch.stack(ratios)
    conditioning = F.silu(conditioning + model.label_embed(arguments["class_labels"]))
    tokens = model.patch_embed(arguments["hidden_states"].flatten(2).mT)
    tokens = tokens + sincos_positions((4, 6), tokens)
    for block in model.transformer_blocks:
        tokens = block(tokens, conditioning)
    expected = model.norm_out(tokens, conditioning).mT.unflatten(2, (4, 6))
    torch.testing.assert_close(model(**arguments).logits, expected)
    left_open = [model(**arguments | {"fine_ratio": ratio}).logits for ratio in (None, torch.full((4,), math.nan))]
    assert torch.equal(*left_open)


@torch.no_grad()
def test_the_place_of_a_region_is_its_row_and_column_whatever_the_size_of_the_map(make_grain_model):
    """Tokens that do not look at one another: a window of a map is the map of the window at the top left."""
    model = make_grain_model()
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.adaln.weight)
        torch.nn.init.zeros_(block.adaln.bias)
    large = inputs(height=7, width=8)
    for height, width in ((4, 6), (6, 4), (7, 3)):
        small = large | {"hidden_states": large["hidden_states"][..., :height, :width]}
        torch.testing.assert_close(model(**small).logits, model(**large).logits[..., :height, :width])


@torch.no_grad()
def test_a_model_without_the_ratio_condition_has_no_weights_for_it(make_grain_model):
    model = make_grain_model(fine_ratio_condition=False)
    arguments = inputs()
    ratio = arguments.pop("fine_ratio")
    assert model(**arguments).logits.shape == (3, 2, 4, 6)
    assert not any("fine_ratio" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="`fine_ratio`.*fine_ratio_condition"):
        model(**arguments, fine_ratio=ratio)


# ---- States ----


@KINDS
def test_the_state_of_a_map_is_plus_one_at_its_grain_and_minus_one_elsewhere(num_grains):
    grain_map = random_map(num_grains)
    state = D2iTGrainModel.state_from_grain_map(grain_map, num_grains)
    assert state.shape == (3, num_grains, 4, 6) and state.dtype == torch.float32
    for grain in range(num_grains):
        assert torch.equal(state[:, grain] == 1, grain_map == grain)
        assert torch.equal(state[:, grain] == -1, grain_map != grain)
    torch.testing.assert_close(D2iTGrainModel.expected_state(100 * state), state)


@KINDS
def test_the_expected_state_is_the_mean_over_the_grains(num_grains):
    logits = torch.randn(2, num_grains, 3, 5, generator=torch.Generator().manual_seed(0))
    mean = torch.zeros_like(logits)
    for grain in range(num_grains):
        state = D2iTGrainModel.state_from_grain_map(torch.full((2, 3, 5), grain), num_grains)
        mean += logits.softmax(dim=1)[:, grain : grain + 1] * state
    torch.testing.assert_close(D2iTGrainModel.expected_state(logits), mean)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(3, 3, 4, 6)}, r"`hidden_states`.*\(B, 2, h, w\).*\(3, 3, 4, 6\)"),
        ({"hidden_states": torch.zeros(3, 2, 4)}, r"`hidden_states`.*\(3, 2, 4\)"),
        ({"fine_ratio": torch.tensor([0.5])}, r"`fine_ratio`.*\(3,\)"),
        ({"fine_ratio": torch.tensor([0, 1, 1])}, "`fine_ratio`.*int64"),
        ({"fine_ratio": torch.tensor([0.5, 1.5, math.nan])}, r"`fine_ratio`.*\[0, 1\]"),
        ({"fine_ratio": torch.tensor([0.5, -0.5, math.nan])}, r"`fine_ratio`.*\[0, 1\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make_grain_model, changes, message):
    with pytest.raises(ValueError, match=message):
        make_grain_model()(**(inputs() | changes))
