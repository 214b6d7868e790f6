# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Whatever could be saved loads, and draws the same images; what could not load is refused when it is saved."""

import json
import re
import shutil

import accelerate
import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file

from diffusers_d2it import D2iTContentModel, D2iTPipeline


def draw(pipe):
    settings = {"num_inference_steps": 2, "grain_num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    settings["grain_map"] = "coarse" if pipe.grain_model is None else None
    if pipe.transformer is None:
        return pipe.decode_latents(torch.ones(1, pipe.vae.config.latent_channels, 8, 8), output_type="pt")
    if pipe.vae is None:
        settings["output_type"] = "latent"
    return pipe([1, 2], **settings, generator=torch.Generator().manual_seed(0)).images


# ---- Classes of a user, in a module of the user's ----


class MyScheduler(DPMSolverMultistepScheduler):
    pass


class MyContentModel(D2iTContentModel):
    @register_to_config
    def __init__(self, strength: float = 1.0, **kwargs):
        super().__init__(**kwargs)


class MyPipeline(D2iTPipeline):
    def __init__(self, vae, grain_model, transformer, scheduler, grain_scheduler, extra, id2label=None, note="a"):
        super().__init__(vae, grain_model, transformer, scheduler, grain_scheduler, id2label)
        self.register_modules(extra=extra)
        self.register_to_config(note=note)


class PlainPipeline(D2iTPipeline):
    pass


class MyExtra(torch.nn.Module):
    pass


# ---- States ----


def lora(pipe, **settings):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "mine")


def fused_lora(pipe):
    lora(pipe)
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()


def unloaded_lora(pipe):
    lora(pipe)
    pipe.transformer.unload_lora()


def peft_wrapper(pipe):
    from peft import LoraConfig, get_peft_model

    pipe.transformer = get_peft_model(pipe.transformer, LoraConfig(r=2, target_modules=["to_q"]))


def fused(pipe):
    pipe.transformer.fuse_qkv_projections()


def unfused(pipe):
    fused(pipe)
    pipe.transformer.unfuse_qkv_projections()


def extra_key(pipe):
    pipe.transformer.register_to_config(trained_by="me")


def extra_key_of_the_pipeline(pipe):
    pipe.register_to_config(trained_by="me")


def key_out_of_range(pipe):
    pipe.vae.register_to_config(scaling_factor=-1.0)


def key_that_json_does_not_hold(pipe):
    pipe.transformer.register_to_config(num_layers=torch.tensor(1))


def own_scheduler(pipe):
    pipe.scheduler = MyScheduler.from_config(pipe.scheduler.config)


