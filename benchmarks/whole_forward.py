# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The content model with RefineNet on packed fine tokens against the same model with RefineNet on the whole grid.

    python benchmarks/whole_forward.py                    # content-b, four photographs, fp32
    python benchmarks/whole_forward.py --device cuda      # content-xl, batch 32, bf16

Both sides have the same weights, all of them random, and compute the same function (`dense_refine.py`), which is
checked in fp32. The Multi-grained Net is the same code on both sides. What depends on the map alone is prepared
beforehand. Both run eagerly: packed RefineNet compiles block by block, the dense one is no part of the library.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable

import torch
from common import Claim, load_photographs, parse_args, real_grain_maps, report, time_sides
from dense_refine import DenseLayout, dense_refine
from forward_mfu import repeated_to
from peers import cast, check_equal, randomized
from torch import nn

from diffusers_d2it import D2iTContentModel, load_preset
from diffusers_d2it.grain_layout import RefineLayout
from diffusers_d2it.grains import fine_share, tie
from diffusers_d2it.models.transformer_d2it_content import RefineNet


FINE_RATIO = 0.5
LIMITS = {"cpu": 0.82, "cuda": 0.85}  # packed / dense


class DenseRefineNet(nn.Module):
    """Takes the place of a packed RefineNet in a content model of two grains, with its weights.

    Args:
        refine_net: the packed one.
        layout: of the grain map that the model is called with.
    """

    def __init__(self, refine_net: RefineNet, layout: DenseLayout):
        super().__init__()
        self.refine_net = refine_net
        self.layout = layout
        self.register_buffer("key_mask", layout.key_mask)  # cast along with the model

    def forward(
        self,
        parents: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timestep: torch.Tensor,
        label_embedding: torch.Tensor | float,
        layout: RefineLayout,
    ) -> tuple[torch.Tensor, None]:
        """Residual on the noise; of the tokens, which only a third grain would need, nothing."""
        dense_layout = dataclasses.replace(self.layout, key_mask=self.key_mask)
        residual = dense_refine(self.refine_net, parents, latents, noise, timestep, label_embedding, dense_layout)
        return residual, None


def with_dense_refine_net(model: D2iTContentModel, grain_map: torch.Tensor) -> D2iTContentModel:
    """A copy of the model that refines the whole grid of this map."""
    model = copy.deepcopy(model)
    layout = DenseLayout.from_grain_map(grain_map, model.config.window_size)
    model.refine_nets = nn.ModuleList([DenseRefineNet(refine_net, layout) for refine_net in model.refine_nets])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of photographs; default: four that come with scikit-image")
    args = parse_args(parser, "whole_forward")
    cuda = args.device == "cuda"
    preset, batch_size = ("content-xl", 32) if cuda else ("content-b", 4)

    torch.manual_seed(0)
    packed = cast(randomized(D2iTContentModel(**load_preset(preset))), args.device, torch.float32)
    photographs = load_photographs(args.images, limit=batch_size).to(args.device)
    grain_map = repeated_to(real_grain_maps(photographs, FINE_RATIO), batch_size)
    share = fine_share(grain_map, 2).mean().item()
    cells = packed.config.sample_size
    latents = tie(torch.randn(batch_size, packed.config.in_channels, cells, cells, device=args.device), grain_map)
    timestep = torch.randint(1000, (batch_size,), device=args.device)
    labels = torch.randint(packed.config.num_classes, (batch_size,), device=args.device)
    layout = packed.prepare_grain_map(grain_map)

    models = {"dense": with_dense_refine_net(packed, grain_map), "packed": packed}

    def sides_in(dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
        inputs = (latents.to(dtype), timestep, layout, labels)
        for model in models.values():
            cast(model, args.device, dtype)
        return {name: lambda m=model: m(*inputs, return_dict=False)[0] for name, model in models.items()}

    with torch.no_grad():
        error = check_equal({name: forward() for name, forward in sides_in(torch.float32).items()}, 1e-4)
        timings = time_sides(sides_in(torch.bfloat16 if cuda else torch.float32), args)

    ratio = timings["packed"].median / timings["dense"].median
    claims = [
        Claim(f"whole forward, packed / dense at fine share {share:.2f}", ratio, LIMITS[args.device], goal=4),
        Claim("difference of packed and dense in fp32, relative", error, 1e-5, goal=4),
    ]
    report(args, f"Forward of {preset}, {batch_size} images", timings, claims, {})


if __name__ == "__main__":
    main()
