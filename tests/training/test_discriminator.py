# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""PatchDiscriminator: what a logit sees, and that it learns to tell photographs from blurred ones."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_d2it.losses import hinge_loss
from diffusers_d2it.training import PatchDiscriminator


def test_a_logit_sees_seventy_pixels_and_one_image(load_photos):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(base_channels=8)
    # Without group norms, whose statistics are the image's, a logit depends on its patch alone
    layers = torch.nn.Sequential(*(x for x in discriminator.layers if not isinstance(x, torch.nn.GroupNorm)))
    pixels = load_photos(128)[:2].requires_grad_()
    logits = layers(pixels)
    assert logits.shape == discriminator(pixels).shape == (2, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    seen = pixels.grad.abs().sum(dim=1)
    rows, columns = seen[0].nonzero(as_tuple=True)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (70, 70)
    assert seen[1].sum() == 0


def test_it_learns_to_tell_photographs_from_blurred_ones(photos):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(base_channels=8)
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    blurred = F.interpolate(F.avg_pool2d(photos, 4), scale_factor=4.0)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    losses = []
    for _ in range(60):
        real, fake = discriminator(torch.cat([photos, blurred])).chunk(2)
        loss = hinge_loss(real, fake)["discriminator"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.2)
    assert losses[-1] < 0.2
    assert all(not torch.equal(before[name], value) for name, value in discriminator.state_dict().items())


@pytest.mark.parametrize("width", [0, 4, 12])
def test_a_width_that_the_norms_cannot_divide_is_named(width):
    with pytest.raises(ValueError, match="`base_channels`"):
        PatchDiscriminator(base_channels=width)
