# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What images cost: counted by hand, by another way, and noted on the passes of a pipeline."""

import pytest
import torch
from metric_inputs import refused
from torch import nn

from diffusers_d2it.budgets import BudgetArgument
from diffusers_d2it.evaluation import ForwardMeter
from diffusers_d2it.evaluation.cost import TimedCall, cost_of


def macs(model: nn.Module, grain_map: torch.Tensor) -> float:
    """Multiply-adds of an image in a forward pass."""
    label = None if model.config.num_classes is None else torch.zeros(len(grain_map), dtype=torch.int64)
    with torch.no_grad(), ForwardMeter(model, counts_macs=True) as meter:
        model(torch.zeros(len(grain_map), 4, 8, 8), torch.tensor(500), grain_map, label)
    return meter.macs


def test_a_budget_becomes_arguments_of_the_pipeline():
    assert BudgetArgument("fine_ratio").at(0.25) == {"fine_ratio": 0.25}
    both = BudgetArgument("budget", "null_budget", smallest=0.1)
    assert both.at(1) == {"budget": 1} and both.at(1, 0.1) == {"budget": 1, "null_budget": 0.1}


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: BudgetArgument("fine_ratio").at(1.5), "`fine_ratio`.*1.5"),
        (lambda: BudgetArgument("fine_ratio").at("half"), "`fine_ratio`.*'half'"),
        (lambda: BudgetArgument("fine_ratio").at(float("nan")), "`fine_ratio`.*nan"),
        (lambda: BudgetArgument("budget", "null_budget", 0.1).at(1, 0), "`null_budget`.*0.1.*got 0"),
        (lambda: BudgetArgument("fine_ratio").at(1, 0.5), "`null_budget`.*None"),
        (lambda: ForwardMeter(nn.Linear(1, 1)), "`transformer`.*Linear"),
    ],
)
def test_budgets_that_are_refused(call, said):
    refused(said, call)


def test_tokens_by_hand(make_content_model):
    def tokens(grain_map: torch.Tensor, num_grains: int) -> dict[str, list[int]]:
        found = make_content_model(num_grains).count_tokens({"grain_map": grain_map})
        return {stage: numbers.tolist() for stage, numbers in found.items()}

    maps = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 0]]])
    assert tokens(maps, 2) == {"backbone": [4, 4], "refine": [12, 0]}
    # Of three grains: 4 for each region of the second level, and 16 more for each of the third
    assert tokens(torch.tensor([[[0, 1], [2, 2]]]), 3)["refine"] == [3 * 4 + 2 * 16]


def test_macs_are_those_of_the_layers_and_of_attention(make_content_model):
    model = make_content_model()
    counted = []

    def count(layer: nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
        counted.append(output.numel() * layer.in_features)

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(count)
    # Without a fine region attention is that of the backbone: 16 tokens with 16 tokens, twice, in every block
    total = macs(model, torch.zeros(1, 4, 4, dtype=torch.int64))
    width = model.config.num_attention_heads * model.config.attention_head_dim
    attention = 2 * 16 * 16 * width * len(model.transformer_blocks)
    assert total == sum(counted) + attention


def test_counting_changes_nothing(make_content_model):
    model, maps = make_content_model(), torch.ones(1, 4, 4, dtype=torch.int64)
    arguments = torch.zeros(1, 4, 8, 8), torch.tensor(500), maps, torch.tensor([3])
    state, forward = torch.get_rng_state(), model.forward
    with torch.no_grad():
        expected = model(*arguments).sample
        with ForwardMeter(model) as meter:
            assert torch.equal(model(*arguments).sample, expected)
        with pytest.raises(KeyError), ForwardMeter(model):
            raise KeyError
    assert model.forward == forward and torch.equal(torch.get_rng_state(), state)
    assert meter.tokens == {"backbone": 16, "refine": 64} and meter.step_seconds() == []
    assert macs(make_content_model(num_classes=None), maps) == macs(model, maps)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_passes_of_a_pipeline_are_noted(make_pipeline, guidance_scale):
    pipe = make_pipeline()
    maps = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [0, 0]]]).repeat(1, 2, 2)
    with ForwardMeter(pipe.transformer) as meter:
        pipe([1, 2], grain_map=maps, num_inference_steps=3, guidance_scale=guidance_scale, output_type="latent")
    assert meter.tokens == {"backbone": 16, "refine": (32 + 16) / 2}
    assert len(meter.step_seconds()) == 2 and all(seconds > 0 for seconds in meter.step_seconds())


def test_what_another_model_keeps_is_counted(make_dcdit):
    model, budgets = make_dcdit(), torch.tensor([1.0, 0.25])
    arguments = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    found = []
    for budget in (1.0, budgets):
        with torch.no_grad(), ForwardMeter(model, counts_macs=True) as meter:
            output = model(*arguments, torch.tensor([0, 1]), budget=budget)
        lengths = output.kept.flatten(1).sum(dim=1).double()
        assert meter.tokens == {"backbone": lengths.mean()}
        found.append((lengths, meter.macs))
    (all_kept, more), (few_kept, less) = found
    width = model.config.num_attention_heads * model.config.attention_head_dim
    # Of every token of a block: 12 products of its width, and attention to those of its image
    dense, attention = (all_kept - few_kept).mean() * 12 * width**2, 2 * width * (all_kept**2 - few_kept**2).mean()
    assert more - less == pytest.approx(model.config.num_layers * (dense + attention).item(), rel=1e-6)


def test_cost_of_calls_by_hand():
    def call(num_images: int, seconds: float, steps: list[float], share: float) -> TimedCall:
        return TimedCall(num_images, seconds, steps, {"backbone": 16, "refine": 100 * share})

    calls = [
        call(4, 8.0, [1.0, 2.0], 0.5),
        call(4, 80.0, [3.0, 50.0], 0.5),  # something else kept the machine busy
        call(4, 4.0, [1.0, 2.0], 0.5),
        call(1, 3.0, [0.1, 0.1], 1.0),  # the last batch: dear for one image, and not timed
    ]
    assert cost_of(calls) == {
        "tokens": {"backbone": 16, "refine": 700 / 13},
        "seconds_per_image": 2,
        "seconds_per_step": 0.5,
    }
    assert cost_of([call(4, 8.0, [], 0.5)])["seconds_per_step"] is None
