# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Converted DiTs against what they were made of, on small random checkpoints of both formats."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from alike import same_weights
from plain_dit import CLASSES, HEADS, SIDE, dit_weights, make_diffusers_dit, reference_dit, sine_cosine_grid
from public_weights import assert_accounts_for_everything, change_folder, edit_config, edit_weights, without
from script_runs import call

from diffusers_d2it import D2iTContentModel, load_preset
from diffusers_d2it.conversion import ConversionReport, convert_diffusers_dit, convert_dit_checkpoint
from diffusers_d2it.conversion.dit import count_heads
from diffusers_d2it.grains import GrainLayout, tie


TIMESTEPS = torch.tensor([0, 37, 500, 999])
EMBEDDER = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
BIAS = "transformer_blocks.1.attn1.to_q.bias"
LABELS = torch.tensor([3, 0, CLASSES, 9])  # CLASSES is "no class"


def random_latents(cells: int = 2 * SIDE) -> torch.Tensor:
    return torch.randn(len(LABELS), 4, cells, cells, generator=torch.Generator().manual_seed(0))


def random_map(num_grains: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(num_grains, (len(LABELS), SIDE, SIDE), generator=generator)


# ---- The original DiT ----


@pytest.fixture
def save_dit(tmp_path) -> Callable[..., Path]:
    """save_dit(weights): a .pt file of them."""

    def save(weights) -> Path:
        torch.save(weights, tmp_path / "dit.pt")
        return tmp_path / "dit.pt"

    return save


CASES = [(2, 4, True), (2, 8, True), (2, 8, False), (3, 8, False)]


@pytest.mark.parametrize("num_grains, out_channels, all_fine", CASES)
def test_fine_regions_start_as_the_original_dit_and_coarse_ones_as_its_mean(
    save_dit, tmp_path, num_grains, out_channels, all_fine
):
    patch = 2 ** (num_grains - 1)
    weights, grain_map = dit_weights(patch=patch, out_channels=out_channels), random_map(num_grains)
    grain_map = torch.ones_like(grain_map) if all_fine else grain_map
    latents = tie(random_latents(patch * SIDE), grain_map)
    path = save_dit(weights)
    with pytest.raises(ValueError, match=f"dit.pt.*{patch}.*`num_grains`.*{2 ** (4 - num_grains)}"):
        convert_dit_checkpoint(path, num_attention_heads=HEADS, num_grains=5 - num_grains)
    model, report = convert_dit_checkpoint(path, num_attention_heads=HEADS, num_grains=num_grains)
    assert_accounts_for_everything(report, weights, model)
    assert report.unused.keys() == {"pos_embed"}
    assert all(key.startswith(("grain_embed.", "refine_nets.")) for key in report.fresh)
    model.save_pretrained(tmp_path / "model")
    model = D2iTContentModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        output = model(latents, TIMESTEPS, grain_map, LABELS).sample
    expected = reference_dit(weights, latents, TIMESTEPS, LABELS)
    assert output.shape[1] == out_channels and expected.std() > 0.5
    for grain in range(num_grains - 1):
        expected = GrainLayout.from_grain_map(grain_map, num_grains).average(expected, grain)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


def test_training_checkpoint_gives_its_averaged_weights(save_dit):
    weights = {"ema": dit_weights(seed=0), "model": dit_weights(seed=1)}
    flags = argparse.Namespace(model="DiT-S/2", image_size=256, global_seed=0, results_dir="results")
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
    for entry in ("ema", "model"):  # the second is taken where the first is missing
        path = save_dit(weights | {"opt": optimizer, "args": flags})
        model, report = convert_dit_checkpoint(path, num_attention_heads=HEADS)
        assert torch.equal(model.label_embed.weight, weights.pop(entry)["y_embedder.embedding_table.weight"])
        assert f'"{entry}"' in report.source


def test_sizes_are_read_off_the_weights(save_dit):
    model, _ = convert_dit_checkpoint(save_dit(dit_weights(dim=384, depth=1)), window_size=8)
    expected = {"sample_size": 2 * SIDE, "in_channels": 4, "out_channels": 8, "num_layers": 1, "mlp_ratio": 4.0}
    expected |= {"num_attention_heads": 6, "attention_head_dim": 64, "num_classes": CLASSES}
    expected |= {"num_refine_layers": 1, "window_size": 8, "frequency_shift": 0.0}
    assert {key: model.config[key] for key in expected} == expected
    for dim, heads in {768: 12, 1024: 16, 1152: 16}.items():
        assert count_heads(None, dim, "dit.pt") == heads
    with pytest.raises(ValueError, match="32.*`num_attention_heads`"):
        convert_dit_checkpoint(save_dit(dit_weights()))
    with pytest.raises(ValueError, match="`num_attention_heads`.*32.*3"):
        convert_dit_checkpoint(save_dit(dit_weights()), num_attention_heads=3)


@pytest.mark.parametrize("depth, num_refine_layers", [(1, 1), (6, 1), (12, 2), (24, 4), (28, 5)])
def test_refine_net_has_the_depth_of_the_preset_of_that_size(save_dit, depth, num_refine_layers):
    model, _ = convert_dit_checkpoint(save_dit(dit_weights(dim=8, depth=depth)), num_attention_heads=HEADS)
    assert model.config.num_layers == depth
    assert model.config.num_refine_layers == num_refine_layers
    if depth > 6:
        preset = load_preset({12: "content-b", 24: "content-l", 28: "content-xl"}[depth])
        assert preset["num_refine_layers"] == num_refine_layers


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w | {"blocks.1.attn.q_norm.weight": torch.ones(16)}, "`blocks.1.attn.q_norm.weight`"),
        (lambda w: w | {"blocks.x.gate": torch.ones(16)}, "`blocks.x.gate`"),
        (lambda w: without(w, "blocks.1.mlp.fc2.bias"), "`blocks.1.mlp.fc2.bias`"),
        (lambda w: {k: v for k, v in w.items() if not k.startswith("blocks.1.")}, "`blocks.1."),
        (lambda w: {k: v for k, v in w.items() if not k.startswith("blocks.")}, "`blocks.0.mlp.fc1.weight"),
        (lambda w: without(w, "x_embedder.proj.weight"), "`x_embedder.proj.weight`"),
        (lambda w: without(w, "final_layer.linear.bias"), "`final_layer.linear.bias`"),
        (lambda w: without(w, "pos_embed"), "`pos_embed`"),
        (lambda w: w | {"blocks.0.attn.proj.weight": torch.ones(32, 31)}, r"blocks.0.attn.proj.weight.*\(32, 31\)"),
        (lambda w: w | {"blocks.0.attn.qkv.weight": torch.ones(95, 32)}, "blocks.0.attn.qkv.weight"),
        (lambda w: w | {"t_embedder.mlp.0.weight": torch.ones(32, 128)}, r"t_embedder.mlp.0.weight.*\(32, 256\)"),
        (lambda w: w | {"x_embedder.proj.weight": torch.ones(32, 16)}, r"x_embedder.proj.weight.*4.*\(32, 16\)"),
        (lambda w: w | {"final_layer.linear.weight": torch.ones(33, 32)}, "final_layer.linear.weight"),
        (lambda w: w | {"final_layer.linear.weight": torch.ones(20, 32)}, "out_channels"),
        (
            lambda w: w | {"x_embedder.proj.weight": torch.ones(32, 4, 0, 0)},
            r"x_embedder.proj.weight.*\(32, 4, 0, 0\)",
        ),
        (lambda w: w | {"pos_embed": w["pos_embed"][:, :0]}, r"`pos_embed`.*\(1, 0, 32\)"),
        (lambda w: w | {"pos_embed": w["pos_embed"].flip(1)}, "`pos_embed`.*4x4"),
        (lambda w: w | {"pos_embed": w["pos_embed"] * float("nan")}, "`pos_embed`.*nan"),
        (lambda w: w | {"pos_embed": w["pos_embed"][:, 1:]}, r"`pos_embed`.*\(1, 15, 32\)"),
        (lambda w: w | {"blocks.0.mlp.fc1.bias": [0.0] * 128}, "`blocks.0.mlp.fc1.bias`.*list"),
        (lambda w: w | {"blocks.0.mlp.fc1.bias": torch.zeros(128, dtype=torch.int8)}, "fc1.bias.*torch.int8"),
        (lambda w: list(w), "dit.pt.*list"),
        (lambda w: dit_weights(patch=3), "dit.pt.*3.*`num_grains`"),
        (lambda w: dit_weights(patch=1), "dit.pt.*1.*`num_grains`"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(save_dit, change, message):
    with pytest.raises(ValueError, match=message):
        convert_dit_checkpoint(save_dit(change(dit_weights())), num_attention_heads=HEADS)


# ---- diffusers' DiT ----


@pytest.fixture
def dit_folder(tmp_path) -> Path:
    make_diffusers_dit().save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "shards", "pipeline", "old"])
