# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint in the form of DC-DiT's release becomes the model that it was made of; all else is refused."""

import pickle
import sys
from types import ModuleType

import pytest
import torch
from alike import same_weights
from public_weights import assert_accounts_for_everything, without

from diffusers_d2it import DCDiTModel
from diffusers_d2it.conversion import convert_dcdit_checkpoint
from diffusers_d2it.models.layers import sincos_positions


SIZES = {"sample_size": 4, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 64, "num_classes": 10}
BLOCK = "hnet.main_network.main_network.layers"


def make_model(**changes) -> DCDiTModel:
    torch.manual_seed(0)
    model = DCDiTModel(out_channels=8, **SIZES | changes).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1)
    return model


def released(model: DCDiTModel) -> dict[str, torch.Tensor]:
    """The weights of a model under the names of the release, written down by its table."""
    ours, side = model.state_dict(), model.config.sample_size
    dim = ours["residual_proj.bias"].numel()
    theirs = {"pos_embed": sincos_positions((side, side), torch.zeros(1, 1, dim))[None]}

    def move(source: str, target: str, kinds=("weight", "bias")) -> None:
        for kind in kinds:
            theirs[f"{target}.{kind}"] = ours.pop(f"{source}.{kind}")

    move("conv_in", "x_embedder.proj")
    move("time_embed.mlp.linear_1", "t_embedder.mlp.0")
    move("time_embed.mlp.linear_2", "t_embedder.mlp.2")
    move("label_embed", "y_embedder.embedding_table", ["weight"])
    for stack, widened in (("encoder", 1), ("decoder", 0)):
        for j in (0, 1):
            for name in ("norm1", "norm2", "conv1", "conv2"):
                move(f"{stack}.blocks.{j}.{name}", f"hnet.{stack}.layers.{j}.{name}")
            move(f"{stack}.blocks.{j}.time_emb_proj", f"hnet.{stack}.layers.{j}.cond_proj.1")
        move(f"{stack}.blocks.{widened}.conv_shortcut", f"hnet.{stack}.layers.{widened}.skip_proj")
        move(f"{stack}.norm", f"hnet.{stack}.rmsnorm", ["weight"])
    router = {"proj": "proj", "predictor": "context_predictor"}
    router |= {"conv": "residual_scorer.0", "norm": "residual_scorer.1", "score": "residual_scorer.3"}
    for name, target in router.items():
        move(f"boundary_router.{name}", f"hnet.routing_module.{target}")
    move("residual_proj", "hnet.residual_proj")
    for i in range(model.config.num_layers):
        block = f"transformer_blocks.{i}"
        for kind in ("weight", "bias"):
            parts = [ours.pop(f"{block}.attn.to_{name}.{kind}") for name in "qkv"]
            theirs[f"{BLOCK}.{i}.attn.qkv.{kind}"] = torch.cat(parts)
        move(f"{block}.attn.to_out.0", f"{BLOCK}.{i}.attn.proj")
        move(f"{block}.ff.linear_1", f"{BLOCK}.{i}.mlp.fc1")
        move(f"{block}.ff.linear_2", f"{BLOCK}.{i}.mlp.fc2")
        move(f"{block}.adaln", f"{BLOCK}.{i}.adaLN_modulation.1")
    move("norm_backbone", "hnet.main_network.main_network.rmsnorm", ["weight"])
    move("norm_out.adaln", "final_layer.adaLN_modulation.1")
    move("norm_out.proj_out", "final_layer.linear")
    assert not ours
    return theirs


@pytest.fixture
def settings():
    """settings(heads, sigma): what training writes beside the weights, of classes that are gone when it is read."""
    sys.modules["config"] = module = ModuleType("config")

    def of(name: str, /, **values):
        vars(module).setdefault(name, type(name, (), {"__module__": "config"}))
        one = getattr(module, name)()
        vars(one).update(values)
        return one

    def make(heads: list[int] | None, sigma: float):
        network = of("HNetConfig", num_heads=heads, dechunk_kernel_sigma=sigma, enc_dec_dim_factor=[4, None])
        model = of("ModelConfig", name="DC-DiT", hnet=network, mlp_ratio=4.0)
        return of("Config", model=model, training=of("TrainingConfig", epochs=80))

    yield make
    sys.modules.pop("config", None)


def test_settings_and_averaged_weights_of_a_training(tmp_path, settings):
    model, other = make_model(smoothing_sigma=1.5), make_model()
    weights = released(model)
    config = settings([4, 4], 1.5)
    torch.save({"model": released(other), "ema": weights, "opt": {"state": {}}, "config": config}, tmp_path / "a.pt")
    del sys.modules["config"]  # nothing of it is imported
    converted, report = convert_dcdit_checkpoint(tmp_path / "a.pt")
    assert same_weights(converted, model)
    ours, theirs = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (converted, model))
    assert ours == theirs
    assert_accounts_for_everything(report, weights, converted)
    latents, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 10])
    torch.testing.assert_close(converted(latents, 500, labels).sample, model(latents, 500, labels).sample)


def test_weights_alone(tmp_path):
    model = make_model()
    torch.save(released(model), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="`num_attention_heads`"):
        convert_dcdit_checkpoint(tmp_path / "a.pt")
    converted, report = convert_dcdit_checkpoint(tmp_path / "a.pt", num_attention_heads=4)
    assert same_weights(converted, model) and any("sigma of 1.0" in note for note in report.notes)


class Runs:
    def __reduce__(self):
        return print, ("code has run",)


@pytest.mark.parametrize("config", [Runs(), pickle.Pickler, {"a": [Runs()]}], ids=["code", "class", "nested"])
def test_a_file_that_could_run_code_is_refused(tmp_path, capsys, config):
    torch.save({"ema": {}, "config": config}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="run code"):
        convert_dcdit_checkpoint(tmp_path / "a.pt")
    assert "code has run" not in capsys.readouterr().out


def test_bad_settings(tmp_path, settings):
    for config in (settings([], 1.0), settings(["four"], 1.0), settings([4], -1.0), settings(None, 1.0)):
        torch.save({"ema": released(make_model()), "config": config}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="config|`num_attention_heads`|`smoothing_sigma`"):
            convert_dcdit_checkpoint(tmp_path / "a.pt")
    torch.save({"ema": released(make_model()), "config": settings([4], 1.0)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="`num_attention_heads`.* 0"):
        convert_dcdit_checkpoint(tmp_path / "a.pt", num_attention_heads=0)


@pytest.mark.parametrize("key", ["pos_embed", "hnet.residual_proj.weight", f"{BLOCK}.1.attn.qkv.bias", "more"])
def test_every_weight_has_its_place(tmp_path, key):
    weights = released(make_model())
    weights = weights | {"more": torch.zeros(3)} if key == "more" else without(weights, key)
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"`{key}`"):
        convert_dcdit_checkpoint(tmp_path / "a.pt", num_attention_heads=4)
