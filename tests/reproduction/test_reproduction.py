# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The study of reproduction/: every script in its smallest preset, on photographs, and what it concludes."""

import importlib
import json
from multiprocessing import get_context
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler
from photographs import load_photographs
from script_runs import REPRODUCTION, call, importing_from, main_of

from diffusers_d2it import D2iTContentModel, DCDiTModel, DCDiTPipeline, load_preset
from diffusers_d2it.grains import tie


CLASSES = (1, 107)  # of the bundled checkpoint
WRITTEN = {
    "tables": ["table_3", "table_4", "table_5", "loss_and_noise"],
    "figure_5": ["figure_5"],
    "figure_6": ["figure_6"],
}


@pytest.fixture(scope="module", autouse=True)
def reproduction():
    with importing_from(REPRODUCTION):
        yield


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A data set of two classes with the splits train and validation: crops of photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    pixels = ((load_photographs(128) + 1) * 127.5).round().to(torch.uint8)
    crops = [pixels[:, :, y : y + 64, x : x + 64] for y in range(0, 64, 9) for x in range(0, 64, 16)]
    images = [PIL.Image.fromarray(crop.permute(1, 2, 0).numpy()) for part in crops for crop in part]
    labels = [CLASSES[i % 2] for i in range(len(images))]
    for split, chosen in (("train", slice(0, 64)), ("validation", slice(64, 96))):
        rows = {"image": images[chosen], "label": labels[chosen]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture
def in_this_process(monkeypatch):
    """Training runs of the study without the start of a process for each."""
    study = importlib.import_module("study")
    monkeypatch.setattr(study.Study, "_call", lambda self, script, *flags: call(str(script), *flags))


def without_some(rows: list, claims: list) -> tuple[list, list]:
    """A table without arms each of whose settings another one has that is trained here."""
    left_out = [row.label for row in rows if row.arm in ("router", "grain-loss", "equal-weights")]
    kept = [row for row in rows if row.label not in left_out]
    return kept, [claim for claim in claims if not {claim.better, claim.worse}.intersection(left_out)]


def test_claims_of_tables_are_about_their_rows_and_rows_about_arms():
    arms, tables = (importlib.import_module(name) for name in ("arms", "tables"))
    for rows, claims in tables.TABLES.values():
        labels = [row.label for row in rows]
        assert {row.arm for row in rows} <= arms.ARMS.keys() and len({*labels}) == len(labels)
        assert claims and all({claim.better, claim.worse} <= {*labels} for claim in claims)


@pytest.mark.parametrize("script", WRITTEN)
def test_each_script_in_its_smallest_preset(script, photographs, work_dir, tmp_path, in_this_process, monkeypatch):
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "TABLES", {name: without_some(*table) for name, table in tables.TABLES.items()})
    main_of(script, "--data", photographs, "--work_dir", work_dir, "--preset", "smoke", "--output_dir", tmp_path)
    for name in WRITTEN[script]:
        result = json.loads((tmp_path / f"{name}-smoke.json").read_text())
        assert result["protocol"]["preset"]["name"] == "smoke"
        assert result["claims"]
        tables = result["rows"].values() if "rows" in result else ()
        distances = [row[budget]["frechet_distance"] for row in tables for budget in ("equal_steps", "equal_seconds")]
        distances += [point["frechet_distance"] for curve in result.get("curves", {}).values() for point in curve]
        assert distances and all(value > 0 for of_seeds in distances for value in of_seeds)


def test_both_adaptive_models_and_dit(photographs, work_dir, tmp_path, in_this_process):
    main_of("adaptive", "--data", photographs, "--work_dir", work_dir, "--preset", "smoke", "--output_dir", tmp_path)
    result = json.loads((tmp_path / "adaptive-smoke.json").read_text())
    rows, macs = result["rows"], result["training_step"]["macs"]
    assert (tmp_path / "adaptive-smoke.png").is_file() and len(result["claims"]) == 9
    # Of 64 cells: 16 regions of which half are fine; DiT/2 and DiT/1
    assert rows["D2iT, 0.5"]["tokens"] == {"backbone": 16, "refine": 32}
    assert rows["DiT/2, 1"]["tokens"] == {"backbone": 16} and rows["DiT/1, 1"]["tokens"] == {"backbone": 64}
    assert rows["DC-DiT, 0.4"]["tokens"]["backbone"] <= rows["DC-DiT, 1"]["tokens"]["backbone"]
    assert rows["DC-DiT, 1, guided"]["gmac"] > 1.9 * rows["DC-DiT, 1"]["gmac"]
    for name, row in rows.items():
        equal = row.get("equal_macs")
        if equal is not None:
            assert equal["steps"] * macs[row["arm"]] == pytest.approx(2 * macs["d2it"], abs=macs[row["arm"]] / 2), name


