# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""RefineNet on packed fine tokens against RefineNet on the whole grid, on grain maps of photographs.

    python benchmarks/refine_net.py --fine_ratio 0.5 0.3 0.7

Both sides have the same weights, all of them random, and compute the same function (`dense_refine.py`). What depends
on the map alone is prepared beforehand on both sides, as sampling prepares it once for all its steps; that time is
reported by itself. The backward pass, to weights and inputs, is timed at the first fine ratio.
"""

import torch
from common import Bench, Flag, main
from dense_refine import DenseLayout, dense_refine
from peers import Forward
from photo_maps import load_photographs, real_grain_maps
from torch import nn

from diffusers_d2it import load_preset
from diffusers_d2it.grains import fine_share, grain_map_to_cells, tie
from diffusers_d2it.models.refine_net import pack_levels
from diffusers_d2it.models.transformer_d2it_content import RefineNet


NUM_GRAINS = 2
WINDOW_SIZE = 4
CHANNELS = 4


def build_refine_net(preset: dict) -> RefineNet:
    """RefineNet of a content preset with weights none of which is zero, so that every path is compared."""
    heads = preset["num_attention_heads"]
    sizes = {"dim": heads * preset["attention_head_dim"], "num_layers": preset["num_refine_layers"], "heads": heads}
    sizes |= {"patch_size": 1, "mlp_ratio": 4.0, "side": WINDOW_SIZE, "frequency_shift": 0.0}
    refine_net = RefineNet(CHANNELS, CHANNELS, **sizes)
    for name, parameter in refine_net.named_parameters():
        nn.init.normal_(parameter, std=1.0 if name.endswith("relative_position_bias") else 0.03)
    return refine_net


def random_inputs(refine_net: RefineNet, grain_map: torch.Tensor) -> list[torch.Tensor]:
    """What RefineNet is called with but the layout: tokens of the Multi-grained Net, latents, rough noise, ..."""
    (batch, rows, columns), dim, device = grain_map.shape, refine_net.up_proj.in_features, grain_map.device
    latents = torch.randn(batch, CHANNELS, 2 * rows, 2 * columns, device=device)
    return [
        torch.randn(batch * rows * columns, dim, device=device),
        tie(latents, grain_map),
        torch.randn_like(latents),
        torch.randint(0, 1000, (batch,), device=device),
        torch.randn(batch, dim, device=device),
    ]


def compare(bench: Bench, refine_net: RefineNet, grain_map: torch.Tensor, backward: bool) -> None:
    """Packed against dense on some maps (N, h, w)."""
    share = fine_share(grain_map, NUM_GRAINS).mean().item()
    preparations = {
        f"packed, layout, r = {share:.2f}": lambda: pack_levels(grain_map, NUM_GRAINS, WINDOW_SIZE, False),
        f"dense, layout, r = {share:.2f}": lambda: DenseLayout.from_grain_map(grain_map, WINDOW_SIZE),
    }
    (packed_layout,), dense_layout = (prepare() for prepare in preparations.values())
    bench.time(preparations)
    inputs = random_inputs(refine_net, grain_map)
    sides = {
        f"packed, r = {share:.2f}": lambda: refine_net(*inputs, packed_layout)[0],
        f"dense, r = {share:.2f}": lambda: dense_refine(refine_net, *inputs, dense_layout),
    }
    with torch.no_grad():
        output, expected = (forward() for forward in sides.values())
        fine = grain_map_to_cells(grain_map, 2)[:, None].bool().expand_as(expected)
        error = ((output - expected)[fine].abs().max() / expected[fine].abs().max()).item()
        packed, dense = bench.time(sides).values()
    goal = None if bench.cuda else 4
    bench.claim(f"packed / dense at fine share {share:.2f}", packed / dense, share + 0.05, goal=goal)
    bench.claim(f"difference on fine cells at {share:.2f}, relative", error, 1e-5, goal=goal)

    if backward:
        inputs[0].requires_grad_()
        inputs[2].requires_grad_()
        weights = torch.randn_like(expected)

        def step(forward: Forward) -> None:
            refine_net.zero_grad(set_to_none=True)
            (forward() * weights).sum().backward()

        steps = {f"{name}, backward included": lambda f=forward: step(f) for name, forward in sides.items()}
        packed, dense = bench.time(steps).values()
        bench.note(f"packed / dense at {share:.2f}, backward included", packed / dense)


def measure(bench: Bench, fine_ratio: list[float], preset: str, batch_size: int) -> str:
    torch.manual_seed(0)
    refine_net = build_refine_net(load_preset(preset)).to(bench.device)
    photographs = load_photographs(batch_size).to(bench.device)
    for index, ratio in enumerate(fine_ratio):
        compare(bench, refine_net, real_grain_maps(photographs, ratio), backward=index == 0)
    return f"RefineNet of {preset}, {len(photographs)} images, 32x32 latents"


if __name__ == "__main__":
    main(
        measure,
        fine_ratio=Flag([0.5, 0.3, 0.7], "shares of fine regions, above 0 and up to 1", lambda ratio: 0 < ratio <= 1),
        preset=Flag("content-b", "preset of the content model"),
        batch_size=Flag(4, "photographs"),
    )