def test_all_fine_output_is_that_of_diffusers_dit(tmp_path, layout, out_channels):
    dit = make_diffusers_dit(out_channels=out_channels)
    folder = tmp_path / "dit"
    saved = folder / "transformer" if layout == "pipeline" else folder
    dit.save_pretrained(
        saved, safe_serialization=layout != "bin", max_shard_size="100KB" if layout == "shards" else "1GB"
    )
    assert len(list(saved.glob("*.safetensors"))) > 1 or layout != "shards"
    if layout == "old":  # options and class name of 2023, and positions in the file
        old = {"cross_attention_dim": None, "only_cross_attention": False, "attention_type": "default"}
        edit_config(saved, _class_name="Transformer2DModel", norm_eps="removed", **old)
        edit_weights(saved, lambda w: w | {"pos_embed.pos_embed": dit.pos_embed.pos_embed.clone()})
    model, report = convert_diffusers_dit(folder)
    with torch.no_grad():
        expected = dit(random_latents(), timestep=TIMESTEPS, class_labels=LABELS).sample
        output = model(random_latents(), TIMESTEPS, torch.ones_like(random_map()), LABELS).sample
    assert expected.std() > 0.5
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    keys = [*dit.state_dict(), *(["pos_embed.pos_embed"] if layout == "old" else [])]
    assert_accounts_for_everything(report, keys, model)
    assert len(report.unused) == 2 * 5 + (layout == "old")  # five weights of the embedders in two more blocks
    assert model.refine_nets[0].time_embed.frequencies.downscale_freq_shift == 1  # as diffusers computes it