def test_several_processes_score_the_same(photographs, work_dir, tmp_path, in_this_process, monkeypatch):
    """Once all is trained: the scores that are kept are read, and whatever is missing is scored, by two processes."""
    # Forks are spared the start of a process; what they are sent goes through pickle too
    monkeypatch.setattr(importlib.import_module("scoring"), "get_context", lambda _: get_context("fork"))
    flags = ["--data", photographs, "--work_dir", work_dir, "--preset", "smoke"]
    for jobs in (1, 2):
        main_of("tables", "table_5", *flags, "--output_dir", tmp_path / str(jobs), "--jobs", jobs)
        next((work_dir / "scores").glob("*-random.json")).unlink()
    one, two = (json.loads((tmp_path / jobs / "table_5-smoke.json").read_text()) for jobs in "12")
    assert one == two


def test_verdicts():
    verdict = importlib.import_module("report").verdict
    assert verdict([1.0, 1.1, 1.2], [2.0, 2.2, 2.1]) == "holds"
    assert verdict([2.0, 2.2, 2.1], [1.0, 1.1, 1.2]) == "does not hold"
    assert verdict([1.0, 1.1, 1.2], [2.0, 1.0, 2.1]) == "cannot be told"  # one seed says otherwise
    assert verdict([1.0, 1.0, 1.0], [1.01, 1.01, 9.0]) == "cannot be told"  # and here one alone says so
    # Three of the same sign, their mean at three standard errors: the 95 % interval of three needs 4.3
    assert verdict([0.0, 0.0, 0.0], [1.0, 2.0, 0.7]) == "cannot be told"
    assert verdict([1.0], [2.0]) == "cannot be told"


def test_verdicts_about_equal_things_are_rarely_told():
    verdict = importlib.import_module("report").verdict
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(2000, 2, 3, generator=generator).tolist()
    told = sum(verdict(better, worse) != "cannot be told" for better, worse in pairs)
    assert 0.03 < told / len(pairs) < 0.07


def test_a_work_folder_of_another_study_is_refused(photographs, tmp_path):
    study = importlib.import_module("study")
    flags = ["--data", str(photographs), "--work_dir", str(tmp_path), "--preset"]
    parser = study.make_parser("")
    study.Study(parser.parse_args([*flags, "smoke"]))
    study.Study(parser.parse_args([*flags, "smoke"]))
    with pytest.raises(ValueError, match="preset.name.*small.*smoke|preset.name.*smoke.*small"):
        study.Study(parser.parse_args([*flags, "small"]))


