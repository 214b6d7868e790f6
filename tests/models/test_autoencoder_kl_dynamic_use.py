# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The Dynamic VAE in use: training, precision, saving and loading, and what it refuses."""

import math

import pytest
import torch
from grain_maps import mixed_map

from diffusers_d2it import DynamicAutoencoderKL, load_preset
from diffusers_d2it.grains import check_tied


KINDS = pytest.mark.parametrize("num_grains", [2, 3])


# ---- Training ----


@KINDS
def test_every_parameter_gets_a_gradient_from_a_mixed_map(make_vae, photos, num_grains):
    vae = make_vae(num_grains).train()
    posterior = vae.encode(photos[:2], grain_map=mixed_map(photos[:2], vae)).latent_dist
    reconstruction = vae.decode(posterior.sample(torch.Generator().manual_seed(0))).sample
    (torch.nn.functional.mse_loss(reconstruction, photos[:2]) + 1e-3 * posterior.kl().mean()).backward()
    without = [
        name
        for name, parameter in vae.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.abs().max() < 1e-12
        # a bias of all keys shifts all scores of a query alike, so its gradient is zero in every attention
        if not name.endswith("to_k.bias")
    ]
    assert without == []


def test_a_head_gets_no_gradient_when_no_region_has_its_grain(make_vae, photos):
    vae = make_vae(2).train()
    posterior = vae.encode(photos[:2], fine_ratio=1.0).latent_dist
    (vae.decode(posterior.mode()).sample.abs().mean() + posterior.kl().mean()).backward()
    coarse, fine = vae.encoder.conv_outs["f8"].weight.grad, vae.encoder.conv_outs["f4"].weight.grad
    assert coarse is None or not coarse.any()
    assert fine.any()


