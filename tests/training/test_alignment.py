# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Representation alignment with a real, tiny vision transformer."""

import pytest
import torch
from vision_models import save_vision_model

from diffusers_d2it.evaluation import load_vision_network
from diffusers_d2it.grains import tie
from diffusers_d2it.training import Alignment, patches_of


def test_alignment_trains_the_projector_and_the_blocks_below_on_what_has_gradients(
    tmp_path, photos, make_content_model
):
    model = make_content_model(num_layers=3).train()
    alignment = Alignment(model, layer=2, feature_width=16)
    features = load_vision_network(save_vision_model(tmp_path)).tokens(photos, (4, 4))
    grain_map = torch.ones(8, 4, 4, dtype=torch.int64)
    latents = tie(torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), grain_map)
    labels = torch.zeros(8, dtype=torch.int64)
    optimizer = torch.optim.Adam([*model.parameters(), *alignment.parameters()], lr=3e-3)
    losses = []
    for _ in range(25):
        model(latents, 100, grain_map, labels)
        loss = alignment(features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.zero_grad(set_to_none=True)
    model(latents, 100, grain_map, labels)
    alignment(features).backward()
    reached = [block.ff.linear_1.weight.grad is not None for block in model.transformer_blocks]
    assert reached == [True, True, False]

    model.eval()
    model(latents, 100, grain_map, labels)
    before = alignment(features)
    model(latents, 100, grain_map, labels)
    with torch.no_grad():  # samples that are drawn in between
        model(-latents, 900, grain_map, labels)
    torch.testing.assert_close(alignment(features), before)


def test_tokens_of_dcdit_are_aligned_with_the_patch_they_lie_in(tmp_path, photos, make_dcdit):
    model = make_dcdit().train()
    alignment = Alignment(model, layer=1, feature_width=16)
    features = load_vision_network(save_vision_model(tmp_path)).tokens(photos, (4, 4)).flatten(0, 1)
    given = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 100, torch.zeros(8, dtype=torch.int64)
    optimizer = torch.optim.Adam([*model.parameters(), *alignment.parameters()], lr=3e-3)
    losses = []
    for _ in range(25):
        kept = model(*given).kept
        assert kept.float().mean() < 0.9
        loss = alignment(features[patches_of(kept, (4, 4))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("cells, size", [((6, 4), (3, 2)), ((5, 7), (2, 3)), ((4, 4), (4, 4)), ((1, 9), (1, 2))])
def test_every_kept_cell_is_given_its_patch(cells, size):
    kept = torch.rand(3, *cells, generator=torch.Generator().manual_seed(0)) < 0.6
    expected = []
    for image in range(3):
        for row in range(cells[0]):
            for column in range(cells[1]):
                if kept[image, row, column]:
                    patch = int(row * size[0] / cells[0]), int(column * size[1] / cells[1])
                    expected.append((image * size[0] + patch[0]) * size[1] + patch[1])
    assert patches_of(kept, size).tolist() == expected and 0 < len(expected) < kept.numel()
    assert patches_of(torch.ones_like(kept), size).unique().tolist() == list(range(3 * size[0] * size[1]))


def test_a_layer_that_is_not_there_is_named(make_content_model):
    with pytest.raises(ValueError, match="`layer`.* 2, .*3"):
        Alignment(make_content_model(), layer=3, feature_width=16)
