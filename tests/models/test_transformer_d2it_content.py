# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""D2iTContentModel against plain references, and the properties that training and sampling rely on."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel

from diffusers_d2it import D2iTContentModel, load_preset
from diffusers_d2it.grains import check_tied, tie
from diffusers_d2it.losses import multi_grained_loss
from diffusers_d2it.models.layers import sincos_positions
from diffusers_d2it.models.transformer_d2it_content import patchify, unpatchify


def random_inputs(num_grains: int = 2, size: tuple[int, int] = (4, 6), batch: int = 3, seed: int = 0):
    """Tied latents, timesteps, map and labels; the map has every grain."""
    generator = torch.Generator().manual_seed(seed)
    grain_map = torch.randint(num_grains, (batch, *size), generator=generator)
    cells = 2 ** (num_grains - 1)
    latents = torch.randn(batch, 4, size[0] * cells, size[1] * cells, generator=generator)
    timesteps = torch.randint(1000, (batch,), generator=generator)
    labels = torch.arange(batch) * 5  # label 10, "no class", among them
    return tie(latents, grain_map), timesteps, grain_map, labels


# ---------------------------------------------------------------------------------------------------------------------
# Equality with plain references
# ---------------------------------------------------------------------------------------------------------------------


def modulate(tokens: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift


def reference_refine(net, parents: dict, latents, noise, conditioning, grain_map, level: int):
    """RefineNet of one image, token by token in raster order: attention over all pairs, masked to windows.

    `parents` maps (row, column) of a coarser token to its features. Returns the residual and the refined tokens.
    """
    m, p = 2**level, net.patch_size
    side = int(net.transformer_blocks[0].attn.relative_position_bias.shape[0] ** 0.5 + 1) // 2
    grid = grain_map.repeat_interleave(m, 0).repeat_interleave(m, 1)
    places = [(y, x) for y in range(grid.shape[0]) for x in range(grid.shape[1]) if grid[y, x] >= level]
    tokens = []
    for y, x in places:
        patch = torch.cat([latents, noise])[:, y * p : (y + 1) * p, x * p : (x + 1) * p].flatten()
        up = net.up_proj(parents[(y // 2, x // 2)]).view(4, -1)[2 * (y % 2) + x % 2]
        tokens.append(net.patch_embed(patch) + up)
    tokens = torch.stack(tokens)  # (N, D)

    window = [(y // side, x // side) for y, x in places]
    same = torch.tensor([[a == b for b in window] for a in window])
    relative = torch.tensor(
        [[(ya - yb + side - 1) * (2 * side - 1) + xa - xb + side - 1 for yb, xb in places] for ya, xa in places]
    )
    for block in net.transformer_blocks:
        attn = block.attn
        modulation = block.adaln(conditioning).chunk(6)
        x = modulate(tokens, modulation[0], modulation[1])
        q, k, v = (f(x).unflatten(-1, (attn.heads, -1)).transpose(0, 1) for f in (attn.to_q, attn.to_k, attn.to_v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # (A, N, N)
        bias = attn.relative_position_bias[relative.where(same, 0)].movedim(-1, 0)
        scores = (scores + bias).masked_fill(~same, float("-inf"))
        attended = attn.to_out[0]((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        tokens = tokens + modulation[2] * attended
        tokens = tokens + modulation[5] * block.ff(modulate(tokens, modulation[3], modulation[4]))

    correction = net.norm_out(tokens[None], conditioning[None])[0]
    residual = torch.zeros_like(noise)
    for (y, x), values in zip(places, correction):
        residual[:, y * p : (y + 1) * p, x * p : (x + 1) * p] = values.view(p, p, -1).movedim(-1, 0)
    return residual, dict(zip(places, tokens))


def reference_forward(model: D2iTContentModel, latents, timesteps, grain_map, labels) -> torch.Tensor:
    """Eqs. 6-9 for one image at a time, with loops over regions."""
    outputs = []
    for z, t, grains, label in zip(latents, timesteps, grain_map, labels):
        label_embedding = model.label_embed(label)
        conditioning = F.silu(model.time_embed(t[None], z.dtype)[0] + label_embedding)
        rows, columns = grains.shape
        cells = model.patch_size
        tokens = model.patch_embed(patchify(z[None], cells)) + model.grain_embed(grains[None])
        tokens = tokens + sincos_positions((rows, columns), tokens)
        for block in model.transformer_blocks:
            tokens = block(tokens, conditioning[None])
        noise = unpatchify(model.norm_out(tokens, conditioning[None]), rows, cells)[0]
        known = {(y, x): tokens[0, y * columns + x] for y in range(rows) for x in range(columns)}
        for level in range(model.config.num_grains):
            if level > 0:
                net = model.refine_nets[level - 1]
                conditioning = F.silu(net.time_embed(t[None], z.dtype)[0] + label_embedding)
                residual, known = reference_refine(net, known, z, noise, conditioning, grains, level)
                noise = noise + residual
            side = cells >> level
            for y in range(0, noise.shape[1], side):
                for x in range(0, noise.shape[2], side):
                    if grains[y // cells, x // cells] == level:
                        code = noise[:, y : y + side, x : x + side]
                        noise = noise.clone()
                        noise[:, y : y + side, x : x + side] = code.mean(dim=(1, 2), keepdim=True)
        outputs.append(noise)
    return torch.stack(outputs)


@pytest.mark.parametrize("num_grains, window_size", [(2, 4), (2, 2), (2, 8), (3, 4), (3, 8)])
def test_packed_windows_equal_masked_dense_attention(make_content_model, num_grains, window_size):
    # 3 x 5 regions: windows at the border are partial for every window size
    model = make_content_model(num_grains, window_size=window_size, num_refine_layers=2)
    inputs = random_inputs(num_grains, size=(3, 5), batch=2)
    with torch.no_grad():
        packed, dense = model(*inputs).sample, reference_forward(model, *inputs)
    torch.testing.assert_close(packed, dense, atol=1e-5, rtol=0)


def diffusers_dit_with_weights_of(model: D2iTContentModel) -> DiTTransformer2DModel:
    config = model.config
    dit = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.in_channels,
        out_channels=model.out_channels,
        num_layers=config.num_layers,
        sample_size=config.sample_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,  # both LayerNorms of the original DiT
    ).eval()
    state = {
        "pos_embed.proj.weight": model.patch_embed.weight.view_as(dit.pos_embed.proj.weight),
        "pos_embed.proj.bias": model.patch_embed.bias,
        "proj_out_1.weight": model.norm_out.adaln.weight,
        "proj_out_1.bias": model.norm_out.adaln.bias,
        "proj_out_2.weight": model.norm_out.proj_out.weight,
        "proj_out_2.bias": model.norm_out.proj_out.bias,
    }
    names = {
        "norm1.linear": "adaln",
        "attn1.to_q": "attn.to_q",
        "attn1.to_k": "attn.to_k",
        "attn1.to_v": "attn.to_v",
        "attn1.to_out.0": "attn.to_out.0",
        "ff.net.0.proj": "ff.linear_1",
        "ff.net.2": "ff.linear_2",
    }
    for i, block in enumerate(model.transformer_blocks):
        for theirs, ours in names.items():
            module = block.get_submodule(ours)
            state[f"transformer_blocks.{i}.{theirs}.weight"] = module.weight
            state[f"transformer_blocks.{i}.{theirs}.bias"] = module.bias
        embedder = f"transformer_blocks.{i}.norm1.emb"
        state[f"{embedder}.class_embedder.embedding_table.weight"] = model.label_embed.weight
        for name, value in model.time_embed.mlp.state_dict().items():
            state[f"{embedder}.timestep_embedder.{name}"] = value
        dit.transformer_blocks[i].norm1.emb.time_proj.downscale_freq_shift = 0
    dit.load_state_dict(state, strict=False)
    assert set(dit.state_dict()) == set(state)
    return dit


def test_all_fine_map_with_fresh_refine_net_is_a_dit(make_content_model):
    model = make_content_model(num_layers=3)
    with torch.no_grad():
        model.refine_nets[0].norm_out.proj_out.weight.zero_()  # what a fresh RefineNet and grain embedding have
        model.refine_nets[0].norm_out.proj_out.bias.zero_()
        model.grain_embed.linear_2.weight.zero_()
        model.grain_embed.linear_2.bias.zero_()
    size = model.config.sample_size
    latents, timesteps, _, labels = random_inputs(size=(size // 2, size // 2))
    all_fine = torch.ones(3, size // 2, size // 2, dtype=torch.int64)
    with torch.no_grad():
        ours = model(latents, timesteps, all_fine, labels).sample
        theirs = diffusers_dit_with_weights_of(model)(latents, timestep=timesteps, class_labels=labels).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_fresh_model_has_zero_refinement_and_grain_embedding():
    model = D2iTContentModel(**load_preset("content-tiny"))
    assert not model.refine_nets[0].norm_out.proj_out.weight.any()
    assert not model.grain_embed(torch.tensor([[[0, 1]]])).any()


# ---------------------------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_grains", [2, 3])
def test_output_is_tied_and_fine_cells_are_free(make_content_model, num_grains):
    latents, timesteps, grain_map, labels = random_inputs(num_grains)
    noise = make_content_model(num_grains)(latents, timesteps, grain_map, labels).sample
    check_tied(noise, grain_map)
    all_coarse = torch.zeros_like(grain_map)
    with pytest.raises(ValueError, match="coarse region"):  # fine regions differ inside: not tied to a coarser map
        check_tied(noise, all_coarse)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_images_do_not_see_each_other(make_content_model, num_grains):
    model = make_content_model(num_grains)
    inputs = random_inputs(num_grains)
    with torch.no_grad():
        together = model(*inputs).sample
        alone = torch.cat([model(*(x[i : i + 1] for x in inputs)).sample for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_prepared_map_gives_the_same_output(make_content_model, num_grains):
    model = make_content_model(num_grains)
    latents, timesteps, grain_map, labels = random_inputs(num_grains)
    layout = model.prepare_grain_map(grain_map)
    with torch.no_grad():
        prepared = model(latents, timesteps, layout, labels).sample
        assert torch.equal(prepared, model(latents, timesteps, grain_map, labels).sample)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_every_parameter_gets_a_gradient(make_content_model, num_grains):
    model = make_content_model(num_grains).train()
    latents, timesteps, grain_map, labels = random_inputs(num_grains)
    noise = model(latents, timesteps, grain_map, labels).sample
    multi_grained_loss(noise, tie(torch.randn_like(latents), grain_map), grain_map)["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_all_coarse_map_leaves_refine_net_a_zero_gradient(make_content_model):
    # None instead of zero would stall distributed training, which waits for every parameter
    model = make_content_model().train()
    latents, timesteps, grain_map, labels = random_inputs()
    all_coarse = torch.zeros_like(grain_map)
    model(tie(latents, all_coarse), timesteps, all_coarse, labels).sample.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gradient_checkpointing_changes_nothing(make_content_model):
    inputs = random_inputs()
    plain, checkpointed = make_content_model().train(), make_content_model().train()
    checkpointed.enable_gradient_checkpointing()
    for model in (plain, checkpointed):
        model(*inputs).sample.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_runs_in_bf16_close_to_fp32(make_content_model):
    latents, timesteps, grain_map, labels = random_inputs()
    with torch.no_grad():
        exact = make_content_model()(latents, timesteps, grain_map, labels).sample
        model = make_content_model().to(torch.bfloat16)
        rough = model(latents.bfloat16(), timesteps, grain_map, labels).sample
    assert rough.dtype == torch.bfloat16
    check_tied(rough, grain_map)
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


def test_residual_stream_under_autocast(make_content_model):
    # Thirty layers: what is rounded at each of them adds up
    model = make_content_model(num_layers=24, num_refine_layers=6)
    inputs = random_inputs(size=(8, 8))
    streams, errors = [], []
    for block in (model.transformer_blocks[-1], model.refine_nets[0].transformer_blocks[-1]):
        block.register_forward_pre_hook(lambda module, args: streams.append(args[0].dtype))
    exact = model(*inputs).sample
    assert streams == 2 * [torch.float32]
    for dtype in (torch.float32, torch.bfloat16):
        model.set_residual_dtype(dtype)
        streams.clear()
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(((model(*inputs).sample - exact).norm() / exact.norm()).item())
        assert streams == 2 * [dtype]
    assert 0 < errors[0] < 0.5 * errors[1] < 0.05
    with pytest.raises(ValueError, match="torch.float32 or torch.bfloat16, got torch.float16"):
        model.set_residual_dtype(torch.float16)


def test_timestep_may_be_a_number(make_content_model):
    model = make_content_model()
    latents, _, grain_map, labels = random_inputs()
    with torch.no_grad():
        scalar = model(latents, 500, grain_map, labels).sample
        assert torch.equal(scalar, model(latents, torch.full((3,), 500), grain_map, labels).sample)


def test_conditions_change_the_output(make_content_model):
    model = make_content_model()
    latents, timesteps, grain_map, labels = random_inputs()
    all_coarse = torch.zeros_like(grain_map)
    latents = tie(latents, all_coarse)  # allowed by both maps
    with torch.no_grad():
        output = model(latents, timesteps, all_coarse, labels).sample
        assert not torch.allclose(output, model(latents, (timesteps + 500) % 1000, all_coarse, labels).sample)
        assert not torch.allclose(output, model(latents, timesteps, all_coarse, labels.flip(0)).sample)
        assert not torch.allclose(output, model(latents, timesteps, grain_map, labels).sample)


def test_unconditional_model_takes_no_labels(make_content_model):
    model = make_content_model(num_classes=None)
    latents, timesteps, grain_map, labels = random_inputs()
    assert model(latents, timesteps, grain_map).sample.shape == latents.shape
    with pytest.raises(ValueError, match="unconditional"):
        model(latents, timesteps, grain_map, labels)


def test_learned_variance_doubles_the_channels_tied(make_content_model):
    model = make_content_model(out_channels=8)
    latents, timesteps, grain_map, labels = random_inputs()
    output = model(latents, timesteps, grain_map, labels).sample
    assert output.shape[1] == 8
    check_tied(output, grain_map)


def test_fused_projections_change_nothing(make_content_model):
    model = make_content_model()
    inputs = random_inputs()
    with torch.no_grad():
        separate = model(*inputs).sample
        model.fuse_qkv_projections()
        assert model.transformer_blocks[0].attn.fused_projections
        assert model.refine_nets[0].transformer_blocks[0].attn.fused_projections
        torch.testing.assert_close(model(*inputs).sample, separate, atol=1e-6, rtol=1e-5)


def test_lora_adapter_starts_as_identity_and_trains(make_content_model):
    from peft import LoraConfig

    model = make_content_model()
    inputs = random_inputs()
    with torch.no_grad():
        before = model(*inputs).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    after = model(*inputs).sample
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)
    after.square().mean().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained and all("lora" in name for name in trained)


def test_layerwise_casting_stores_blocks_in_fp8(make_content_model):
    model = make_content_model()
    inputs = random_inputs()
    with torch.no_grad():
        exact = model(*inputs).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        cast = model(*inputs).sample
    assert model.transformer_blocks[0].ff.linear_1.weight.dtype == torch.float8_e4m3fn
    assert model.patch_embed.weight.dtype == torch.float32
    assert (cast - exact).norm() < 0.2 * exact.norm()


def test_save_and_load_is_exact(make_content_model, tmp_path):
    model = make_content_model()
    model.save_pretrained(tmp_path)
    loaded = D2iTContentModel.from_pretrained(tmp_path)
    inputs = random_inputs()
    with torch.no_grad():
        assert torch.equal(model(*inputs).sample, loaded(*inputs).sample)


def test_loss_on_eight_photographs_falls_by_nine_tenths(make_vae, photos):
    # The eight photographs with one fixed noise and timestep each: what a sound network can learn by heart.
    torch.manual_seed(0)
    vae = make_vae(sample_size=64)
    model = D2iTContentModel(**load_preset("content-tiny") | {"num_layers": 3, "attention_head_dim": 32})
    encoded = vae.encode(photos)
    latents, grain_map = encoded.latent_dist.mode().detach(), encoded.grain_map
    noise = tie(torch.randn_like(latents), grain_map)
    timesteps = torch.arange(8) * 100 + 100
    noised = latents + noise  # the amount of noise does not matter here
    labels = torch.arange(8)
    layout = model.prepare_grain_map(grain_map)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        losses_of_step = multi_grained_loss(model(noised, timesteps, layout, labels).sample, noise, grain_map)
        optimizer.zero_grad()
        losses_of_step["loss"].backward()
        optimizer.step()
        losses.append(losses_of_step["loss"].item())
    assert losses[-1] < 0.1 * losses[0]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_untied_latents_are_refused(make_content_model):
    latents, timesteps, grain_map, labels = random_inputs()
    with pytest.raises(ValueError, match="differ inside a coarse region"):
        make_content_model()(torch.randn_like(latents), timesteps, grain_map, labels)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z, t, m, y: (z[:, :3], t, m, y), "hidden_states"),
        (lambda z, t, m, y: (z[..., :-1], t, m, y), "do not match a `grain_map`"),
        (lambda z, t, m, y: (z, t, m.repeat_interleave(2, 1).repeat_interleave(2, 2), y), "one entry per 2x2 cells"),
        (lambda z, t, m, y: (z, t, m[:1], y), "batch size"),
        (lambda z, t, m, y: (z, t, m.float(), y), "int64"),
        (lambda z, t, m, y: (z, t, m + 1, y), "0 .coarsest. to 1"),
        (lambda z, t, m, y: (z, t, m - 1, y), "0 .coarsest. to 1"),
        (lambda z, t, m, y: (z, t, m[0], y), r"\(B, h, w\)"),
        (lambda z, t, m, y: (z, t[:2], m, y), "timestep"),
        (lambda z, t, m, y: (z, t, m, None), "class_labels"),
        (lambda z, t, m, y: (z, t, m, y[:2]), "class_labels"),
        (lambda z, t, m, y: (z, t, m, y.float()), "int64"),
        (lambda z, t, m, y: (z, t, m, y + 10), "0 ... 10"),
        (lambda z, t, m, y: (z, t, m, y - 1), "0 ... 10"),
    ],
)
def test_bad_input_is_named(make_content_model, change, message):
    with pytest.raises(ValueError, match=message):
        make_content_model()(*change(*random_inputs()))


def test_bad_configuration_is_named():
    with pytest.raises(ValueError, match="num_grains"):
        D2iTContentModel(num_grains=1, num_layers=1)
    with pytest.raises(ValueError, match="out_channels"):
        D2iTContentModel(out_channels=5, num_layers=1)
