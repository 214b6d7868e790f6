# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Keeping cells, the way back to all of them, and attention within images, each against plain loops."""

import plain_dcdit
import pytest
import torch

from diffusers_d2it.models.chunking import Chunks, confidence, dechunk, keep_likeliest, nearest_kept, smooth
from diffusers_d2it.models.layers import attend
from diffusers_d2it.models.packed_attention import PackedAttention


SIDES = [(8, 8), (5, 9), (1, 6), (7, 1), (16, 3)]


def probabilities(height: int, width: int, batch: int = 4, levels: int = 0) -> torch.Tensor:
    """In [0, 1], with so many equal values, the corners natural."""
    torch.manual_seed(height * width)
    p = torch.rand(batch, height, width, dtype=torch.float64)
    p = (p * levels).round() / levels if levels else p
    p[:, 0, 0] = p[:, -1, -1] = 1
    return p


@pytest.mark.parametrize("levels", [0, 6])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("budget", [1.0, 0.9, 0.5, 0.3, 0.1, 1e-9])
def test_kept_cells(sides, levels, budget):
    p = probabilities(*sides, levels=levels)
    kept = keep_likeliest(p, budget)
    for image, mask in zip(p, kept):
        assert mask.flatten().nonzero()[:, 0].tolist() == plain_dcdit.kept_of(image, budget)
    each = keep_likeliest(p, torch.tensor([budget, 1, 0.5, budget]))
    assert each[0].equal(kept[0]) and each[3].equal(kept[3]) and each[1].equal(p[1] > 0.5)


def test_the_number_of_kept_cells_is_that_of_decimal_fractions():
    """Of n cells n - n * (100 - b) // 100 stay, whatever float32 makes of b / 100."""
    p = torch.tensor([[k < n for k in range(100)] for n in range(1, 101)])[:, None] * 0.9
    for hundredths in range(1, 101):
        expected = [n - min(n * (100 - hundredths) // 100, n - 1) for n in range(1, 101)]
        for budget in (hundredths / 100, torch.tensor(hundredths / 100), torch.full((100,), hundredths / 100)):
            assert keep_likeliest(p, budget).flatten(1).sum(dim=1).tolist() == expected, budget


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.7, 1.0])
def test_nearest_kept_cell(sides, share):
    """Ties included: on small grids most cells have several."""
    torch.manual_seed(0)
    kept = torch.rand(6, *sides) < share
    kept[torch.arange(6), torch.randint(sides[0], (6,)), torch.randint(sides[1], (6,))] = True
    for mask, nearest in zip(kept, nearest_kept(kept)):
        cells = mask.flatten().nonzero()[:, 0].tolist()
        assert nearest.flatten().tolist() == plain_dcdit.nearest_of(cells, *sides)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_smoothing_and_dechunking(sides, sigma):
    p = probabilities(*sides)
    chunks = Chunks.of(keep_likeliest(p))
    torch.manual_seed(1)
    tokens = torch.randn(len(chunks.cells), 5, dtype=torch.float64)
    ours, back = smooth(tokens, p, chunks, sigma), dechunk(tokens, p, chunks, sigma)
    for i, part in enumerate(tokens.split(chunks.lengths)):
        cells = plain_dcdit.kept_of(p[i], 1.0)
        plain = plain_dcdit.smoothed(part, p[i].flatten(), cells, sides[1], sigma)
        torch.testing.assert_close(ours[chunks.images == i], plain, atol=1e-7, rtol=1e-6)
        expected = torch.stack([plain[cells.index(k)] for k in plain_dcdit.nearest_of(cells, *sides)])
        torch.testing.assert_close(back[i].flatten(0, 1), expected, atol=1e-7, rtol=1e-6)


def test_all_cells_kept_and_sure_is_the_identity():
    p = torch.ones(2, 6, 5)
    tokens = torch.randn(60, 8)
    back = dechunk(tokens, p, Chunks.of(keep_likeliest(p)), 1.0)
    torch.testing.assert_close(back.flatten(0, 2), tokens, atol=1e-3, rtol=1e-3)


def test_confidence_is_1_and_passes_the_gradient():
    p = torch.tensor([[[0.2, 0.5, 0.9]]], requires_grad=True)
    factor = confidence(p)
    assert factor.equal(torch.ones_like(p))
    factor.sum().backward()
    assert p.grad.tolist() == [[[-1, -1, 1]]]


LENGTHS = [(3, 1, 7), (5,), (4, 4, 4), (1,), (1, 1)]


def chunks_of(lengths: tuple[int, ...]) -> Chunks:
    """Images of 3x3 cells that keep so many, here and there."""
    torch.manual_seed(2)
    rank = torch.rand(len(lengths), 9).argsort(dim=1)
    return Chunks.of((rank < torch.tensor(lengths)[:, None]).view(-1, 3, 3))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_where_tokens_are(lengths):
    chunks = chunks_of(lengths)
    assert chunks.lengths == lengths and chunks.starts.diff().tolist() == list(lengths) and chunks.starts[0] == 0
    assert chunks.starts.dtype == torch.int32  # as kernels for several lengths take them
    places = [(i, *cell) for i, mask in enumerate(chunks.kept) for cell in mask.nonzero().tolist()]
    assert [(c // 9, c % 9 // 3, c % 3) for c in chunks.cells.tolist()] == places
    assert chunks.images.tolist() == [image for image, _, _ in places]
    padded = torch.zeros(chunks.is_token.shape, dtype=torch.bool).flatten()
    padded[chunks.slots] = True
    assert torch.equal(padded, chunks.is_token.flatten()) and chunks.is_token.shape[1] >= max(lengths)
    assert chunks.slots.tolist() == sorted(chunks.slots.tolist())
    assert chunks.is_token.sum(dim=1).tolist() == list(lengths)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_attention(lengths):
    """Image by image, padded, and by a backend of diffusers are attention written out, gradients too."""
    torch.manual_seed(0)
    attention, chunks = PackedAttention(16, 2).double(), chunks_of(lengths)
    tokens = torch.randn(sum(lengths), 16, dtype=torch.float64, requires_grad=True)
    parts = zip(*(x.split(lengths) for x in attention.project(tokens)))
    plain = torch.cat([attend(*(x.transpose(0, 1) for x in part)).transpose(0, 1) for part in parts])
    weight = torch.randn_like(plain)
    expected = torch.autograd.grad((weight * plain).sum(), tokens, retain_graph=True)[0]
    query, key, value = attention.project(tokens)
    forms = {
        "by image": attention._by_image(query, key, value, chunks),
        "padded": attention._padded(query, key, value, chunks),
    }
    attention.processor._attention_backend = "native"
    forms["backend"] = attention.attend(query, key, value, chunks)
    for form in forms.values():
        torch.testing.assert_close(form, plain, atol=1e-9, rtol=1e-9)
        found = torch.autograd.grad((weight * form).sum(), tokens, retain_graph=True)[0]
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
