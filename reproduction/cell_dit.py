# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""DiT/1, a token for every cell: DC-DiT's blocks without convolutions, router and chunks."""

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_d2it import DCDiTModel
from diffusers_d2it.models.chunking import Chunks
from diffusers_d2it.models.layers import FinalLayer, init_dit_weights, sincos_positions
from diffusers_d2it.models.transformer_dcdit import DCDiTOutput


class CellDiT(DCDiTModel):
    """A DiT of patch size 1 in the place of a DC-DiT: it keeps every cell, whatever the budget."""

    def initialize_weights(self) -> None:
        """Other layers than DC-DiT's around the same blocks; of the constructor, whose signature files are read by."""
        config = self.config
        dim = config.num_attention_heads * config.attention_head_dim
        for name in ("encoder", "residual_proj", "boundary_router", "norm_backbone", "decoder"):
            delattr(self, name)
        self.conv_in = nn.Conv2d(config.in_channels, dim, 1)
        self.norm_out = FinalLayer(dim, self.out_channels)
        init_dit_weights(self)
        nn.init.zeros_(self.norm_out.proj_out.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        budget: float | torch.Tensor = 1.0,
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
    ) -> DCDiTOutput:
        """As of `DCDiTModel`: the probability of every cell is 1."""
        batch, _, height, width = hidden_states.shape
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)
        conditioning = self.time_embed(timestep, hidden_states.dtype) + self.label_embed(class_labels)  # (B, D)
        chunks = Chunks.of(hidden_states.new_ones(batch, height, width, dtype=torch.bool))
        cells = self.conv_in(hidden_states).flatten(2).transpose(1, 2)  # (B, H * W, D)
        tokens = (cells + sincos_positions((height, width), cells)).flatten(0, 1)
        for block in self.transformer_blocks:
            tokens = block(tokens, F.silu(conditioning), chunks)
        noise = self.norm_out(tokens.unflatten(0, (batch, -1)), F.silu(conditioning)).transpose(1, 2)  # (B, O, H * W)
        noise, kept = noise.unflatten(2, (height, width)), chunks.kept
        return DCDiTOutput(sample=noise, boundary_probability=kept.float(), kept=kept)
