# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Quality and cost over fine ratios: counted by hand, by another way, and by what must grow."""

import sys
from collections.abc import Sequence

import PIL.Image
import pytest
import torch
from metric_inputs import small_network
from photographs import load_photographs
from torch import nn

from diffusers_d2it import D2iTPipeline
from diffusers_d2it.evaluation.budget import (
    TimedCall,
    budget,
    budget_table,
    check_matplotlib,
    check_ratios,
    cost_of,
    count_macs,
    fine_tokens,
    plot_budget,
    reconstruction_at,
)
from diffusers_d2it.evaluation.features import ModuleFeatures
from diffusers_d2it.evaluation.images import ImageSet
from diffusers_d2it.evaluation.map_sources import Sampling
from diffusers_d2it.evaluation.reconstruction import psnr
from diffusers_d2it.pixels import to_uint8


RATIOS = (0.0, 0.3, 1.0)
SAMPLING = Sampling(num_inference_steps=3, grain_num_inference_steps=3, batch_size=3)
LABELS = torch.arange(8)

pytestmark = pytest.mark.filterwarnings("ignore:fd_conv. there are no more images")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Eight photographs, uint8 (8, 3, 32, 32)."""
    return to_uint8(load_photographs(32))


def budget_of(pipe: D2iTPipeline, images: torch.Tensor, ratios: Sequence[float]) -> list[dict]:
    """Compared with the mirrored photographs."""
    reference = ImageSet.from_tensor(images.flip(3), name="mirrored")
    return budget(pipe, images, LABELS, reference, ModuleFeatures(small_network(), "conv"), SAMPLING, ratios)


@pytest.fixture(scope="module")
def rows(make_pipeline, images) -> list[dict]:
    return budget_of(make_pipeline(), images, RATIOS)


# ---------------------------------------------------------------------------------------------------------------------
# What is counted
# ---------------------------------------------------------------------------------------------------------------------


def test_fine_tokens_by_hand():
    maps = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 0]]])
    assert fine_tokens(maps, 2).tolist() == [12, 0]
    # Of three grains: 4 for each region of the second level, and 16 more for each of the third
    assert fine_tokens(torch.tensor([[[0, 1], [2, 2]]]), 3).tolist() == [3 * 4 + 2 * 16]


@pytest.mark.parametrize("num_grains", [2, 3])
def test_fine_tokens_are_those_of_the_layout(make_content_model, num_grains):
    maps = torch.randint(num_grains, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    layout = make_content_model(num_grains=num_grains).prepare_grain_map(maps)
    assert fine_tokens(maps, num_grains).sum() == sum(len(level.tokens) for level in layout.levels)


def test_macs_are_those_of_the_layers_and_of_attention(make_content_model):
    model = make_content_model()
    counted = []

    def count(layer: nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
        counted.append(output.numel() * layer.in_features)

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(count)
    # Without a fine region attention is that of the backbone: 16 tokens with 16 tokens, twice, in every block
    total = count_macs(model, torch.zeros(1, 4, 4, dtype=torch.int64))
    width = model.config.num_attention_heads * model.config.attention_head_dim
    attention = 2 * 16 * 16 * width * len(model.transformer_blocks)
    assert total == sum(counted) + attention


def test_macs_are_means_over_the_maps(make_content_model):
    model = make_content_model()
    maps = torch.randint(2, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    each = [count_macs(model, one[None]) for one in maps]
    assert count_macs(model, maps) == pytest.approx(sum(each) / 3)
    assert count_macs(make_content_model(num_classes=None), maps) == count_macs(model, maps)


def test_counting_leaves_random_numbers_alone(make_content_model):
    before = torch.get_rng_state()
    count_macs(make_content_model(), torch.ones(1, 4, 4, dtype=torch.int64))
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------------------------------
# What is timed
# ---------------------------------------------------------------------------------------------------------------------


def test_cost_of_calls_by_hand():
    def call(
        num_images: int, seconds: float, steps: list[float], share: float, macs: float | None = None
    ) -> TimedCall:
        return TimedCall(0.5, num_images, seconds, steps, fine_share=share, fine_tokens=100 * share, macs=macs)

    calls = [
        call(4, 8.0, [1.0, 2.0], 0.5, macs=3e9),
        call(4, 80.0, [3.0, 50.0], 0.5),  # something else kept the machine busy
        call(4, 4.0, [1.0, 2.0], 0.5),
        call(1, 3.0, [0.1, 0.1], 1.0),  # the last batch: dear for one image, and not timed
    ]
    assert cost_of(calls) == {
        "fine_share": 7 / 13,
        "fine_tokens": 700 / 13,
        "gmac_per_forward": 3,
        "seconds_per_image": 2,
        "seconds_per_step": 0.5,
    }
    assert cost_of([call(4, 8.0, [], 0.5, macs=1)])["seconds_per_step"] is None


def test_steps_are_a_part_of_the_whole(rows):
    for row in rows:
        assert 0 < 2 * row["seconds_per_step"] < row["seconds_per_image"]


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------


def test_every_image_meets_its_ratio(rows):
    assert [row["fine_ratio"] for row in rows] == list(RATIOS)
    assert [row["fine_share"] for row in rows] == [0, 5 / 16, 1]  # 0.3 of 16 regions, to the nearest one
    assert [row["fine_tokens"] for row in rows] == [0, 20, 64]
    assert [row["backbone_tokens"] for row in rows] == [16] * 3
    macs = [row["gmac_per_forward"] for row in rows]
    assert macs == sorted(macs) and macs[0] < macs[-1]


def test_protocols_name_the_ratio(rows):
    samples = [row["results"][0]["protocol"]["samples"] for row in rows]
    assert [one["fine_ratio"] for one in samples] == list(RATIOS)
    assert len({one["digest"] for one in samples}) == 3 and samples[0]["num_inference_steps"] == 3


def test_ratios_do_not_depend_on_their_company(make_pipeline, images, rows):
    [alone] = budget_of(make_pipeline(), images, [0.3])
    assert alone["results"] == rows[1]["results"]


def test_reconstruction_at_a_ratio_is_that_of_the_autoencoder(make_pipeline, images):
    pipe = make_pipeline()
    found = reconstruction_at(pipe, images, 0.4, batch_size=3)
    pixels = images / 127.5 - 1
    with torch.no_grad():
        encoded = pipe.vae.encode(pixels, fine_ratio=0.4)
        decoded = to_uint8(pipe.vae.decode(encoded.latent_dist.mode()).sample) / 127.5 - 1
    assert found["reconstruction_psnr_db"] == pytest.approx(psnr(pixels, decoded).mean().item(), rel=1e-6)
    assert found["reconstruction_fine_share"] == pytest.approx(encoded.grain_map.double().mean().item())


def test_table(rows):
    lines = budget_table(rows, [{"metric": "fd_conv", "value": 0.125}]).splitlines()
    assert lines[0] == "| fine ratio | fd_conv | PSNR, dB | tokens | GMAC / forward | s / image | ms / step |"
    assert lines[3].startswith("| 0.3 | ") and " | 16 + 20 | " in lines[3]
    assert lines[-1] == "| real images | 0.125 |  |  |  |  |  |"
    assert {line.count("|") for line in lines} == {8}


def test_plot(rows, tmp_path):
    plot_budget(rows, tmp_path / "budget.png")
    picture = PIL.Image.open(tmp_path / "budget.png")
    assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(2**20)) > 10


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [[0.5, 1.5], [-0.1], ["half"], [float("nan")]])
def test_a_ratio_outside_of_its_range(ratios):
    with pytest.raises(ValueError, match=r"`--fine_ratios` must be a number in \[0, 1\], got"):
        check_ratios(ratios, name="--fine_ratios")


@pytest.mark.parametrize("ratios", [[], [0.5, 0.25, 0.5]])
def test_no_ratio_or_one_twice(ratios):
    with pytest.raises(ValueError, match="`ratios` must be one or more different numbers"):
        check_ratios(ratios)


def test_a_pipeline_without_a_grain_model(make_pipeline, images):
    pipe = make_pipeline(grain_model=None, grain_scheduler=None)
    with pytest.raises(ValueError, match="`pipe` has no grain model, which draws maps of a given ratio"):
        budget(
            pipe, images, LABELS, ImageSet.from_tensor(images, "x"), ModuleFeatures(small_network(), "conv"), SAMPLING
        )


def test_without_matplotlib_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'plot of the budget .* matplotlib.*pip install "diffusers-d2it\[metrics\]"'):
        check_matplotlib()