@KINDS
def test_gradient_checkpointing_changes_neither_output_nor_gradients(make_vae, photos, num_grains):
    x = photos[:2]
    results = []
    for checkpointing in (False, True):
        vae = make_vae(num_grains).train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
            assert vae.is_gradient_checkpointing
        posterior = vae.encode(x, grain_map=mixed_map(x, vae)).latent_dist
        output = vae.decode(posterior.mode()).sample
        (output.pow(2).mean() + 1e-3 * posterior.kl().mean()).backward()
        results.append((output.detach(), {name: p.grad for name, p in vae.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])


def test_checkpointed_blocks_are_run_again_in_the_backward_pass(make_vae, photos):
    vae = make_vae().train()
    vae.enable_gradient_checkpointing()
    calls = {"encoder": 0, "head": 0, "decoder": 0}

    def count(name: str):
        def hook(*_) -> None:
            calls[name] += 1

        return hook

    vae.encoder.down_blocks[0].register_forward_pre_hook(count("encoder"))
    vae.encoder.mid_blocks["f8"].register_forward_pre_hook(count("head"))
    vae.decoder.up_blocks[0].register_forward_pre_hook(count("decoder"))
    output = vae(photos[:1]).sample
    assert set(calls.values()) == {1}
    output.sum().backward()
    assert set(calls.values()) == {2}


def test_a_few_steps_of_training_bring_the_reconstruction_closer(make_vae, photos):
    vae = make_vae().train()
    x = photos[:2, :, :32, :32]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    errors = []
    for _ in range(40):
        loss = (vae(x).sample - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.6 * errors[0]


# ---- Precision and placement ----


@KINDS
@torch.no_grad()
def test_bfloat16_is_close_to_float32_and_just_as_tied(make_vae, photos, num_grains):
    x = photos.bfloat16()
    vae = make_vae(num_grains)
    reference = vae.encode(x.float())
    expected = vae.decode(reference.latent_dist.mode()).sample
    vae = vae.to(torch.bfloat16)
    output = vae.encode(x)
    assert output.entropy.dtype == torch.float32
    assert torch.equal(output.grain_map, reference.grain_map)
    posterior = output.latent_dist
    assert posterior.mean.dtype == torch.bfloat16
    check_tied(posterior.sample(torch.Generator().manual_seed(0)), output.grain_map)
    scale = reference.latent_dist.mean.std().item()
    assert (posterior.mean.float() - reference.latent_dist.mean).abs().mean() < 0.05 * scale
    torch.testing.assert_close(posterior.kl().float(), reference.latent_dist.kl(), rtol=0.05, atol=0)
    decoded = vae.decode(posterior.mode()).sample
    assert decoded.dtype == torch.bfloat16
    assert (decoded.float() - expected).abs().mean() < 0.05 * expected.std()


@torch.no_grad()
def test_autocast_leaves_the_map_alone(make_vae, photos):
    """Training in mixed precision encodes under autocast; the entropy is float32 there too."""
    vae = make_vae()
    expected = vae.encode(photos)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vae.encode(photos)
    assert output.entropy.dtype == torch.float32
    torch.testing.assert_close(output.entropy, expected.entropy, rtol=0, atol=2e-5)
    assert (output.grain_map == expected.grain_map).float().mean() > 0.99


@torch.no_grad()
def test_layerwise_casting_stores_weights_in_eight_bits_and_computes_with_them(make_vae, photos):
    """The result is that of a model whose weights were rounded; norms and the outermost layers keep theirs."""
    vae, rounded = make_vae(), make_vae()
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in vae.named_parameters()}
    assert set(stored.values()) == {torch.float8_e4m3fn, torch.float32}
    kept = [name for name, dtype in stored.items() if dtype == torch.float32]
    assert set(kept) >= {name for name in stored if "norm" in name} | {"encoder.conv_in.weight"}
    for name, parameter in rounded.named_parameters():
        parameter.copy_(parameter.to(stored[name]).float())
    torch.testing.assert_close(vae(photos).sample, rounded(photos).sample)


def test_declared_block_names_are_blocks_of_the_model(make_vae):
    vae = make_vae()
    classes = {type(module).__name__ for module in vae.modules()}
    assert set(vae._no_split_modules) | set(vae._repeated_blocks) <= classes
    assert all(hasattr(vae, name) for name in vae._group_offload_block_modules)


# ---- Saving and loading ----


@KINDS
@torch.no_grad()
def test_a_saved_model_is_the_same_model(make_vae, photos, tmp_path, num_grains):
    vae = make_vae(num_grains, scaling_factor=0.8, shift_factor=-0.1)
    vae.save_pretrained(tmp_path)
    loaded = DynamicAutoencoderKL.from_pretrained(tmp_path)
    assert loaded.config.calibration == vae.config.calibration
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (0.8, -0.1)
    assert loaded.thresholds(0.3) == vae.thresholds(0.3)
    state = vae.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    before, after = vae.encode(photos), loaded.encode(photos)
    assert torch.equal(after.grain_map, before.grain_map)
    assert torch.equal(after.latent_dist.parameters, before.latent_dist.parameters)
    z = before.latent_dist.mode()
    assert torch.equal(loaded.decode(z).sample, vae.decode(z).sample)


@pytest.mark.parametrize("variant", [{"variant": "fp32"}, {"max_shard_size": "100KB"}])
def test_variants_and_shards_load_too(make_vae, tmp_path, variant):
    vae = make_vae()
    vae.save_pretrained(tmp_path, **variant)
    variant.pop("max_shard_size", None)
    state = DynamicAutoencoderKL.from_pretrained(tmp_path, **variant).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in vae.state_dict().items())


def test_loading_in_another_dtype_casts_the_weights(make_vae, tmp_path):
    vae = make_vae()
    vae.save_pretrained(tmp_path)
    loaded = DynamicAutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    key = "encoder.conv_in.weight"
    assert torch.equal(loaded.state_dict()[key], vae.state_dict()[key].bfloat16())


def test_a_checkpoint_of_another_width_is_refused(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        DynamicAutoencoderKL.from_pretrained(tmp_path, latent_channels=8)


def test_loading_information_is_still_to_be_had(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path)
    model, info = DynamicAutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, DynamicAutoencoderKL)
    assert not info["missing_keys"] and not info["unexpected_keys"]


