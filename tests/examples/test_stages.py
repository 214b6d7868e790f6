# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What each stage leaves behind, and that the next one can use it."""

import json
from functools import partial

import PIL.Image
import pytest
import torch
from alike import same_weights
from diffusers import DiTTransformer2DModel
from image_files import encode, photo, truncated_jpeg, write_tar
from loopback_hub import Uploads, run_with_hub, serve_hub
from safetensors.torch import load_file
from script_runs import STEPS, as_code, call, call_train, logged, training_flags
from torch._dynamo.testing import CompileCounterWithBackend
from vision_models import save_vision_model

from diffusers_d2it import (
    D2iTContentModel,
    D2iTGrainModel,
    D2iTPipeline,
    DCDiTModel,
    DCDiTPipeline,
    DynamicAutoencoderKL,
    load_preset,
)
from diffusers_d2it.conversion import upcycle_dit
from diffusers_d2it.data.images import to_pixels
from diffusers_d2it.training import draw_budget


CLASSES = ["astronaut", "cat", "coffee", "galaxies", "motorcycle", "retina", "rocket", "tissue"]


# ---- Stage 1 ----


def test_autoencoder_run_leaves_a_calibrated_model_and_pictures(dvae):
    vae = DynamicAutoencoderKL.from_pretrained(dvae / "vae")
    assert vae.config.calibration["num_images"] == 8
    assert vae.config.scaling_factor != 1.0 and vae.config.shift_factor is not None
    assert PIL.Image.open(dvae / "samples" / f"step-{STEPS:07d}.png").size == (8 * 32, 3 * 32)
    assert sorted(path.name for path in dvae.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert not list(dvae.glob(".staging*"))  # nothing written aside is left
    card = (dvae / "vae" / "README.md").read_text()  # with figures and their protocol
    assert "PSNR in dB" in card and "32x32" in card and "licence" in card
    assert str(dvae.parent) not in card


def test_latents_have_unit_scale_after_training(dvae, folder):
    vae = DynamicAutoencoderKL.from_pretrained(dvae / "vae")
    images = [PIL.Image.open(path) for path in sorted(folder.rglob("*.png"))]
    with torch.no_grad():
        posterior = vae.encode(torch.stack([to_pixels(image, 32) for image in images])).latent_dist
        latents = vae.scale_latents(posterior.sample(torch.Generator().manual_seed(0)))
    assert latents.std().item() == pytest.approx(1, abs=0.15)
    torch.testing.assert_close(vae.unscale_latents(vae.scale_latents(latents)), latents, atol=1e-5, rtol=1e-5)


def test_discriminator_learns_from_its_start_step_on(dvae):
    files = (dvae / f"checkpoint-{step}" / "discriminator.safetensors" for step in (2, 4, 5))
    before, at_start, after = map(load_file, files)
    # The convolutions start as drawn, with deviation 0.02, and only the steps 4 and 5 train them
    assert before["layers.0.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert all(not torch.equal(at_start[name], after[name]) for name in after)
    assert all(not torch.equal(before[name], at_start[name]) for name in after)
    scalars = logged(dvae)
    for tag in ("adversarial", "gan_weight", "discriminator", "logits_real", "logits_fake"):
        assert sorted(scalars[tag]) == [4, 5], tag
    assert sorted(scalars["l1"]) == sorted(scalars["kl"]) == [1, 2, 3, 4, 5]
    assert scalars["discriminator"][4] == pytest.approx(1, abs=0.3)  # it cannot tell yet
    assert set(scalars) >= {"psnr_0.0", "psnr_0.5", "psnr_1.0", "ssim_0.0", "ssim_1.0"}


def test_discriminator_of_a_run_learns_to_tell_images_from_reconstructions(dvae_arguments, tmp_path):
    # Reconstructions of an autoencoder that learns slowly are easy to tell: half the hinge loss must go soon
    flags = "--preset dvae-tiny --gan_start_step 0 --gan_weight 0.01 --learning_rate 1e-3 --report_to tensorboard"
    rarely = ["--checkpointing_steps", 40, "--validation_steps", 40]
    call_train("train_dvae.py", tmp_path / "run", 40, *dvae_arguments, *flags.split(), *rarely)
    losses = logged(tmp_path / "run")["discriminator"]
    assert losses[1] == pytest.approx(1, abs=0.3)
    assert sum(losses[step] for step in range(31, 41)) / 10 < 0.5


def test_without_lpips_the_run_stops_and_says_what_to_do(folder, tmp_path, monkeypatch):
    # The package may be installed: VGG's weights are then missing where nothing has been downloaded
    arguments = ["--train_data_dir", folder, "--preset", "dvae-tiny"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="`perceptual_network`.*efficientnet-lite0"):
        call_train("train_dvae.py", tmp_path / "run", 1, *arguments)


def test_a_perceptual_loss_is_a_weighted_part_of_the_loss(dvae_arguments, tmp_path):
    arguments = [*dvae_arguments, "--preset", "dvae-tiny", "--report_to", "tensorboard", "--kl_weight", 0.1]
    arguments += ["--perceptual_network", "efficientnet-lite0", "--perceptual_weight", 0.5]
    call_train("train_dvae.py", tmp_path / "run", 1, *arguments)
    parts = {name: values[1] for name, values in logged(tmp_path / "run").items() if 1 in values}
    assert parts["perceptual"] > 0.1
    assert parts["loss"] == pytest.approx(parts["l1"] + 0.1 * parts["kl"] + 0.5 * parts["perceptual"])


def test_frozen_fine_path_keeps_codes_decoder_and_scale(dvae, dvae_arguments, tmp_path):
    start = DynamicAutoencoderKL.from_pretrained(dvae / "vae")
    arguments = [*dvae_arguments, "--init_from", dvae / "vae", "--freeze_fine_path", "--gan_weight", 0]
    arguments += ["--ema_decay", 0.5, "--fid_model", save_vision_model(tmp_path / "vision")]
    call_train("train_dvae.py", tmp_path / "run", 2, *arguments)
    vae = DynamicAutoencoderKL.from_pretrained(tmp_path / "run" / "vae")
    assert vae.config.scaling_factor == start.config.scaling_factor
    same = {name: torch.equal(value, start.state_dict()[name]) for name, value in vae.state_dict().items()}
    assert all(same[name] for name in same if name.startswith("decoder"))
    assert not any(same[name] for name in same if name.startswith("encoder.conv_outs.f8"))
    assert "rFID with features of" in (tmp_path / "run" / "vae" / "README.md").read_text()


def test_frozen_encoder_keeps_all_that_a_latent_cache_rests_on(dvae, dvae_arguments, tmp_path):
    start = DynamicAutoencoderKL.from_pretrained(dvae / "vae")
    arguments = [*dvae_arguments, "--init_from", dvae / "vae", "--freeze_encoder", "--gan_start_step", 0]
    call_train("train_dvae.py", tmp_path / "run", 2, *arguments, "--calibration_images", 2, "--ema_decay", 0.5)
    vae = DynamicAutoencoderKL.from_pretrained(tmp_path / "run" / "vae")
    assert vae.config.calibration == start.config.calibration  # of all images, not of two
    assert vae.config.scaling_factor == start.config.scaling_factor
    assert vae.config.shift_factor == start.config.shift_factor
    assert same_weights(vae.encoder, start.encoder)
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert changed >= {"decoder.conv_in.weight", "decoder.conv_out.weight"}


# ---- Stage 2 ----


def test_output_loads_in_the_pipeline(d2it, grain):
    pipe = D2iTPipeline.from_pretrained(d2it / "pipeline")
    assert pipe.id2label == dict(enumerate(CLASSES))
    output = pipe("cat", num_inference_steps=2)
    assert output.images[0].size == (32, 32)
    assert same_weights(D2iTGrainModel.from_pretrained(grain, subfolder="grain_model"), pipe.grain_model)
    assert PIL.Image.open(d2it / "samples" / f"step-{STEPS:07d}.png").size == (8 * 32, 2 * 32)
    card = (d2it / "pipeline" / "README.md").read_text()
    assert "photos, 32x32" in card and "## Limits" in card
    commands = [line.split()[1] for line in card.splitlines() if line.startswith("python ")]
    assert commands == ["train_dvae.py", "train_grain.py", "train_d2it.py"]
    assert (d2it / "pipeline" / "samples.png").is_file()


def test_output_of_dcdit_loads_in_its_pipeline(dcdit):
    pipe = DCDiTPipeline.from_pretrained(dcdit / "pipeline")
    assert pipe.id2label == dict(enumerate(CLASSES))
    output = pipe("cat", budget=0.5, num_inference_steps=2)
    assert output.images[0].size == (32, 32) and output.boundary_maps.shape == (1, 8, 8)
    assert PIL.Image.open(dcdit / "samples" / f"step-{STEPS:07d}.png").size == (8 * 32, 2 * 32)
    card = (dcdit / "pipeline" / "README.md").read_text()
    assert "photos, 32x32" in card and "DCDiTPipeline" in card
    commands = [line.split()[1] for line in card.splitlines() if line.startswith("python ")]
    assert commands == ["train_dcdit.py"]
    assert (dcdit / "pipeline" / "samples.png").is_file()


def test_dcdit_logs_its_budgets_and_what_becomes_of_its_tokens(dcdit):
    scalars = logged(dcdit)
    assert scalars["budget"] == pytest.approx(budgets_of(STEPS))
    signals = ["mse", "ratio", "natural_share", "natural_drift", "kept_share", "natural_share_noisy"]
    assert all(len(scalars[name]) == STEPS for name in signals)
    for step, share in scalars["natural_share"].items():
        assert scalars["natural_drift"][step] == pytest.approx(share - 0.25)
        assert 0.1 < share < 0.8
        assert scalars["kept_share"][step] == pytest.approx(share * scalars["budget"][step], abs=1 / 64)
    assert all(
        loss == pytest.approx(scalars["mse"][step] + 0.03 * scalars["ratio"][step])
        for step, loss in scalars["loss"].items()
    )


def budgets_of(steps: int) -> dict[int, float]:
    """Of `dcdit_arguments`, by the number of the update."""
    return {step + 1: draw_budget([0.1, 0.3, 0.6, 1.0], 2, 7, step) for step in range(steps)}


def test_dcdit_on_the_finest_grain_of_a_dynamic_autoencoder_in_passes_of_one_budget(
    cache, dvae, dcdit_arguments, tmp_path
):
    arguments = ["--latent_cache", cache, "--vae", dvae / "vae", *dcdit_arguments[4:]]
    arguments += ["--gradient_accumulation_steps", 3]
    arguments += ["--gradient_checkpointing", "--ratio_group_size", 1, "--preset", "dcdit-tiny"]
    call_train("train_dcdit.py", tmp_path / "run", 4, *arguments)
    assert logged(tmp_path / "run")["budget"] == pytest.approx(budgets_of(4))
    pipe = DCDiTPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert isinstance(pipe.vae, DynamicAutoencoderKL) and pipe.transformer.config.sample_size == 8
    assert pipe("rocket", num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.parametrize("num_classes", [8, 5])
def test_an_upcycled_dcdit_keeps_its_embedders_but_for_other_classes(
    make_dcdit, dcdit_arguments, tmp_path, num_classes
):
    start = make_dcdit(num_classes, conditioning_norm=True, position_patch_size=2)
    start.save_pretrained(tmp_path / "start")
    arguments = [*dcdit_arguments, "--init_from", tmp_path / "start", "--learning_rate", 0.01, "--ema_decay", 0.5]
    call_train("train_dcdit.py", tmp_path / "run", 2, *arguments, "--checkpointing_steps", 1)
    for part in ("model", "model_ema"):
        first, second = (DCDiTModel.from_pretrained(tmp_path / "run" / f"checkpoint-{i}" / part) for i in (1, 2))
        assert same_weights(second.time_embed, start.time_embed)
        same = {name: torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items()}
        changing = {name for name in same if not name.startswith(("time_embed", "label_embed"))}
        changing |= {"label_embed.weight"} if num_classes == 5 else set()
        assert {name for name in same if not same[name]} == changing
        assert second.config.num_classes == 8
    if num_classes == 8:
        assert same_weights(second.label_embed, start.label_embed)
        return
    # "no class" stays, but for two updates of 0.01
    torch.testing.assert_close(second.label_embed.weight[-1], start.label_embed.weight[-1], atol=0.021, rtol=0)
    call_train("train_dcdit.py", tmp_path / "parts", 1, *arguments)
    call_train("train_dcdit.py", tmp_path / "parts", 2, *arguments, "--resume_from_checkpoint", "latest")
    resumed = DCDiTModel.from_pretrained(tmp_path / "parts" / "checkpoint-2" / "model_ema")
    assert same_weights(resumed, second)


def test_an_upcycled_dcdit_learns_from_its_dit_first(dcdit_arguments, tmp_path):
    dit = DiTTransformer2DModel(2, 32, in_channels=4, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=8)
    first, second = dit.transformer_blocks
    second.norm1.emb.load_state_dict(first.norm1.emb.state_dict())  # as trained ones have them
    dit.save_pretrained(tmp_path / "dit")
    student, _ = upcycle_dit(tmp_path / "dit", norm_num_groups=4)
    student.save_pretrained(tmp_path / "start")
    arguments = [*dcdit_arguments, "--init_from", tmp_path / "start", "--checkpointing_steps", 1]
    arguments += ["--distill_from", tmp_path / "dit", "--distill_steps", 2]
    call_train("train_dcdit.py", tmp_path / "run", 3, *arguments)
    scalars = logged(tmp_path / "run")
    assert list(scalars["distillation"]) == [1, 2]
    for step, loss in scalars["loss"].items():
        learnt = scalars["distillation"].get(step, scalars["mse"][step])
        assert loss == pytest.approx(learnt + 0.03 * scalars["ratio"][step])
    for steps, resume in ((1, []), (3, ["--resume_from_checkpoint", "latest"])):
        call_train("train_dcdit.py", tmp_path / "parts", steps, *arguments, *resume)
    last = [DCDiTModel.from_pretrained(tmp_path / run / "checkpoint-3" / "model") for run in ("run", "parts")]
    assert same_weights(*last)


def test_unconditional_training_with_three_grains_from_images(folder, tmp_path, capsys):
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in folder.rglob("*.png"):
        (plain / f"{path.parent.name}.png").write_bytes(path.read_bytes())
    (plain / "broken.png").write_bytes(b"not an image")
    three_grains = {"downsample_factors": [4, 8, 16], "block_out_channels": [8, 8, 16, 16, 16]}
    config = tmp_path / "three-grains.json"
    config.write_text(json.dumps(load_preset("dvae-tiny") | three_grains | {"grain_ratios": [0.3, 0.3, 0.4]}))
    data = ["--train_data_dir", plain]
    weights = ["--perceptual_weight", 0, "--gan_weight", 0]
    call_train("train_dvae.py", tmp_path / "dvae", 1, *data, "--preset", config, *weights)
    printed = capsys.readouterr().out
    assert "plain: 9 images" in printed and "broken.png" in printed
    data += ["--vae", tmp_path / "dvae" / "vae"]
    call_train("train_grain.py", tmp_path / "grain", 1, *data, "--preset", "grain-tiny")
    # Alignment with a vision model needs the images; flow matching changes the scheduler of the pipeline
    arguments = ["--grain", tmp_path / "grain", "--preset", "content-tiny", "--objective", "flow_matching"]
    arguments += ["--alignment", save_vision_model(tmp_path / "vision"), "--mixed_precision", "bf16"]
    call_train("train_d2it.py", tmp_path / "d2it", 3, *data, *arguments, "--report_to", "tensorboard")
    scalars = logged(tmp_path / "d2it")["alignment"]
    assert scalars[1] == pytest.approx(1, abs=0.5) and scalars[3] != scalars[1]
    saved = [load_file(tmp_path / "d2it" / f"checkpoint-{step}" / "alignment.safetensors") for step in (2, 3)]
    assert not torch.equal(*(weights["projector.0.weight"] for weights in saved))
    pipe = D2iTPipeline.from_pretrained(tmp_path / "d2it" / "pipeline")
    assert pipe.transformer.config.num_classes is None and pipe.transformer.config.num_grains == 3
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler" and pipe.scheduler.config.use_flow_sigmas
    assert len(pipe(num_inference_steps=2).images) == 1
    picture = tmp_path / "demo.png"
    call("demo.py", "--checkpoint", tmp_path / "d2it" / "pipeline", "--output", picture, "--num_inference_steps", 2)
    assert PIL.Image.open(picture).size[0] > 0

    arguments = ["--preset", "dcdit-tiny", *arguments[4:], "--report_to", "tensorboard"]
    call_train("train_dcdit.py", tmp_path / "dcdit", 3, *data, *arguments)
    scalars = logged(tmp_path / "dcdit")["alignment"]
    assert scalars[1] == pytest.approx(1, abs=0.5) and scalars[3] != scalars[1]
    pipe = DCDiTPipeline.from_pretrained(tmp_path / "dcdit" / "pipeline")
    assert pipe.transformer.config.num_classes is None and pipe.scheduler.config.use_flow_sigmas
    assert len(pipe(num_inference_steps=2).images) == 1


def test_a_stream_of_tars_trains_and_resumes(tmp_path, capsys):
    tars = tmp_path / "tars"
    for i in range(2):
        samples = {f"{j}": {"png": encode(photo(j)), "cls": str(j % 3).encode()} for j in range(4 * i, 4 * i + 4)}
        samples["bad"] = {"png": truncated_jpeg(), "cls": b"0"}
        write_tar(tars / f"{i}.tar", samples)
    data = ["--train_data_dir", tars, "--streaming", "--num_classes", 3]
    weights = ["--perceptual_weight", 0, "--gan_weight", 0]
    call_train("train_dvae.py", tmp_path / "dvae", 2, *data, "--preset", "dvae-tiny", *weights)
    printed = capsys.readouterr().out
    assert "tars: a stream" in printed and "2 images could not" in printed
    arguments = [*data, "--vae", tmp_path / "dvae" / "vae", "--preset", "grain-tiny"]
    call_train("train_grain.py", tmp_path / "whole", STEPS, *arguments)
    assert "--streaming" in capsys.readouterr().out.rsplit("next: ", 1)[1]
    call_train("train_grain.py", tmp_path / "parts", 2, *arguments)
    call_train("train_grain.py", tmp_path / "parts", STEPS, *arguments, "--resume_from_checkpoint", "latest")
    whole, parts = (D2iTGrainModel.from_pretrained(tmp_path / run / "grain_model") for run in ("whole", "parts"))
    assert same_weights(whole, parts) and whole.config.num_classes == 3


@pytest.mark.parametrize(
    "given, cls, preset, pipeline",
    [("d2it", D2iTContentModel, "content-tiny", D2iTPipeline), ("dcdit", DCDiTModel, "dcdit-tiny", DCDiTPipeline)],
)
def test_learned_variance_velocity_and_min_snr_from_given_weights_pushed_to_a_hub(
    given, cls, preset, pipeline, request, tmp_path
):
    start = cls(**load_preset(preset) | {"num_classes": 8, "out_channels": 8})
    start.save_pretrained(tmp_path / "start")
    arguments = request.getfixturevalue(f"{given}_arguments")
    arguments = [*arguments, "--init_from", tmp_path / "start", "--learning_rate", 0]
    arguments += ["--objective", "v_prediction", "--learn_sigma", "--snr_gamma", 5]
    repositories, uploads = {}, Uploads(tmp_path / "hub")
    with serve_hub(repositories, uploads) as endpoint:
        arguments += ["--push_to_hub", "--hub_model_id", "user/tiny", "--hub_private_repo", "--license", "cc0-1.0"]
        arguments += ["--hub_remote_code"]
        flags = [*training_flags(tmp_path / "run", 1), *arguments, "--report_to", "tensorboard"]
        run_with_hub(as_code(f"train_{given}.py", *flags), endpoint, tmp_path / "hf")
    assert uploads.visibility == {"user/tiny": "private"}
    assert list(uploads.branches) == [("user/tiny", "remote-code")]
    pushed = repositories["user/tiny"]
    card = (pushed / "README.md").read_text()
    assert "license: cc0-1.0" in card and f'{pipeline.__name__}.from_pretrained("user/tiny")' in card
    assert str(tmp_path) not in card

    pipe = pipeline.from_pretrained(pushed)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert same_weights(pipe.transformer, start)  # at a rate of 0
    assert logged(tmp_path / "run")["vlb"][1] > 0
    assert pipe("cat", num_inference_steps=2).images[0].size == (32, 32)


def test_compiled_run_trains_as_an_uncompiled_one(grain, grain_arguments, fresh_compiler, tmp_path, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")  # of torch's own: tests/training/test_compiling.py
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    call_train("train_grain.py", tmp_path, 2, *grain_arguments, "--compile")
    assert counter.frame_count > 0
    files = (run / "checkpoint-2" / "model" / "diffusion_pytorch_model.safetensors" for run in (grain, tmp_path))
    # Adam's first steps have the size of the learning rate, 1e-4, whatever the gradient's last bits are
    torch.testing.assert_close(*map(load_file, files), atol=2e-5, rtol=1e-4)
