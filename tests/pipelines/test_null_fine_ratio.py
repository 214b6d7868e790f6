# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The lighter unconditional pass: which regions it corrects, and where the others have their correction from."""

import pytest
import torch

from diffusers_d2it.grains import average_codes, grain_map_to_cells, tie
from diffusers_d2it.models.transformer_d2it_content import unpatchify


def guided_inputs(grain_map: torch.Tensor, cells: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Latents of B conditional and B unconditional passes, a timestep, labels."""
    generator = torch.Generator().manual_seed(0)
    batch, height, width = grain_map.shape
    latents = tie(torch.randn(batch, 4, height * cells, width * cells, generator=generator), grain_map)
    return torch.cat([latents, latents]), 500, torch.cat([torch.arange(batch), torch.full((batch,), 10)])


def random_map(num_grains: int = 2, shape: tuple[int, int, int] = (2, 8, 7)) -> torch.Tensor:
    return torch.randint(num_grains, shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def predict(model, grain_map: torch.Tensor, ratio: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    layout = model.prepare_guided_grain_map(grain_map, ratio)
    latents, timestep, labels = guided_inputs(grain_map, model.patch_size)
    return model(latents, timestep, layout, labels).sample.chunk(2)


@torch.no_grad()
def rough(model, grain_map: torch.Tensor) -> torch.Tensor:
    """The prediction of the Multi-grained Net alone, (2B, C, H, W)."""
    latents, timestep, labels = guided_inputs(grain_map, model.patch_size)
    both, seen = torch.cat([grain_map, grain_map]), {}
    hook = model.norm_out.register_forward_hook(lambda module, args, output: seen.update(noise=output))
    model(latents, timestep, both, labels)
    hook.remove()
    return average_codes(unpatchify(seen["noise"], grain_map.shape[1], model.patch_size), both, grain=0)


@pytest.mark.parametrize("num_grains", [2, 3])
def test_none_and_one_correct_everything(make_content_model, num_grains):
    model, grain_map = make_content_model(num_grains), random_map(num_grains)
    latents, timestep, labels = guided_inputs(grain_map, model.patch_size)
    with torch.no_grad():
        expected = model(latents, timestep, torch.cat([grain_map, grain_map]), labels).sample.chunk(2)
    for ratio in (None, 1.0):
        for ours, plain in zip(predict(model, grain_map, ratio), expected):
            torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_without_regions_of_its_own_the_pass_takes_the_correction_of_the_other(make_content_model):
    model, grain_map = make_content_model(), random_map()
    conditional, null = predict(model, grain_map, 0.0)
    rough_conditional, rough_null = rough(model, grain_map).chunk(2)
    torch.testing.assert_close(null - rough_null, conditional - rough_conditional, atol=1e-6, rtol=1e-5)
    assert (conditional - rough_conditional).abs().max() > 0.01
    full, full_null = predict(model, grain_map, None)
    torch.testing.assert_close(conditional, full, atol=1e-6, rtol=1e-5)  # the conditional pass is left as it is
    coarse = grain_map_to_cells(grain_map, 2)[:, None].expand_as(null) == 0
    torch.testing.assert_close(null[coarse], full_null[coarse], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(null, full_null, atol=1e-3)


@pytest.mark.parametrize("num_grains", [2, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.4])
def test_the_share_that_is_corrected_is_the_one_asked_for(make_content_model, num_grains, ratio):
    model, grain_map = make_content_model(num_grains), random_map(num_grains, shape=(3, 16, 15))
    layout = model.prepare_guided_grain_map(grain_map, ratio)
    regions_per_window = (model.config.window_size // 2) ** 2
    for image in range(3):
        corrected = (layout.levels[0].images == 3 + image).sum().item()  # a parent of level 1 is a region
        asked = min(round(ratio * 16 * 15), (grain_map[image] > 0).sum().item())
        assert asked <= corrected < asked + regions_per_window
    # A region is either corrected or borrows, and corrected ones are as in the full pass
    _, null = predict(model, grain_map, ratio)
    _, full = predict(model, grain_map, None)
    own = ~layout.borrowed[3:].expand_as(null)
    torch.testing.assert_close(null[own], full[own], atol=1e-6, rtol=1e-5)


def test_corrected_windows_are_spread_over_the_image(make_content_model):
    model = make_content_model()
    layout = model.prepare_guided_grain_map(torch.ones(1, 16, 16, dtype=torch.int64), 0.25)
    own = ~layout.borrowed[1, 0]  # (32, 32) cells
    assert all(quarter.float().mean() > 0.1 for half in own.chunk(2) for quarter in half.chunk(2, dim=1))


def test_pipeline_hands_the_ratio_on(make_pipeline):
    pipe = make_pipeline()
    grain_map = random_map(shape=(1, 4, 4))[0]
    runs = {
        (ratio, scale): pipe(
            3,
            num_inference_steps=2,
            guidance_scale=scale,
            grain_map=grain_map,
            null_fine_ratio=ratio,
            generator=torch.manual_seed(0),
            output_type="latent",
        ).images
        for ratio in (None, 0.0, 1.0)
        for scale in (1.0, 4.0)
    }
    torch.testing.assert_close(runs[1.0, 4.0], runs[None, 4.0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(runs[0.0, 4.0], runs[None, 4.0], atol=1e-3)
    assert torch.equal(runs[0.0, 1.0], runs[None, 1.0])  # one pass only


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan"), "all"])
def test_a_wrong_ratio_is_named(make_content_model, ratio):
    with pytest.raises(ValueError, match="`null_fine_ratio`"):
        make_content_model().prepare_guided_grain_map(random_map(), ratio)