def test_half_precision_weights_become_float32(dit_folder):
    edit_weights(dit_folder, lambda w: {key: value.half() for key, value in w.items()})
    model, report = convert_diffusers_dit(dit_folder)
    assert model.dtype == torch.float32 and any("torch.float16" in note for note in report.notes)
    assert torch.equal(model.norm_out.proj_out.weight, make_diffusers_dit().half().proj_out_2.weight.float())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "DiTTransformer2DModel.*PixArtTransformer2DModel"),
        ({"activation_fn": "geglu"}, "`activation_fn`.*'geglu'"),
        ({"norm_type": "ada_norm_single"}, "`norm_type`.*'ada_norm_single'"),
        ({"attention_bias": False}, "`attention_bias`"),
        ({"norm_elementwise_affine": True}, "`norm_elementwise_affine`"),
        ({"dropout": 0.1}, "`dropout`"),
        ({"norm_eps": 1e-3}, "`norm_eps`.*0.001"),
        ({"sample_size": 7}, "`sample_size`.*2.*7"),
        ({"caption_channels": 4096}, "caption_channels.*4096"),
        ({"patch_size": 4}, "4.*`num_grains`.*2"),
        ({"num_layers": "3"}, "`num_layers`.*3"),
        ({"num_attention_heads": None}, "`num_attention_heads`.*None"),
        ({"num_layers": 2}, "`transformer_blocks.2."),
        ({"num_layers": 4}, "`transformer_blocks.3."),
        ({"num_embeds_ada_norm": 11}, r"class_embedder.embedding_table.weight.*\(11, 32\).*\(12, 32\)"),
        ({"out_channels": 4}, r"proj_out_2.weight.*\(32, 32\).*\(16, 32\)"),
        (lambda w: w | {"extra": torch.zeros(1)}, "`extra`"),
        (lambda w: without(w, BIAS), f"`{BIAS}`"),
        (lambda w: w | {"pos_embed.pos_embed": sine_cosine_grid(SIDE, 32) + 0.1}, "`pos_embed.pos_embed`.*0.1"),
        (lambda w: w | {"pos_embed.pos_embed": sine_cosine_grid(2, 32)}, "2x2.*`sample_size`"),
        # Public weights have one embedder for all blocks
        (lambda w: w | {EMBEDDER: w[EMBEDDER] + 1e-6}, f"`{EMBEDDER}`"),
    ],
)
def test_a_dit_that_cannot_be_represented_is_refused_by_name(dit_folder, change, message):
    change_folder(dit_folder, change)
    with pytest.raises(ValueError, match=message):
        convert_diffusers_dit(dit_folder)


