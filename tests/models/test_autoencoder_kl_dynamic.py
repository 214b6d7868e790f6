# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The Dynamic VAE: which head encodes which region, the tied posterior, and everything diffusers does with a VAE."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffusers_d2it import DynamicAutoencoderKL, load_preset, region_entropy
from diffusers_d2it.grains import check_tied, fine_share, grain_map_from_entropy, tie


KINDS = pytest.mark.parametrize("num_grains", [2, 3])


def mixed_map(photos: torch.Tensor, vae: DynamicAutoencoderKL, seed: int = 0) -> torch.Tensor:
    """A random map with every grain in every image, whatever the photographs."""
    batch, _, height, width = photos.shape
    shape = (batch, height // vae.region_size, width // vae.region_size)
    grain_map = torch.randint(vae.num_grains, shape, generator=torch.Generator().manual_seed(seed))
    grain_map[:, 0, : vae.num_grains] = torch.arange(vae.num_grains)
    return grain_map


def codes(latents: torch.Tensor, grain_map: torch.Tensor, cells: int) -> list[tuple[int, torch.Tensor]]:
    """(image, cells of one code (C, side, side)) of every code, by plain loops."""
    found = []
    for b, row, column in torch.cartesian_prod(*(torch.arange(size) for size in grain_map.shape)).tolist():
        side = cells >> grain_map[b, row, column].item()
        for y in range(row * cells, (row + 1) * cells, side):
            for x in range(column * cells, (column + 1) * cells, side):
                found.append((b, latents[b, :, y : y + side, x : x + side]))
    return found


def copied(code: torch.Tensor, cells: int) -> torch.Tensor:
    return code.repeat_interleave(cells, -2).repeat_interleave(cells, -1)


# ---- Dynamic Grained Coding ----


@KINDS
def test_the_map_is_that_of_the_entropy_and_the_thresholds(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    output = vae.encode(photos)
    assert output.grain_map.dtype == torch.int64
    assert output.grain_map.shape == output.entropy.shape == (8, 64 // vae.region_size, 64 // vae.region_size)
    assert torch.equal(output.entropy, region_entropy(photos, vae.region_size))
    assert torch.equal(output.grain_map, grain_map_from_entropy(output.entropy, vae.thresholds()))
    assert output.latent_dist.mean.shape == (8, 4, 16, 16)


@KINDS
def test_shares_of_the_grains_are_the_configured_ratios(make_vae, photos, num_grains):
    """On the photographs that were calibrated on; ties and the rounding of quantiles leave a per cent."""
    vae = make_vae(num_grains)
    grain_map = vae.encode(photos).grain_map
    shares = [(grain_map == grain).float().mean().item() for grain in range(num_grains)]
    assert shares == pytest.approx(vae.config.grain_ratios, abs=0.02)


@KINDS
@pytest.mark.parametrize("fine_ratio", [0.2, 0.5, 0.8])
def test_fine_ratio_is_the_share_of_the_finest_grain(make_vae, photos, num_grains, fine_ratio):
    vae = make_vae(num_grains)
    grain_map = vae.encode(photos, fine_ratio=fine_ratio).grain_map
    assert fine_share(grain_map, num_grains).mean().item() == pytest.approx(fine_ratio, abs=0.02)


def test_coarser_grains_keep_their_proportion_when_a_fine_ratio_is_asked_for(make_vae, photos):
    vae = make_vae(3, grain_ratios=[0.2, 0.4, 0.4])
    grain_map = vae.encode(photos, fine_ratio=0.1).grain_map
    shares = [(grain_map == grain).float().mean().item() for grain in range(3)]
    assert shares == pytest.approx([0.3, 0.6, 0.1], abs=0.02)


def test_ratios_are_equal_shares_when_none_are_configured(make_vae, photos):
    grain_map = make_vae(3, grain_ratios=None).encode(photos).grain_map
    assert [(grain_map == grain).float().mean().item() for grain in range(3)] == pytest.approx([1 / 3] * 3, abs=0.02)


def test_entropy_is_measured_as_the_calibration_was(make_vae, photos, calibrate):
    """Bins and kernel are part of the calibration: thresholds of one kernel mean nothing for another."""
    calibration = calibrate(8) | {"num_bins": 128, "sigma": 0.05}
    calibration["quantiles"] = [value / 2 for value in calibration["quantiles"]]  # below ln 128
    entropy = make_vae(calibration=calibration).encode(photos, fine_ratio=0.5).entropy
    assert torch.equal(entropy, region_entropy(photos, 8, num_bins=128, sigma=0.05))


@KINDS
def test_a_given_map_is_used_as_it_is(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    output = vae.encode(photos, grain_map=grain_map)
    assert torch.equal(output.grain_map, grain_map)
    assert torch.equal(output.latent_dist.grain_map, grain_map)
    assert torch.equal(output.entropy, vae.encode(photos).entropy)


def test_giving_back_the_map_of_an_image_changes_nothing(make_vae, photos):
    vae = make_vae()
    first = vae.encode(photos)
    again = vae.encode(photos, grain_map=first.grain_map)
    assert torch.equal(again.latent_dist.parameters, first.latent_dist.parameters)


def test_fine_ratio_0_and_1_are_exact_on_any_image(make_vae, photos):
    for num_grains in (2, 3):
        vae = make_vae(num_grains)
        for images in (photos, torch.zeros_like(photos)):
            assert (vae.encode(images, fine_ratio=1).grain_map == num_grains - 1).all()
            assert (vae.encode(images, fine_ratio=0).grain_map < num_grains - 1).all()
    assert (make_vae(2).encode(photos, fine_ratio=0).grain_map == 0).all()


def test_all_fine_and_all_coarse_need_no_calibration(make_vae, photos):
    vae = make_vae(2, calibration=None)
    assert (vae.encode(photos, fine_ratio=1.0).grain_map == 1).all()
    assert (vae.encode(photos, fine_ratio=0.0).grain_map == 0).all()
    assert (make_vae(3, calibration=None).encode(photos, fine_ratio=1.0).grain_map == 2).all()


# ---- Hierarchical encoder ----


@KINDS
@torch.no_grad()
def test_every_region_holds_the_codes_of_the_head_of_its_grain(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    heads = vae.encoder(photos)
    assert [head.shape[-1] for head in heads] == [64 // factor for factor in reversed(vae.config.downsample_factors)]
    parameters = vae.encode(photos, grain_map=grain_map).latent_dist.parameters
    cells = 2 ** (num_grains - 1)
    for b, row, column in torch.cartesian_prod(*(torch.arange(size) for size in grain_map.shape)).tolist():
        grain = grain_map[b, row, column].item()
        codes_a_side = 2**grain
        own = heads[grain][b, :, row * codes_a_side :, column * codes_a_side :][:, :codes_a_side, :codes_a_side]
        region = parameters[b, :, row * cells :, column * cells :][:, :cells, :cells]
        assert torch.equal(region, copied(own, cells >> grain))


@KINDS
@torch.no_grad()
def test_a_map_of_one_grain_gives_the_copied_output_of_one_head(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    heads = vae.encoder(photos)
    side = 64 // vae.region_size
    for grain, head in enumerate(heads):
        posterior = vae.encode(photos, grain_map=torch.full((8, side, side), grain)).latent_dist
        assert torch.equal(posterior.mode(), copied(head.chunk(2, dim=1)[0], 2 ** (num_grains - 1 - grain)))
    finest = vae.encode(photos, fine_ratio=1.0).latent_dist
    assert torch.equal(finest.mode(), heads[-1].chunk(2, dim=1)[0])


@KINDS
@torch.no_grad()
def test_a_change_in_one_region_of_the_map_changes_only_its_latents(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    changed_map = grain_map.clone()
    changed_map[3, 1, 2] = (grain_map[3, 1, 2] + 1) % num_grains
    before, after = (vae.encode(photos, grain_map=m).latent_dist.mode() for m in (grain_map, changed_map))
    cells = 2 ** (num_grains - 1)
    differs = (before != after).any(dim=1)
    expected = torch.zeros_like(differs)
    expected[3, cells : 2 * cells, 2 * cells : 3 * cells] = True
    assert differs.any() and not (differs & ~expected).any()


# ---- Tied posterior ----


@KINDS
@torch.no_grad()
def test_mean_variance_and_sample_are_equal_inside_every_code(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    posterior = vae.encode(photos, grain_map=grain_map).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert sample.shape == posterior.mean.shape and not torch.equal(sample, posterior.mean)
    for tensor in (posterior.mean, posterior.std, posterior.logvar, posterior.mode(), sample):
        for _, code in codes(tensor, grain_map, cells=2 ** (num_grains - 1)):
            assert torch.equal(code, code[:, :1, :1].expand_as(code))


@KINDS
@torch.no_grad()
def test_samples_are_the_mean_plus_the_deviation_times_tied_unit_noise(make_vae, photos, num_grains):
    """Every code takes one draw with variance 1, also the coarse ones: an average would have a quarter."""
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    posterior = vae.encode(photos, grain_map=grain_map).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7))
    sample = posterior.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(sample, posterior.mean + posterior.std * tie(noise, grain_map))

    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([(posterior.sample(generator) - posterior.mean) / posterior.std for _ in range(50)])
    grain_of_cell = copied(grain_map, 2 ** (num_grains - 1))[:, None].expand_as(posterior.mean)
    for grain in range(num_grains):
        assert draws[:, grain_of_cell == grain].std().item() == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_a_list_of_generators_makes_every_image_its_own(make_vae, photos):
    posterior = make_vae().encode(photos[:2], fine_ratio=0.5).latent_dist
    one = make_vae().encode(photos[1:2], fine_ratio=0.5).latent_dist
    together = posterior.sample([torch.Generator().manual_seed(seed) for seed in (5, 6)])
    alone = one.sample([torch.Generator().manual_seed(6)])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@KINDS
@torch.no_grad()
def test_kl_is_the_closed_form_with_every_code_counted_once(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    grain_map = mixed_map(photos, vae)
    posterior = vae.encode(photos, grain_map=grain_map).latent_dist
    expected = torch.zeros(8, dtype=torch.float64)
    cells = 2 ** (num_grains - 1)
    for (b, mean), (_, logvar) in zip(
        codes(posterior.mean, grain_map, cells), codes(posterior.logvar, grain_map, cells)
    ):
        m, v = mean[:, 0, 0].double(), logvar[:, 0, 0].double()
        expected[b] += 0.5 * (m**2 + v.exp() - 1 - v).sum()
    torch.testing.assert_close(posterior.kl().double(), expected, rtol=1e-5, atol=0)


@KINDS
@torch.no_grad()
def test_kl_of_a_map_of_one_grain_is_the_kl_of_its_head(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    side = 64 // vae.region_size
    for grain, head in enumerate(vae.encoder(photos)):
        posterior = vae.encode(photos, grain_map=torch.full((8, side, side), grain)).latent_dist
        torch.testing.assert_close(posterior.kl(), DiagonalGaussianDistribution(head).kl())


# ---- Decoding, forward, scale ----


@KINDS
@torch.no_grad()
def test_forward_decodes_the_mode_or_a_sample(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    posterior = vae.encode(photos).latent_dist
    of_mode = vae(photos).sample
    of_sample = vae(photos, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample
    assert of_mode.shape == photos.shape
    torch.testing.assert_close(of_mode, vae.decode(posterior.mode()).sample)
    z = posterior.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(of_sample, vae.decode(z).sample)
    assert not torch.equal(of_sample, of_mode)


@torch.no_grad()
def test_tuples_hold_what_the_outputs_hold(make_vae, photos):
    vae = make_vae()
    output = vae.encode(photos)
    posterior, grain_map, entropy = vae.encode(photos, return_dict=False)
    assert torch.equal(posterior.parameters, output.latent_dist.parameters)
    assert torch.equal(grain_map, output.grain_map) and torch.equal(entropy, output.entropy)
    z = posterior.mode()
    assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z).sample)
    assert torch.equal(vae(photos, return_dict=False)[0], vae(photos).sample)


@KINDS
@torch.no_grad()
def test_images_need_not_be_square(make_vae, load_photos, num_grains):
    """A wide image is encoded as the transposed model would encode the tall one: shapes follow rows and columns."""
    vae = make_vae(num_grains)
    wide = load_photos(128)[:2, :, :48]
    output = vae.encode(wide)
    assert output.grain_map.shape == (2, 48 // vae.region_size, 128 // vae.region_size)
    assert torch.equal(output.entropy, region_entropy(wide, vae.region_size))
    z = output.latent_dist.mode()
    assert z.shape == (2, 4, 12, 32)
    check_tied(z, output.grain_map)
    assert vae.decode(z).sample.shape == wide.shape


@pytest.mark.parametrize("shift", [None, 0.7])
def test_unscaling_inverts_scaling_to_unit_latents(make_vae, photos, shift):
    vae = make_vae(scaling_factor=0.25, shift_factor=shift)
    z = 4 * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + (shift or 0)
    scaled = vae.scale_latents(z)
    assert scaled.std().item() == pytest.approx(1, abs=0.02) and scaled.mean().item() == pytest.approx(0, abs=0.02)
    torch.testing.assert_close(vae.unscale_latents(scaled), z)


@KINDS
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_mates(make_vae, photos, num_grains):
    vae = make_vae(num_grains)
    together = vae.encode(photos)
    others = vae.encode(torch.cat([-photos[:2], photos[2:3], photos.flip(-1)[3:]]))
    alone = vae.encode(photos[2:3])
    for output, index in ((others, slice(2, 3)), (alone, slice(None))):
        assert torch.equal(output.grain_map[index], together.grain_map[2:3])
        torch.testing.assert_close(
            output.latent_dist.parameters[index], together.latent_dist.parameters[2:3], rtol=1e-4, atol=1e-5
        )
    z = together.latent_dist.mode()
    torch.testing.assert_close(vae.decode(z).sample[2:3], vae.decode(z[2:3]).sample, rtol=1e-4, atol=1e-5)


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
        ({"downsample_factors": [8]}, r"two or more powers of two, got \[8\]"),
        ({"downsample_factors": [3, 6]}, r"powers of two, got \[3, 6\]"),
        ({"downsample_factors": [8, 4]}, r"twice the one before, got \[8, 4\]"),
        ({"downsample_factors": [4, 16]}, r"twice the one before, got \[4, 16\]"),
        ({"downsample_factors": [8, 16]}, "`block_out_channels` has 4 levels.*16 needs 5"),
        ({"block_out_channels": [8, 8, 16]}, "`block_out_channels` has 3 levels.*8 needs 4"),
        ({"decoder_block_out_channels": [8, 8]}, "`decoder_block_out_channels` has 2 levels.*4 needs 3"),
        ({"grain_ratios": [1.0]}, r"2 shares that sum to 1, coarsest first, got \[1.0\]"),
        ({"grain_ratios": [0.2, 0.2]}, r"got \[0.2, 0.2\]"),
        ({"grain_ratios": [1.5, -0.5]}, r"got \[1.5, -0.5\]"),
        ({"calibration": {"region_size": 16, "quantiles": [2.0, 5.0]}}, "regions of 16 pixels.*regions of 8"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DynamicAutoencoderKL(**(load_preset("dvae-tiny") | changes))


@KINDS
def test_without_calibration_there_are_no_thresholds_between_0_and_1(make_vae, photos, num_grains):
    vae = make_vae(num_grains, calibration=None)
    for kwargs in ({}, {"fine_ratio": 0.5}):
        with pytest.raises(ValueError, match="no entropy thresholds"):
            vae.encode(photos, **kwargs)
    with pytest.raises(ValueError, match="no entropy thresholds"):
        vae(photos)
    grain_map = mixed_map(photos, vae)
    assert torch.equal(vae.encode(photos, grain_map=grain_map).grain_map, grain_map)


@pytest.mark.parametrize("fine_ratio", [-0.1, 1.1, math.nan, 50])
def test_a_ratio_outside_0_to_1_is_refused(make_vae, photos, fine_ratio):
    with pytest.raises(ValueError, match=r"`fine_ratio` must be a number in \[0, 1\]"):
        make_vae().encode(photos, fine_ratio=fine_ratio)


@pytest.mark.parametrize(
    ("grain_map", "message"),
    [
        (torch.zeros(8, 8, 8), "int64, got torch.float32"),
        (torch.zeros(8, 8, 8, dtype=torch.int32), "int64, got torch.int32"),
        (torch.full((8, 8, 8), 2), "0 .*to 1 .*got values from 2 to 2"),
        (torch.full((8, 8, 8), -1), "got values from -1"),
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
    with pytest.raises(ValueError, match="`grain_map` and `fine_ratio` exclude each other"):
        make_vae().encode(photos, grain_map=torch.zeros(8, 8, 8, dtype=torch.int64), fine_ratio=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, r"lie in \[-1, 1\]"),
        (lambda x: x.masked_fill(x > 0.9, math.nan), r"lie in \[-1, 1\].*nan"),
        (lambda x: x[..., :60], "multiples of the region size 8, got 64x60"),
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
    with pytest.raises(ValueError, match=r"`z` must have shape \(B, 4, h, w\)"):
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
