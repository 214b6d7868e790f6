# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A converted AutoencoderKL against what it was made of, on small random ones."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from alike import same_weights
from diffusers import AutoencoderKL
from public_weights import assert_accounts_for_everything, change_folder, edit_config, edit_weights, without
from script_runs import call

from diffusers_d2it import DynamicAutoencoderKL, load_preset
from diffusers_d2it.conversion import convert_autoencoder_kl


def make_autoencoder_kl(levels: int = 4, **options) -> AutoencoderKL:
    """A random AutoencoderKL of factor 2 ** (levels - 1); every weight and bias is drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(8, 16, 16, 24)[:levels],
            layers_per_block=2,
            norm_num_groups=8,
            sample_size=32,
            **options,
        ).eval()
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return vae


@pytest.fixture
def vae_folder(tmp_path) -> Path:
    make_autoencoder_kl().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"levels": 2},
        {"use_quant_conv": False},
        {"use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {"latent_channels": 16, "shift_factor": 0.1, "scaling_factor": 0.3},
    ],
)
def test_fine_path_is_the_source_up_to_the_border(tmp_path, photos, options):
    source = make_autoencoder_kl(**options)
    source.save_pretrained(tmp_path / "pipeline" / "vae")
    model, report = convert_autoencoder_kl(tmp_path / "pipeline")
    model.save_pretrained(tmp_path / "model")
    model = DynamicAutoencoderKL.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = source.encode(photos).latent_dist
        posterior = model.encode(photos, fine_ratio=1.0).latent_dist
        images, decoded = (vae.decode(expected.mode()).sample for vae in (source, model))
    assert expected.mean.std() > 0.1 and images.std() > 0.1
    torch.testing.assert_close(posterior.parameters, expected.parameters, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, images, atol=1e-4, rtol=0)
    assert_accounts_for_everything(report, source.state_dict(), model)
    assert not report.unused
    assert model.config.scaling_factor == source.config.scaling_factor
    assert model.config.shift_factor == source.config.shift_factor
    latents = posterior.mode()
    shifted = (latents - (source.config.shift_factor or 0)) * source.config.scaling_factor
    torch.testing.assert_close(model.scale_latents(latents), shifted)


def test_coarse_codes_start_as_the_fine_head_on_averaged_features(vae_folder, photos):
    source = make_autoencoder_kl()
    model, report = convert_autoencoder_kl(vae_folder)
    encoder = source.encoder
    with torch.no_grad():
        features = encoder.conv_in(photos)
        for block in encoder.down_blocks:
            features = block(features)
        averaged = F.avg_pool2d(features, 2)
        codes = encoder.conv_out(F.silu(encoder.conv_norm_out(encoder.mid_block(averaged))))
        expected = source.quant_conv(codes)
        posterior = model.encode(photos, fine_ratio=0.0).latent_dist
    assert expected.std() > 0.1
    torch.testing.assert_close(posterior.parameters[..., ::2, ::2], expected, atol=1e-4, rtol=0)
    assert all(key.startswith(("encoder.downsamplers.f8.", "encoder.down_blocks.4.")) for key in report.fresh)
    assert report.mapped["encoder.conv_norm_out.bias"] == [
        "encoder.conv_norm_outs.f8.bias",
        "encoder.conv_norm_outs.f16.bias",
    ]


def test_post_quant_conv_serves_tiles_too(vae_folder):
    model, _ = convert_autoencoder_kl(vae_folder)
    latents = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    model.enable_tiling()
    assert latents.shape[-1] * 8 > model.tile_sample_min_size
    with torch.no_grad():
        tiled = model.decode(latents).sample
        mixed, model.post_quant_conv = model.post_quant_conv(latents), None
        torch.testing.assert_close(tiled, model.decode(mixed).sample)
    assert not any("post_quant" in key for key in DynamicAutoencoderKL(**load_preset("dvae-tiny")).state_dict())


def test_attention_under_its_old_names_is_understood(vae_folder, photos):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: dict) -> dict:
        for new, old in names.items():
            weights = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for key, v in weights.items()}
        return weights

    edit_weights(vae_folder, rename)
    edit_config(vae_folder, scaling_factor="removed", use_quant_conv="removed")  # as in files of that time
    model, report = convert_autoencoder_kl(vae_folder)
    assert report.mapped["decoder.mid_block.attentions.0.proj_attn.bias"] == [
        "decoder.mid_block.attentions.0.to_out.0.bias"
    ]
    assert model.config.scaling_factor == 0.18215
    source = make_autoencoder_kl()
    with torch.no_grad():
        expected = source.encode(photos).latent_dist.parameters
        found = model.encode(photos, fine_ratio=1.0).latent_dist.parameters
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_calibration_is_the_presets_for_regions_of_16_pixels(vae_folder, tmp_path, calibrate, photos):
    model, _ = convert_autoencoder_kl(vae_folder)
    assert model.region_size == 16
    assert model.config.calibration == load_preset("dvae-f8f16")["calibration"]
    assert 0 < model.encode(photos).grain_map.float().mean() < 1
    given, _ = convert_autoencoder_kl(vae_folder, calibration=calibrate(16))
    assert given.config.calibration == calibrate(16)
    with pytest.raises(ValueError, match="8.*16"):
        convert_autoencoder_kl(vae_folder, calibration=calibrate(8))

    make_autoencoder_kl(levels=2).save_pretrained(tmp_path / "f2")
    other, report = convert_autoencoder_kl(tmp_path / "f2")
    assert other.config.downsample_factors == [2, 4] and other.config.calibration is None
    assert any("calibration" in note for note in report.notes)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderKL.*AutoencoderTiny"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "`down_block_types`.*AttnDown"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "`up_block_types`.*AttnUp"),
        ({"act_fn": "mish"}, "`act_fn`.*'mish'"),
        ({"latents_mean": [0.0] * 4}, "`latents_mean`"),
        ({"latents_std": [1.0] * 4}, "`latents_std`"),
        ({"in_channels": 4}, "`in_channels`"),
        ({"sample_size": [32, 48]}, "`sample_size`"),
        ({"block_out_channels": None}, "`block_out_channels`"),
        ({"block_out_channels": [], "down_block_types": [], "up_block_types": []}, "`block_out_channels`"),
        ({"temporal_compression_ratio": 4}, "temporal_compression_ratio.*4"),
        ({"use_quant_conv": False}, "`quant_conv.weight`"),
        ({"use_post_quant_conv": False}, "`post_quant_conv.weight`"),
        ({"layers_per_block": 3}, "`encoder.down_blocks.0.resnets.2"),
        ({"mid_block_add_attention": False}, "mid_block.attentions.0"),
        ({"latent_channels": 8}, r"`(en|de)coder.conv_\w+.weight`"),
        (lambda w: w | {"encoder.extra.weight": torch.zeros(1)}, "`encoder.extra.weight`"),
        (lambda w: without(w, "encoder.conv_norm_out.bias"), "`encoder.conv_norm_out.bias`"),
        (lambda w: without(w, "quant_conv.bias"), "`quant_conv.bias`"),
        (lambda w: without(w, "post_quant_conv.bias"), "`post_quant_conv.bias`"),
        (lambda w: w | {"quant_conv.weight": torch.zeros(6, 6, 1, 1)}, r"`quant_conv.weight`.*\(8, 8, 1, 1\)"),
        (lambda w: w | {"decoder.conv_out.bias": torch.zeros(4)}, r"`decoder.conv_out.bias`.*\(4,\).*\(3,\)"),
    ],
)
def test_an_autoencoder_that_cannot_be_represented_is_refused_by_name(tmp_path, change, message):
    make_autoencoder_kl(levels=2).save_pretrained(tmp_path)
    change_folder(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        convert_autoencoder_kl(tmp_path)


def test_autoencoder_script_converts_a_folder(vae_folder, tmp_path, calibrate, capsys):
    calibration, output = tmp_path / "calibration.json", tmp_path / "model"
    calibration.write_text(json.dumps(calibrate(16)))
    call("convert_autoencoder_kl.py", "--source", vae_folder, "--output", output, "--calibration", calibration)
    torch.manual_seed(0)
    expected, report = convert_autoencoder_kl(vae_folder, calibration=calibrate(16))
    model = DynamicAutoencoderKL.from_pretrained(output)
    assert same_weights(model, expected) and model.config.calibration == calibrate(16)
    assert str(report) in capsys.readouterr().out
    assert json.loads((output / "conversion.json").read_text()) == json.loads(report.to_json())
    assert "conversion.json" in json.loads((output / "manifest.json").read_text())["files"]  # saved as one