def test_dit_of_cells_is_a_plain_transformer_over_all_of_them(tmp_path):
    """Its blocks by those of a network that is given all cells as a sequence of one image; it is loaded as others."""
    cell_dit, layers = importlib.import_module("cell_dit"), importlib.import_module("diffusers_d2it.models.layers")
    model = cell_dit.CellDiT(**load_preset("dcdit-tiny")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    model = cell_dit.CellDiT.from_pretrained(tmp_path)
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    conditioning = model.time_embed(torch.tensor([5, 900]), torch.float32) + model.label_embed(labels)
    weight = model.conv_in.weight.flatten(1)  # (D, C)
    tokens = latents.flatten(2).transpose(1, 2) @ weight.T + model.conv_in.bias
    tokens = tokens + layers.sincos_positions((8, 8), tokens)
    conditioning = torch.nn.functional.silu(conditioning)
    for block in model.transformer_blocks:
        plain = layers.DiTBlock(64, 2)
        plain.load_state_dict(block.state_dict())
        tokens = plain(tokens, conditioning)
    expected = model.norm_out(tokens, conditioning).transpose(1, 2).view(2, 4, 8, 8)
    output = model(latents, torch.tensor([5, 900]), labels, budget=0.5)
    torch.testing.assert_close(output.sample, expected)
    assert output.kept.all()


def test_a_model_without_refine_net_is_the_rough_prediction(make_content_model):
    """Loaded from its weights as any other model, it predicts what it did in training."""
    train_arm = importlib.import_module("train_arm")
    model = make_content_model()
    for net in model.refine_nets:
        torch.nn.init.zeros_(net.norm_out.proj_out.weight)
        torch.nn.init.zeros_(net.norm_out.proj_out.bias)
    whole = D2iTContentModel(**{k: v for k, v in model.config.items() if not k.startswith("_")}).eval()
    whole.load_state_dict(model.state_dict())
    rough = train_arm.without_refine_net(model)
    grain_map = (torch.rand(2, 4, 4) < 0.5).long()
    latents = tie(torch.randn(2, model.config.in_channels, 8, 8), grain_map)
    inputs = latents, torch.tensor([10, 900]), grain_map, torch.tensor([0, 1])
    torch.testing.assert_close(rough(*inputs).sample, whole(*inputs).sample)
    rough(*inputs).sample.sum().backward()
    assert all(parameter.grad is None for parameter in rough.refine_nets.parameters())


def test_samples_that_are_not_tied(make_pipeline):
    """Every cell goes its own way in the loop, the decoder still gets one value for a code, and the patch ends."""
    scoring = importlib.import_module("scoring")
    pipe = make_pipeline()
    inputs = {"class_labels": [1], "grain_map": "coarse", "num_inference_steps": 2, "guidance_scale": 1.0}
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return tensors

    with scoring.untied_sampling():
        images = pipe(**inputs, callback_on_step_end=keep, generator=torch.manual_seed(0), output_type="latent").images
    coarse = torch.zeros(1, 4, 4, dtype=torch.int64)
    assert not torch.equal(seen[0], tie(seen[0], coarse))
    assert torch.equal(images, tie(images, coarse))
    pipe(**inputs, callback_on_step_end=keep, generator=torch.manual_seed(0))
    assert torch.equal(seen[-1], tie(seen[-1], coarse))


def test_dcdit_in_miniature(photographs, tmp_path, monkeypatch, capsys):
    """Arms differ by what they say, and what is measured of a model is what a plain pass says."""
    dcdit = importlib.import_module("dcdit")
    monkeypatch.setattr(dcdit, "call", lambda script, *flags: call(script, *flags))
    flags = ["--data", photographs, "--work_dir", tmp_path, "--steps", 2, "--seeds", 0, "--num_images", 8]
    main_of("dcdit", *flags, "--arms", "dc-dit", "residual at zero", "--output_dir", tmp_path)
    found = json.loads((tmp_path / "dcdit-small.json").read_text())["arms"]
    assert list(found) == ["dc-dit", "residual at zero"] and "| residual at zero |" in capsys.readouterr().out
    first, zero = (tmp_path / "runs" / f"{arm}-0-start" for arm in ("dc-dit", "residual-at-zero"))
    first, zero = (DCDiTModel.from_pretrained(one) for one in (first, zero))
    assert first.residual_proj.weight.any() and not zero.residual_proj.weight.any()
    latents, labels = dcdit.validation(tmp_path / "cache-validation", 8)
    model = DCDiTModel.from_pretrained(tmp_path / "runs" / "dc-dit-0" / "checkpoint-2" / "model_ema")
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noised = DDPMScheduler().add_noise(latents, noise, torch.tensor([500]))
    with torch.no_grad():
        output = model(noised, 500, labels, budget=0.4)
    [run], place = found["dc-dit"]["2"], dcdit.TIMESTEPS.index(500)
    assert run["error"]["0.4"][place] == pytest.approx((output.sample - noise).square().mean().item(), rel=1e-4)
    natural = (output.boundary_probability > 0.5).float().mean().item()
    assert run["natural_share"][place] == pytest.approx(natural, abs=1e-3)


def test_a_small_dcdit_is_trained_and_judged(photographs, tmp_path, monkeypatch, capsys):
    """Lengths are of one run and by its own objective; the samples are those of its pipeline."""
    dcdit, small = (importlib.import_module(name) for name in ("dcdit", "small_dcdit"))
    for module in (dcdit, small):
        monkeypatch.setattr(module, "call", lambda script, *flags: call(script, *flags))
    (tmp_path / "model.json").write_text(json.dumps(dcdit.CONFIG))
    recipe = ["--preset=model.json", "--objective=flow_matching", "--resolution=64", "--train_batch_size=4"]
    (tmp_path / "recipe.txt").write_text("\n".join(recipe))
    monkeypatch.setattr(small, "RECIPE", tmp_path / "recipe.txt")
    monkeypatch.setattr(small, "CALLS", {"as called by default": {}, "few": {"budget": 0.01, "guidance_scale": 1.0}})
    flags = ["--data", photographs, "--work_dir", tmp_path, "--lengths", 1, 2, "--num_samples", 20, "--num_images", 8]
    main_of("small_dcdit", *flags, "--output_dir", tmp_path)
    found = json.loads((tmp_path / f"{small.NAME}.json").read_text())
    assert list(found["lengths"]) == ["1", "2"] and "| few |" in capsys.readouterr().out
    latents, labels = dcdit.validation(tmp_path / "cache-validation", 8)
    noise, place = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), dcdit.TIMESTEPS.index(500)
    for steps, length in found["lengths"].items():
        model = DCDiTModel.from_pretrained(tmp_path / "run" / f"checkpoint-{steps}" / "model_ema")
        with torch.no_grad():
            predicted = model((latents + noise) / 2, 500, labels).sample
        expected = (predicted - (noise - latents)).square().mean().item()
        assert length["error"]["1"][place] == pytest.approx(expected, rel=1e-4)
    pipe = DCDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.id2label == {1: "goldfish", 107: "jellyfish"}
    drawn = pipe("goldfish", num_inference_steps=20, budget=0.01, guidance_scale=1.0, output_type="latent")
    assert found["rows"]["few"]["tokens"] == pytest.approx(drawn.token_counts.float().mean().item(), rel=0.3)
    assert found["rows"]["few"]["results"][0]["protocol"]["samples"]["num_images"] == 20
    assert PIL.Image.open(tmp_path / f"{small.NAME}.png").size == (10 * 64, 4 * 64)


