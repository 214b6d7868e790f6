# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What an upcycled model has of its DiT is the DiT's, and every weight of both is accounted for."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from alike import same_weights
from plain_dit import CLASSES, HEADS, SIDE, dit_weights, make_diffusers_dit, reference_blocks, reference_condition
from public_weights import assert_accounts_for_everything, change_folder, edit_config, edit_weights, without
from script_runs import call
from test_conversion_dcdit import make_model, released

from diffusers_d2it import DCDiTModel
from diffusers_d2it.conversion import ConversionReport, convert_dcdit_checkpoint, upcycle_dit
from diffusers_d2it.models.chunking import Chunks
from diffusers_d2it.models.layers import sincos_positions


NARROW = {"norm_num_groups": 4}  # a width of 32 leaves eight channels
TIMESTEPS, LABELS = torch.tensor([0, 500, 999]), torch.tensor([3, CLASSES, 9])
LENGTHS = (5, 16, 1)
OF_PATCHES = {"x_embedder", "final_layer"}
EMBEDDERS = {
    "time_embed.mlp.linear_1": "t_embedder.mlp.0",
    "time_embed.mlp.linear_2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
}


@pytest.fixture
def upcycle(tmp_path):
    """upcycle(weights, **options): the model of these weights in a file, and the report."""

    def make(weights, **options) -> tuple[DCDiTModel, ConversionReport]:
        torch.save(weights, tmp_path / "dit.pt")
        return upcycle_dit(tmp_path / "dit.pt", **{"num_attention_heads": HEADS} | NARROW | options)

    return make


@pytest.fixture
def dit_folder(tmp_path):
    make_diffusers_dit().save_pretrained(tmp_path / "pipeline" / "transformer")
    return tmp_path / "pipeline" / "transformer"


def conditioning_of(model: DCDiTModel) -> torch.Tensor:
    return model.time_embed(TIMESTEPS, model.dtype) + model.label_embed(LABELS)


def run_blocks(model: DCDiTModel, tokens: list[torch.Tensor], conditioning: torch.Tensor) -> list[torch.Tensor]:
    """The blocks over images of so many tokens each."""
    kept = torch.zeros(len(tokens), 4, 4, dtype=torch.bool)
    for image, one in zip(kept, tokens):
        image.view(-1)[: len(one)] = True
    packed, chunks = torch.cat(tokens), Chunks.of(kept)
    for block in model.transformer_blocks:
        packed = block(packed, F.silu(conditioning), chunks)
    return packed.split([len(one) for one in tokens])


def random_tokens(dim: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, dim, generator=generator, dtype=torch.float64) for length in LENGTHS]


@pytest.mark.parametrize("patch, out_channels", [(2, 8), (2, 4), (4, 8), (1, 8)])
@torch.no_grad()
def test_blocks_and_conditioning_are_those_of_the_original(upcycle, tmp_path, patch, out_channels):
    weights = dit_weights(patch=patch, out_channels=out_channels)
    model, report = upcycle({"ema": weights, "model": dit_weights(patch=patch, seed=1)})
    assert_accounts_for_everything(report, weights, model)
    assert {key.split(".")[0] for key in report.unused} == OF_PATCHES | {"pos_embed"}
    for ours, theirs in EMBEDDERS.items():
        assert torch.equal(model.state_dict()[f"{ours}.weight"], weights[f"{theirs}.weight"])
    expected = {"sample_size": SIDE * patch, "out_channels": out_channels, "num_classes": CLASSES, "num_layers": 3}
    expected |= {"position_patch_size": patch, "conditioning_norm": True, "frequency_shift": 0.0}
    assert {key: model.config[key] for key in expected} == expected

    model.save_pretrained(tmp_path / "model")
    again = DCDiTModel.from_pretrained(tmp_path / "model")
    assert same_weights(again, model)
    exact, tokens = {key: value.double() for key, value in weights.items()}, random_tokens()
    condition = reference_condition(exact, TIMESTEPS, LABELS)
    torch.testing.assert_close(conditioning_of(again.double()), condition, atol=1e-4, rtol=0)  # float32 waves of t
    for i, found in enumerate(run_blocks(again, tokens, condition)):
        plain = reference_blocks(exact, tokens[i][None], condition[i : i + 1])[0]
        assert plain.std() > 0.5
        torch.testing.assert_close(found, plain, atol=1e-10, rtol=0)


