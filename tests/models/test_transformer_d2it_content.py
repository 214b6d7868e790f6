# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""D2iTContentModel against a plain reference, and the properties that training and sampling rely on.

That an all-fine map with a fresh RefineNet is a DiT: tests/conversion.
"""

import pytest
import torch
import torch.nn.functional as F
from grain_maps import check_tied, codes, random_latents, random_map

from diffusers_d2it import D2iTContentModel
from diffusers_d2it.grains import tie
from diffusers_d2it.models.layers import sincos_positions
from diffusers_d2it.models.refine_net import patchify, unpatchify


def random_inputs(num_grains: int = 2, size: tuple[int, int] = (4, 6), batch: int = 3, seed: int = 0):
    """Tied latents, timesteps, map and labels; the map has every grain."""
    generator = torch.Generator().manual_seed(seed)
    grain_map = random_map(num_grains, (batch, *size), seed)
    latents = random_latents(grain_map, num_grains, 4, seed)
    timesteps = torch.randint(1000, (batch,), generator=generator)
    labels = torch.arange(batch) * 5  # label 10, "no class", among them
    return tie(latents, grain_map), timesteps, grain_map, labels


# ---- Equality with plain references ----


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


# ---- Properties ----


@pytest.mark.parametrize("num_grains", [2, 3])
@torch.no_grad()
def test_output_is_tied_as_finely_as_the_map_whether_prepared_or_not(make_content_model, num_grains):
    model = make_content_model(num_grains, out_channels=8)  # learned variance
    latents, timesteps, grain_map, labels = random_inputs(num_grains)
    noise = model(latents, timesteps, grain_map, labels).sample
    assert noise.shape == (3, 8, *latents.shape[2:])
    check_tied(noise, grain_map)
    for image, grain, row, column, block in codes(noise, grain_map, num_grains):
        neighbour = noise[image, :, row * block.shape[1], (column ^ 1) * block.shape[2]]
        assert grain == 0 or not torch.equal(block[:, 0, 0], neighbour)  # codes of one region differ
    prepared = model(latents, timesteps, model.prepare_grain_map(grain_map), labels).sample
    assert torch.equal(prepared, noise)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_all_coarse_map_leaves_refine_net_a_zero_gradient(make_content_model, num_grains):
    # None instead of zero would stall distributed training, which waits for every parameter
    model = make_content_model(num_grains).train()
    latents, timesteps, grain_map, labels = random_inputs(num_grains)
    all_coarse = torch.zeros_like(grain_map)
    latents = tie(latents, all_coarse)
    output = model(latents, timesteps, all_coarse, labels).sample
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in model.refine_nets.parameters())
    with torch.no_grad():  # where RefineNet is left out
        assert torch.equal(model(latents, timesteps, all_coarse, labels).sample, output)


def test_what_is_kept_from_inference_serves_a_later_training_step(make_content_model):
    model = make_content_model(4, window_size=16, num_layers=1)
    inputs = random_inputs(4, size=(5, 7))  # of no other test
    with torch.inference_mode():
        expected = model(*inputs).sample
    output = model(*inputs).sample
    output.sum().backward()
    assert torch.equal(output, expected)


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
    with pytest.raises(ValueError, match="`dtype`.*float16"):
        model.set_residual_dtype(torch.float16)


# ---- Bad input ----


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z, t, m, y: (torch.rand_like(z), t, m, y), "latents.*tie"),
        (lambda z, t, m, y: (z[:, :3], t, m, y), "`hidden_states`"),
        (lambda z, t, m, y: (z[0], t, m, y), "`hidden_states`"),
        (lambda z, t, m, y: (z[..., :-1], t, m, y), "latents.*`grain_map`"),
        (lambda z, t, m, y: (z, t, m.repeat_interleave(2, 1).repeat_interleave(2, 2), y), "latents.*`grain_map`"),
        (lambda z, t, m, y: (z, t, m[:1], y), "latents.*`grain_map`"),
        (lambda z, t, m, y: (z, t, m.float(), y), "`grain_map`.*int64"),
        (lambda z, t, m, y: (z, t, m + 1, y), "`grain_map`.*1 to 2"),
    ],
)
def test_bad_input_is_named(make_content_model, change, message):
    with pytest.raises(ValueError, match=message):
        make_content_model()(*change(*random_inputs()))


@pytest.mark.parametrize("other", [{"num_grains": 3}, {"window_size": 2}])
def test_a_map_prepared_by_another_model_is_refused(make_content_model, other):
    latents, timesteps, grain_map, labels = random_inputs()
    layout = make_content_model(**other).prepare_grain_map(grain_map)
    with pytest.raises(ValueError, match="`grain_map`.*prepare_grain_map"):
        make_content_model()(latents, timesteps, layout, labels)


@pytest.mark.parametrize("config", [{"num_grains": 1}, {"out_channels": 5}])
def test_bad_configuration_is_named(config):
    with pytest.raises(ValueError, match=f"`{next(iter(config))}`"):
        D2iTContentModel(**config, num_layers=1)