def test_curves_of_single_changes(photographs, tmp_path, monkeypatch):
    """Each arm is its recipe with its change, and is scored after each of its lengths; what is there is kept."""
    curves, trained = importlib.import_module("curves"), []

    def train(script: str, *flags) -> None:
        trained.append(list(map(str, flags)))
        call(script, *flags)

    monkeypatch.setattr(curves, "call", train)
    monkeypatch.setattr(curves, "RECIPES", tmp_path)
    monkeypatch.setattr(curves, "CALLS", {"few": {"num_inference_steps": 2, "guidance_scale": 1.0}})
    sizes = {"content": "content-tiny", "dvae": "dvae-tiny"}
    for stage, preset in sizes.items():
        flags = ["--resolution=64", "--train_batch_size=2", f"--preset={preset}"]
        flags += ["--objective=flow_matching"] if stage == "content" else ["--gan_weight=0", "--perceptual_weight=1"]
        (tmp_path / f"{stage}.txt").write_text("\n".join(flags))
    arms = ["noise predicted", "without perceptual loss"]
    flags = ["--data", photographs, "--work_dir", tmp_path / "work", "--steps", 1, 2, "--steps_of_autoencoders", 1]
    flags += ["--num_samples", 20, "--output_dir", tmp_path, "--arms", *arms]
    for _ in range(2):
        main_of("curves", *flags)
    lengths = [one[one.index("--max_train_steps") + 1] for one in trained]
    assert lengths == ["1", "2", "1"] and "epsilon" in trained[0] and "--perceptual_weight" in trained[2]
    found = json.loads((tmp_path / f"{curves.NAME}.json").read_text())["curves"]
    assert list(found) == arms and list(found[arms[0]]) == ["1", "2"] and list(found[arms[1]]) == ["1"]
    for what, number in ((found[arms[0]]["2"]["few"], 20), (found[arms[1]]["1"][""], 32)):
        assert {one["protocol"]["samples"]["num_images"] for one in what} == {number}
    rows = [line.split("|")[1:-1] for line in curves.over_images(found).splitlines()]
    assert [cell.strip() for cell in rows[0]] == ["", "", "32", "64"] and not rows[3][-1].strip()
