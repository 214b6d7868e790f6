# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Adapters (LoRA) as users of diffusers have them: added, weighed, saved, loaded, fused, taken away."""

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_d2it import D2iTPipeline


def draw(pipe, **settings):
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"} | settings
    return pipe([1, 2], grain_map="fine", **settings, generator=torch.Generator().manual_seed(0)).images


def add(model, name="mine", seed=0, rank=2):
    """An adapter of random weights, so that it changes something."""
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=8, target_modules=targets, init_lora_weights=False), name)


@pytest.fixture
def pipe(make_pipeline):
    return make_pipeline()


@pytest.fixture
def saved(make_pipeline, tmp_path):
    """A folder of adapters, and what a pipeline draws with them."""
    trained = make_pipeline()
    add(trained.transformer)
    layers = get_peft_model_state_dict(trained.transformer, adapter_name="mine")
    D2iTPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    return tmp_path / "lora", draw(trained)


def test_loaded_adapters_draw_what_the_trained_ones_drew(pipe, saved):
    folder, expected = saved
    plain = draw(pipe)
    pipe.load_lora_weights(folder, adapter_name="mine")
    pipe.set_adapters("mine", 4.0)  # alpha over rank, which the file of the weights alone does not tell
    assert pipe.get_active_adapters() == ["mine"] and pipe.get_list_adapters() == {"transformer": ["mine"]}
    torch.testing.assert_close(draw(pipe), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


def test_the_metadata_brings_the_settings_of_an_adapter(pipe, tmp_path):
    add(pipe.transformer)
    expected = draw(pipe)
    pipe.transformer.save_lora_adapter(tmp_path, adapter_name="mine")
    pipe.unload_lora_weights()
    pipe.transformer.load_lora_adapter(tmp_path, prefix=None, adapter_name="mine")
    assert torch.equal(draw(pipe), expected)


def test_weights_of_adapters(pipe):
    plain = draw(pipe)
    add(pipe.transformer, "a")
    add(pipe.transformer, "b", seed=1)
    pipe.set_adapters("a", 0.0)
    assert torch.equal(draw(pipe), plain)
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    both = draw(pipe)
    pipe.set_adapters("a")
    one = draw(pipe)
    assert not torch.equal(both, one) and not torch.equal(one, plain)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), one)
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {"transformer": ["a"]}


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_the_scale_of_a_call_is_that_of_the_adapter(pipe, scale):
    add(pipe.transformer)
    pipe.set_adapters("mine", scale)
    expected = draw(pipe)
    pipe.set_adapters("mine", 1.0)
    full = draw(pipe)
    torch.testing.assert_close(draw(pipe, attention_kwargs={"scale": scale}), expected)
    assert torch.equal(draw(pipe), full)  # of that call alone
    assert pipe.attention_kwargs is None


def test_fused_adapters_draw_the_same_and_come_out_again(pipe):
    plain = draw(pipe)
    add(pipe.transformer)
    expected = draw(pipe)
    pipe.fuse_lora(lora_scale=1.0)
    assert pipe.num_fused_loras == 1
    torch.testing.assert_close(draw(pipe), expected)
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(pipe), expected)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), plain)


@pytest.mark.parametrize("name", ["vae", "grain_model"])
def test_other_models_take_adapters_too(pipe, tmp_path, name):
    plain, model = draw(pipe), getattr(pipe, name)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "mine")
    with_adapter = pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    model.save_lora_adapter(tmp_path, adapter_name="mine")
    model.unload_lora()
    assert torch.equal(draw(pipe), plain)
    model.load_lora_adapter(tmp_path, prefix=None, adapter_name="mine")
    again = pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert torch.equal(again.images, with_adapter.images) and torch.equal(again.grain_maps, with_adapter.grain_maps)


def test_pickled_adapters_are_not_read(pipe, saved):
    folder, _ = saved
    (file,) = folder.iterdir()
    torch.save({"transformer.x.lora_A.weight": torch.ones(1)}, folder / "pytorch_lora_weights.bin")
    file.unlink()
    for arguments in ({}, {"weight_name": "pytorch_lora_weights.bin"}, {"use_safetensors": False}):
        with pytest.raises((ValueError, OSError)):
            pipe.load_lora_weights(folder, **arguments)
    for load in (pipe.load_lora_weights, pipe.transformer.load_lora_adapter):
        with pytest.raises(ValueError, match="pytorch_lora_weights.bin"):
            load(folder / "pytorch_lora_weights.bin")
    assert pipe.get_list_adapters() == {}


def test_no_pickled_adapters_are_written(pipe, tmp_path):
    add(pipe.transformer)
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="mine")
    with pytest.raises(ValueError, match="`safe_serialization`"):
        pipe.transformer.save_lora_adapter(tmp_path, adapter_name="mine", safe_serialization=False)
    with pytest.raises(ValueError, match="`safe_serialization`"):
        pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers, safe_serialization=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)], ids=str)
def test_a_swapped_adapter_is_the_other_one(pipe, make_pipeline, tmp_path, ranks):
    expected = {}
    for rank in ranks:
        other = make_pipeline()
        add(other.transformer, seed=rank, rank=rank)
        other.transformer.save_lora_adapter(tmp_path / str(rank), adapter_name="mine")
        expected[rank] = draw(other)
    pipe.transformer.enable_lora_hotswap(target_rank=max(ranks))
    for rank, swap in zip(ranks, (False, True)):
        pipe.transformer.load_lora_adapter(tmp_path / str(rank), prefix=None, adapter_name="mine", hotswap=swap)
        torch.testing.assert_close(draw(pipe), expected[rank])