def other_scheduler(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def own_model(pipe):
    model = MyContentModel(**{key: value for key, value in pipe.transformer.config.items() if key[0] != "_"})
    model.load_state_dict(pipe.transformer.state_dict())
    pipe.transformer = model


def parts(pipe):
    names = ("vae", "grain_model", "transformer", "scheduler", "grain_scheduler", "id2label")
    return {name: pipe.components[name] for name in names}


def own_pipeline(pipe):
    return MyPipeline(**parts(pipe), extra=EulerDiscreteScheduler(), note="b")


def own_pipeline_with_an_unsavable_component(pipe):
    return MyPipeline(**parts(pipe), extra=MyExtra())


def plain_subclass(pipe):
    return PlainPipeline(**parts(pipe))


def without_an_autoencoder(pipe):
    pipe.vae = None


def without_a_transformer(pipe):
    pipe.transformer = None


def without_a_scheduler(pipe):
    pipe.scheduler = None


def without_a_grain_model(pipe):
    pipe.grain_model = pipe.grain_scheduler = None


def nan(pipe):
    pipe.transformer.transformer_blocks[0].attn.to_q.weight.data[0, 0] = float("nan")


def half(pipe):
    pipe.to(torch.bfloat16)


def one_model_in_half(pipe):
    pipe.transformer.to(torch.float16).to(torch.float32)
    pipe.vae.half().float()


def compiled(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compiled_blocks(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager")


def frozen(pipe):
    pipe.transformer.requires_grad_(False)


def in_training(pipe):
    pipe.transformer.train()
    pipe.transformer.enable_gradient_checkpointing()


def transposed(pipe):
    pipe.vae.to(memory_format=torch.channels_last)


def shared_weights(pipe):
    first, second = pipe.transformer.transformer_blocks[:2]
    second.attn.to_q.weight = first.attn.to_q.weight


def group_offloaded(pipe):
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


def offloaded(pipe):
    for name in ("vae", "grain_model", "transformer"):
        accelerate.cpu_offload(getattr(pipe, name), execution_device=torch.device("cpu"))


def cached(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))


def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def parametrized(pipe):
    torch.nn.utils.parametrizations.weight_norm(pipe.transformer.patch_embed)


def another_layer(pipe):
    pipe.transformer.transformer_blocks.append(pipe.transformer.transformer_blocks[0])


def renamed_classes(pipe):
    pipe.register_to_config(id2label={1: "one", 2: "two, second"})


def class_names_that_are_none(pipe):
    pipe.register_to_config(id2label={"cat": 1})


KEPT = [
    fused_lora, unloaded_lora, unfused, extra_key, extra_key_of_the_pipeline, own_scheduler, other_scheduler,
    own_model, own_pipeline, plain_subclass, without_a_grain_model, without_an_autoencoder, without_a_transformer,
    half, one_model_in_half,
    compiled, compiled_blocks, frozen, in_training, transposed, group_offloaded, cached, renamed_classes,
]  # fmt: skip
REFUSED = [
    lora, peft_wrapper, fused, key_out_of_range, key_that_json_does_not_hold, own_pipeline_with_an_unsavable_component,
    without_a_scheduler, nan, parametrized, another_layer, shared_weights, offloaded, class_names_that_are_none,
]  # fmt: skip
EITHER = [layerwise_casting]


@pytest.mark.parametrize("state", [*KEPT, *REFUSED, *EITHER], ids=lambda state: state.__name__)
def test_whatever_could_be_saved_loads(make_pipeline, tmp_path, state):
    pipe = make_pipeline()
    expected = draw(pipe) if state is extra_key_of_the_pipeline else None  # after that diffusers calls it no more
    pipe = state(pipe) or pipe
    folder = tmp_path / "pipe"
    try:
        pipe.save_pretrained(folder)
    except (ValueError, RuntimeError) as error:
        print("REFUSED", type(error).__name__, error)
        assert state not in KEPT and not folder.exists() and not list(tmp_path.iterdir())
        return
    assert state not in REFUSED
    loaded = type(pipe).from_pretrained(folder)
    for name in set(pipe.config) & {*pipe._models, *pipe._schedulers, "extra"}:
        part = getattr(pipe, name)
        assert type(getattr(loaded, name)) is type(getattr(part, "_orig_mod", part))
    assert loaded.id2label == pipe.id2label and loaded.config.get("note") == pipe.config.get("note")
    if expected is None:
        with torch.compiler.set_stance("force_eager"):  # what compiled models draw: tests/models/test_compiled.py
            expected = draw(pipe)
    torch.testing.assert_close(draw(loaded.to(pipe.dtype)), expected)


# ---- What people change in a saved folder ----


def edit(file, **changes):
    file.write_text("\ufeff" + json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def edited_model(folder):
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    return folder / "vae" / "config.json"


def edited_index(folder):
    edit(folder / "model_index.json", id2label={"3": "three"})
    return folder / "model_index.json"


def key_of_another_tool(folder):
    edit(folder / "transformer" / "config.json", auto_map={"AutoModel": "their.Model"}, dtype="bfloat16")
    return folder / "transformer" / "config.json"


def part_of_another_tool(folder):
    edit(folder / "model_index.json", safety_checker=[None, None])
    return folder / "model_index.json"


def scheduler_saved_into_it(folder):
    EulerDiscreteScheduler(beta_end=0.02).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    return folder / "scheduler" / "scheduler_config.json"


def weights_of_another_training(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    return file


def missing_weights(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    return file


def key_out_of_its_range(folder):
    edit(folder / "vae" / "config.json", scaling_factor=-1)
    return folder / "vae" / "config.json"


@pytest.mark.parametrize(
    "change",
    [edited_model, edited_index, key_of_another_tool, part_of_another_tool, scheduler_saved_into_it],
    ids=lambda change: change.__name__,
)
def test_texts_may_be_edited_and_are_named(make_pipeline, tmp_path, caplog, change):
    make_pipeline().save_pretrained(tmp_path)
    file = change(tmp_path)
    pipe = D2iTPipeline.from_pretrained(tmp_path)
    assert any(str(file) in record.getMessage() for record in caplog.records)
    assert pipe.vae.config.scaling_factor == (
        0.5 if change is edited_model else make_pipeline().vae.config.scaling_factor
    )
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler) == (change is scheduler_saved_into_it)
    assert (pipe.id2label == {3: "three"}) == (change is edited_index)
    caplog.clear()
    pipe.save_pretrained(tmp_path)
    D2iTPipeline.from_pretrained(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("change", [weights_of_another_training, missing_weights, key_out_of_its_range])
def test_weights_and_ranges_are_not_for_editing(make_pipeline, tmp_path, change):
    make_pipeline().save_pretrained(tmp_path)
    file = change(tmp_path)
    with pytest.raises(OSError if change is missing_weights else ValueError, match=re.escape(str(file))):
        D2iTPipeline.from_pretrained(tmp_path)


def test_weights_copied_beside_others_load_where_they_are_asked_for(make_pipeline, tmp_path, caplog):
    model = make_pipeline().transformer
    model.save_pretrained(tmp_path / "a")
    model.half().save_pretrained(tmp_path / "b", variant="fp16")
    copied = tmp_path / "a" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(tmp_path / "b" / copied.name, copied)
    assert not caplog.records
    found = D2iTContentModel.from_pretrained(tmp_path / "a", variant="fp16")
    assert torch.equal(found.patch_embed.weight, model.patch_embed.weight.float())
    assert any(str(copied) in record.getMessage() for record in caplog.records)
    shutil.copy(tmp_path / "b" / copied.name, tmp_path / "a" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="manifest.json"):
        D2iTContentModel.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    D2iTContentModel.from_pretrained(tmp_path / "a")
