# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""train_d2it.py on top of a model: adapters alone (--lora_rank), and other classes than those it knows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from script_runs import call, call_train

from diffusers_d2it import D2iTContentModel, D2iTPipeline


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(1, num_inference_steps=2, grain_map="fine", generator=generator, output_type="pt").images


@pytest.fixture(scope="module")
def pipeline(make_pipeline, tmp_path_factory) -> Path:
    """Of the eight classes of the data, without their names."""
    output = tmp_path_factory.mktemp("models") / "pipeline"
    make_pipeline(num_classes=8, id2label=None).save_pretrained(output)
    return output


@pytest.fixture(scope="module")
def arguments(folder, pipeline, tmp_path_factory) -> list:
    """A start is still to be named."""
    output = tmp_path_factory.mktemp("runs") / "cache"
    flags = ["--train_data_dir", folder, "--vae", pipeline / "vae", "--resolution", 32, "--output_dir", output]
    call("cache_latents.py", *flags)
    return ["--latent_cache", output, "--vae", pipeline / "vae", "--grain", pipeline]


@pytest.fixture(scope="module")
def adapters(arguments, pipeline, tmp_path_factory):
    """Flags, and the output of four steps."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    flags = [*arguments, "--init_from", pipeline, "--lora_rank", 2, "--learning_rate", 0.05, "--ema_decay", 0.5]
    flags += ["--mixed_precision", "no"]
    call_train("train_d2it.py", output, 4, *flags)
    return flags, output


def test_the_pipeline_loads_what_was_trained(adapters, pipeline):
    _, output = adapters
    pipe = D2iTPipeline.from_pretrained(pipeline)
    before = draw(pipe)
    pipe.load_lora_weights(output / "lora")
    assert not torch.allclose(draw(pipe), before)
    found = load_file(output / "lora" / "pytorch_lora_weights.safetensors")
    average = load_file(output / "checkpoint-4" / "adapters_ema.safetensors")
    assert len(found) == len(average) and all("lora" in name for name in found)
    for name, weight in average.items():
        assert torch.equal(found["transformer." + name.replace(".default", "")], weight)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)


def test_only_adapters_are_saved_and_the_card_names_what_they_belong_to(adapters):
    _, output = adapters
    checkpoint = output / "checkpoint-4"
    assert not (checkpoint / "model").exists() and not (output / "pipeline").exists()
    assert all("lora_" in name for name in load_file(checkpoint / "optimizer.safetensors"))
    card = (output / "lora" / "README.md").read_text()
    assert "load_lora_weights" in card and "lora" in card.split("---")[1] and "'pipeline'" in card


def test_a_resumed_run_ends_with_the_same_adapters(adapters, tmp_path):
    flags, output = adapters
    call_train("train_d2it.py", tmp_path / "run", 2, *flags)
    call_train("train_d2it.py", tmp_path / "run", 4, *flags, "--resume_from_checkpoint", "latest")
    for name in ("adapters", "adapters_ema", "optimizer"):
        first, second = (load_file(run / "checkpoint-4" / f"{name}.safetensors") for run in (output, tmp_path / "run"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_adapters_of_another_rank_or_model_are_not_resumed(adapters, pipeline, tmp_path):
    flags, output = adapters
    again = ["--resume_from_checkpoint", output / "checkpoint-4"]
    with pytest.raises(ValueError, match="lora_rank"):
        call_train("train_d2it.py", tmp_path / "a", 6, *flags, "--lora_rank", 3, *again)
    other = D2iTContentModel.from_pretrained(pipeline, subfolder="transformer")
    other.patch_embed.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="base"):
        call_train("train_d2it.py", tmp_path / "b", 6, *flags, "--init_from", tmp_path / "other", *again)


@pytest.mark.parametrize("num_classes", [2, 8, 20])
def test_other_classes_begin_a_new_table_and_keep_the_rest(make_content_model, tmp_path, num_classes):
    model = make_content_model(num_classes=8)
    model.save_pretrained(tmp_path)
    found = D2iTContentModel.from_pretrained(tmp_path, num_classes=num_classes, ignore_mismatched_sizes=True)
    assert found.config.num_classes == num_classes and len(found.label_embed.weight) == num_classes + 1
    assert torch.equal(found.label_embed.weight[-1], model.label_embed.weight[-1])
    assert torch.equal(found.label_embed.weight, model.label_embed.weight) == (num_classes == 8)
    others = found.state_dict().keys() - {"label_embed.weight"}
    assert all(torch.equal(found.state_dict()[name], model.state_dict()[name]) for name in others)
    found.save_pretrained(tmp_path / "again")
    assert D2iTContentModel.from_pretrained(tmp_path / "again").config.num_classes == num_classes
    with pytest.raises(ValueError, match="label_embed"):
        D2iTContentModel.from_pretrained(tmp_path, num_classes=num_classes + 1)
    with pytest.raises(ValueError, match="missing"):
        D2iTContentModel.from_pretrained(tmp_path, num_layers=4, ignore_mismatched_sizes=True)


def test_a_model_is_trained_further_on_other_classes(make_content_model, arguments, tmp_path):
    make_content_model(num_classes=3).save_pretrained(tmp_path / "model")
    call_train("train_d2it.py", tmp_path / "run", 2, *arguments, "--init_from", tmp_path / "model")
    pipe = D2iTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.transformer.config.num_classes == 8 and len(pipe.id2label) == 8