@pytest.mark.parametrize("saved_as", ["model", "pipeline"])
@torch.no_grad()
def test_blocks_and_conditioning_are_those_of_diffusers(dit_folder, saved_as):
    edit_config(dit_folder, norm_eps=1e-6)  # what the model has
    dit, tokens = make_diffusers_dit(norm_eps=1e-6).double(), random_tokens()
    folder = dit_folder.parent if saved_as == "pipeline" else dit_folder
    model, report = upcycle_dit(folder, **NARROW)
    assert_accounts_for_everything(report, dit.state_dict(), model)
    for i, found in enumerate(run_blocks(model.double(), tokens, conditioning_of(model))):
        plain = tokens[i][None]
        for block in dit.transformer_blocks:
            plain = block(plain, timestep=TIMESTEPS[i : i + 1], class_labels=LABELS[i : i + 1])
        torch.testing.assert_close(found, plain[0], atol=1e-10, rtol=0)
    assert upcycle_dit(folder, frequency_shift=0, **NARROW)[0].config.frequency_shift == 0


def test_every_weight_of_the_blocks_is_the_dits_bit_for_bit(upcycle):
    weights = dit_weights()
    model, report = upcycle(weights)
    found, undone = model.state_dict(), {}
    for key, targets in report.mapped.items():
        undone[key] = torch.cat([found[target] for target in targets])  # three of a fused projection
    assert all(torch.equal(undone[key], weights[key]) for key in undone)
    assert {key.split(".")[0] for key in undone} == {"blocks", "t_embedder", "y_embedder"}


def test_a_new_model_takes_a_step_that_leaves_the_embedders(upcycle):
    model, report = upcycle(dit_weights())
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name in model.state_dict() if name.startswith(("time_embed.", "label_embed."))}
    assert any("frozen" in note for note in report.notes) and any("learned_range" in note for note in report.notes)
    sample = model(torch.randn(3, 4, 8, 8), TIMESTEPS, LABELS).sample
    assert sample.shape == (3, 8, 8, 8) and not sample.any()  # the last layer is new
    sample.sum().backward()
    assert model.norm_out.proj_out.bias.grad.any() and model.label_embed.weight.grad is None


def test_sizes_that_weights_do_not_tell(upcycle):
    model, _ = upcycle(dit_weights(dim=384, depth=1), num_attention_heads=None, norm_num_groups=32)
    assert (model.config.num_attention_heads, model.config.attention_head_dim) == (6, 64)
    for options, key in (
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"norm_num_groups": 32}, "norm_num_groups"),
        ({"router": "random"}, "router"),
        ({"frequency_shift": 1.0}, "frequency_shift"),
    ):
        with pytest.raises(ValueError, match=f"`{key}`"):
            upcycle(dit_weights(), **options)
    model, _ = upcycle(dit_weights(), router="cosine", num_conv_layers=1, smoothing_sigma=1.5)
    assert (model.config.router, model.config.num_conv_layers, model.config.smoothing_sigma) == ("cosine", 1, 1.5)


def test_sigma_is_that_of_the_size(dit_folder):
    for sample_size, sigma in ((8, 1.0), (62, 1.0), (64, 2.0)):
        change_folder(dit_folder, {"sample_size": sample_size})
        assert upcycle_dit(dit_folder, **NARROW)[0].config.smoothing_sigma == sigma