def test_missing_files_are_named(dit_folder):
    for name, named in (
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        ("config.json", "config.json.*transformer/config.json"),
    ):
        (dit_folder / name).unlink()
        with pytest.raises(ValueError, match=named):
            convert_diffusers_dit(dit_folder)
    for convert in (convert_dit_checkpoint, convert_diffusers_dit):
        with pytest.raises(ValueError, match="nowhere"):
            convert(dit_folder / "nowhere")


def test_a_shard_outside_of_the_folder_is_refused(dit_folder):
    weights = dit_folder / "diffusion_pytorch_model.safetensors"
    weights.rename(dit_folder.parent / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(dit_folder.parent / "elsewhere.safetensors")):
        index = {"metadata": {}, "weight_map": {"proj_out_1.weight": name}}
        Path(f"{weights}.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="elsewhere.safetensors"):
            convert_diffusers_dit(dit_folder)


# ---- Report and scripts ----


def test_report_prints_a_line_for_modules_that_differ_in_their_layer_only(save_dit):
    _, report = convert_dit_checkpoint(save_dit(dit_weights()), num_attention_heads=HEADS)
    text = str(report)
    assert "dit.pt" in text
    assert "  blocks.*.mlp.fc1 -> transformer_blocks.*.ff.linear_1 (6 weights)" in text
    assert "  pos_embed: recomputed" in text
    assert re.search(rf"^{len(report.fresh)} \D*$", text, re.MULTILINE)
    assert all(f"note: {note}" in text for note in report.notes)
    assert text.count("\n") < 40
    assert ConversionReport(**json.loads(report.to_json())) == report


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_dit_script_converts(kind, save_dit, dit_folder, tmp_path, capsys):
    output, weights = tmp_path / "new" / "model", dit_weights()
    options, convert, source = {"num_refine_layers": 2, "window_size": 2}, convert_diffusers_dit, dit_folder
    other = ("--num_attention_heads", 2)  # a folder says it itself
    if kind == "checkpoint":
        options["num_attention_heads"], convert, source = HEADS, convert_dit_checkpoint, save_dit(weights)
        other = ("--frequency_shift", 1)
    else:
        options["frequency_shift"] = 0.0
        output.mkdir(parents=True)  # an empty folder may be there
    arguments = ["--source", source, *(word for key, value in options.items() for word in (f"--{key}", value))]
    for refused in ([*arguments, *other, "--output", output], [*arguments, "--output", source]):
        with pytest.raises(SystemExit):
            call("convert_dit.py", *refused)
    assert "--output" in (said := capsys.readouterr().err) and other[0] in said

    call("convert_dit.py", *arguments, "--output", output, "--seed", 5)
    assert [path.name for path in output.parent.iterdir()] == ["model"]  # nothing written aside is left
    model = D2iTContentModel.from_pretrained(output)
    report = ConversionReport(**json.loads((output / "conversion.json").read_text()))
    assert str(report) in capsys.readouterr().out
    assert_accounts_for_everything(
        report, weights if kind == "checkpoint" else make_diffusers_dit().state_dict(), model
    )
    torch.manual_seed(5)
    assert same_weights(model, convert(source, **options)[0])
    assert all(model.config[key] == value for key, value in options.items())
    assert model.refine_nets[0].time_embed.frequencies.downscale_freq_shift == 0  # as the original DiT computes it