# ---- Bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample_factors": [8]}, r"`downsample_factors`.*8"),
        ({"downsample_factors": [3, 6]}, r"`downsample_factors`.*\[3, 6\]"),
        ({"downsample_factors": [8, 4]}, r"`downsample_factors`.*\[8, 4\]"),
        ({"downsample_factors": [4, 16]}, r"`downsample_factors`.*\[4, 16\]"),
        ({"downsample_factors": [8, 16]}, "`block_out_channels`"),
        ({"block_out_channels": [8, 8, 16]}, "`block_out_channels`"),
        ({"decoder_block_out_channels": [8, 8]}, "`decoder_block_out_channels`"),
        ({"grain_ratios": [1.0]}, r"`grain_ratios`.*1.0"),
        ({"grain_ratios": [0.2, 0.2]}, r"`grain_ratios`.*0.2, 0.2"),
        ({"grain_ratios": [1.5, -0.5]}, r"`grain_ratios`.*1.5"),
        ({"calibration": {"region_size": 16, "quantiles": [2.0, 5.0]}}, "16 .*8"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DynamicAutoencoderKL(**(load_preset("dvae-tiny") | changes))


@KINDS
def test_without_calibration_there_are_no_thresholds_between_0_and_1(make_vae, photos, num_grains):
    vae = make_vae(num_grains, calibration=None)
    for kwargs in ({}, {"fine_ratio": 0.5}):
        with pytest.raises(ValueError, match="thresholds"):
            vae.encode(photos, **kwargs)
    with pytest.raises(ValueError, match="thresholds"):
        vae(photos)
    grain_map = mixed_map(photos, vae)
    assert torch.equal(vae.encode(photos, grain_map=grain_map).grain_map, grain_map)


@pytest.mark.parametrize("fine_ratio", [-0.1, 1.1, math.nan, 50])
def test_a_ratio_outside_0_to_1_is_refused(make_vae, photos, fine_ratio):
    with pytest.raises(ValueError, match="`fine_ratio`"):
        make_vae().encode(photos, fine_ratio=fine_ratio)


@pytest.mark.parametrize(
    ("grain_map", "message"),
    [
        (torch.zeros(8, 8, 8), "int64, got torch.float32"),
        (torch.zeros(8, 8, 8, dtype=torch.int32), "int64, got torch.int32"),
        (torch.full((8, 8, 8), 2), "0 .*1 .*2"),
        (torch.full((8, 8, 8), -1), "-1"),
        (torch.zeros(8, 8, 4, dtype=torch.int64), r"shape \(8, 8, 8\).*got \(8, 8, 4\)"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), r"shape \(8, 8, 8\).*got \(1, 8, 8\)"),
        (torch.zeros(8, 8, dtype=torch.int64), r"got \(8, 8\)"),
        ("fine", "torch.Tensor, got str"),
    ],
)
def test_maps_that_do_not_fit_the_images_are_refused(make_vae, photos, grain_map, message):
    with pytest.raises(ValueError, match=message):
        make_vae().encode(photos, grain_map=grain_map)


def test_a_map_and_a_ratio_exclude_each_other(make_vae, photos):
    with pytest.raises(ValueError, match="`grain_map`.*`fine_ratio`"):
        make_vae().encode(photos, grain_map=torch.zeros(8, 8, 8, dtype=torch.int64), fine_ratio=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, r"\[-1, 1\]"),
        (lambda x: x.masked_fill(x > 0.9, math.nan), r"\[-1, 1\].*nan"),
        (lambda x: x[..., :60], "8.*64x60"),
        (lambda x: x[:, :1], r"\(B, 3, H, W\)"),
        (lambda x: x[0], r"\(B, 3, H, W\)"),
        (lambda x: ((x + 1) * 127).byte(), "floating point"),
    ],
)
def test_images_out_of_range_or_shape_are_refused_with_and_without_a_map(make_vae, photos, change, message):
    for kwargs in ({}, {"grain_map": torch.zeros(8, 8, 8, dtype=torch.int64)}, {"fine_ratio": 1.0}):
        with pytest.raises(ValueError, match=message):
            make_vae().encode(change(photos), **kwargs)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 8, 8, 8)])
def test_latents_with_other_channels_are_not_decoded(make_vae, shape):
    with pytest.raises(ValueError, match=r"`z`.*\(B, 4, h, w\)"):
        make_vae().decode(torch.zeros(shape))


@pytest.mark.parametrize("num_grains", [2, 3])
def test_frozen_fine_path_trains_the_coarser_grains_alone(make_vae, photos, num_grains):
    vae = make_vae(num_grains).train()
    vae.freeze_fine_path()
    size = 64 // vae.region_size
    optimizer = torch.optim.SGD([p for p in vae.parameters() if p.requires_grad], lr=1.0)
    outputs = []
    for _ in range(2):
        with torch.no_grad():
            moments = vae.encode_grains(photos)
            outputs.append((*moments, vae.decode(moments[-1][:, :4]).sample))
        for grain in range(num_grains):
            grain_map = torch.full((8, size, size), grain)
            loss = vae.encode(photos, grain_map=grain_map).latent_dist.mean.square().mean()
            if loss.requires_grad:
                loss.backward()
        optimizer.step()
    before, after = outputs
    unchanged = [torch.equal(a, b) for a, b in zip(before, after)]
    assert unchanged == [False] * (num_grains - 1) + [True, True]
    assert all(p.grad is not None for p in vae.parameters() if p.requires_grad)