@pytest.mark.parametrize("patch", [1, 2, 3, 4])
def test_cells_lie_around_the_middle_of_their_patch(patch):
    """The mean over cells at i +- a of a wave is the wave at i, times the mean of cos(a)."""
    tokens, height, width = torch.zeros(1, 1, 32, dtype=torch.float64), 3, 5
    cells = sincos_positions((height * patch, width * patch), tokens, patch).view(height, patch, width, patch, 32)
    frequencies = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    around = ((torch.arange(patch) - (patch - 1) / 2) / patch).double()
    damped = (around[:, None] * frequencies).cos().mean(dim=0)
    expected = sincos_positions((height, width), tokens).view(height, width, 32) * damped.repeat(4)
    torch.testing.assert_close(cells.mean(dim=(1, 3)), expected, atol=1e-6, rtol=0)
    corner = math.sin(-(patch - 1) / 2 / patch)  # the first number is the sine of the column
    assert cells[0, 0, 0, 0, 0].item() == pytest.approx(corner, abs=1e-6)
    if patch == 1:
        assert sincos_positions((height, width), tokens, 1) is sincos_positions((height, width), tokens)


BIAS = "blocks.1.mlp.fc2.bias"


@pytest.mark.parametrize(
    "change, key",
    [
        (lambda w: w | {"blocks.1.gate": torch.ones(16)}, "blocks.1.gate"),
        (lambda w: w | {"final_layer.more": torch.ones(16)}, "final_layer.more"),
        (lambda w: without(w, BIAS), BIAS),
        (lambda w: without(w, "x_embedder.proj.bias"), "x_embedder.proj.bias"),
        (lambda w: w | {"final_layer.linear.weight": torch.ones(33, 32)}, "final_layer.linear.weight"),
        (lambda w: w | {"final_layer.linear.weight": torch.ones(20, 32)}, "final_layer.linear.bias"),
        (lambda w: w | {"pos_embed": w["pos_embed"].flip(1)}, "pos_embed"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(upcycle, change, key):
    with pytest.raises(ValueError, match=f"`{key}`"):
        upcycle(change(dit_weights()))


@pytest.mark.parametrize(
    "change, key",
    [
        ({"patch_size": 4}, "pos_embed.proj.weight"),
        ({"sample_size": 7}, "sample_size"),
        ({"activation_fn": "geglu"}, "activation_fn"),
        (lambda w: w | {"extra": torch.zeros(1)}, "extra"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(dit_folder, change, key):
    change_folder(dit_folder, change)
    with pytest.raises(ValueError, match=f"`{key}`"):
        upcycle_dit(dit_folder, **NARROW)


def test_positions_of_an_old_folder_are_accounted_for(dit_folder):
    positions = dit_weights()["pos_embed"]
    edit_weights(dit_folder, lambda w: w | {"pos_embed.pos_embed": positions})
    _, report = upcycle_dit(dit_folder, **NARROW)
    assert "cells" in report.unused["pos_embed.pos_embed"]
    with pytest.raises(ValueError, match="`num_attention_heads`"):
        upcycle_dit(dit_folder, num_attention_heads=HEADS, **NARROW)
    with pytest.raises(ValueError, match="nowhere"):
        upcycle_dit(dit_folder / "nowhere")


@pytest.mark.parametrize("kind", ["release", "checkpoint", "folder"])
def test_dcdit_script_converts(kind, tmp_path, capsys):
    source, output = tmp_path / "source", tmp_path / "model"
    if kind == "folder":
        dit = make_diffusers_dit(num_layers=1, attention_head_dim=128)
        dit.save_pretrained(source)
        keys, flags, given = dit.state_dict(), ["--upcycle", "--frequency_shift", 0], {"frequency_shift": 0}
        convert = upcycle_dit
    else:
        weights = released(make_model()) if kind == "release" else dit_weights(dim=256, depth=1)
        torch.save(weights, source)
        keys, flags, given = weights, ["--num_attention_heads", 4], {"num_attention_heads": 4}
        convert = convert_dcdit_checkpoint
        if kind == "checkpoint":
            flags, convert = [*flags, "--upcycle"], upcycle_dit
    call("convert_dcdit.py", "--source", source, "--output", output, "--seed", 5, *flags)
    report = ConversionReport(**json.loads((output / "conversion.json").read_text()))
    assert str(report) in capsys.readouterr().out
    model = DCDiTModel.from_pretrained(output)
    assert_accounts_for_everything(report, keys, model)
    torch.manual_seed(5)
    assert same_weights(model, convert(source, **given)[0])
