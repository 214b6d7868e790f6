# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The hierarchical encoder of the Dynamic VAE (sec. 3.1 of arXiv:2504.09454): every grain from one trunk.

Shapes:
    B batch, C latent channels, H W image sides in pixels
    f_0 > ... > f_{k-1} downsample factors, coarsest first
"""

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D
from torch import nn

from .layers import run_block


class HierarchicalEncoder(nn.Module):
    """E_h of sec. 3.1: one convolutional trunk with one output head per downsample factor.

    Returns a list of moments (B, 2C, H/f_i, W/f_i), coarsest first.
    """

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        downsample_factors: tuple[int, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        mid_block_add_attention: bool,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)

        # Level i of the trunk works at 1 / 2^i of the image. A level that feeds a head hands out its features before
        # it is downsampled, so its downsampler stands apart.
        self.down_blocks = nn.ModuleList()
        self.downsamplers = nn.ModuleDict()
        self.mid_blocks = nn.ModuleDict()
        self.conv_norm_outs = nn.ModuleDict()
        self.conv_outs = nn.ModuleDict()
        last_level = len(block_out_channels) - 1
        channels = block_out_channels[0]
        for level, out_channels in enumerate(block_out_channels):
            has_head = 2**level in downsample_factors
            self.down_blocks.append(
                DownEncoderBlock2D(
                    in_channels=channels,
                    out_channels=out_channels,
                    num_layers=layers_per_block,
                    resnet_groups=norm_num_groups,
                    add_downsample=not has_head,
                    downsample_padding=0,
                )
            )
            channels = out_channels
            if not has_head:
                continue
            head = f"f{2**level}"
            if level != last_level:
                self.downsamplers[head] = Downsample2D(channels, use_conv=True, padding=0, name="op")
            self.mid_blocks[head] = UNetMidBlock2D(
                in_channels=channels,
                resnet_eps=1e-6,
                attention_head_dim=channels,
                resnet_groups=norm_num_groups,
                temb_channels=None,
                add_attention=mid_block_add_attention,
            )
            self.conv_norm_outs[head] = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
            self.conv_outs[head] = nn.Conv2d(channels, 2 * latent_channels, 3, padding=1)
        self.conv_act = nn.SiLU()

    def forward(self, sample: torch.Tensor) -> list[torch.Tensor]:
        moments = []
        hidden_states = self.conv_in(sample)
        for level, down_block in enumerate(self.down_blocks):
            hidden_states = run_block(self, down_block, hidden_states)
            head = f"f{2**level}"
            if head in self.mid_blocks:
                features = run_block(self, self.mid_blocks[head], hidden_states)
                moments.append(self.conv_outs[head](self.conv_act(self.conv_norm_outs[head](features))))
            if head in self.downsamplers:
                hidden_states = self.downsamplers[head](hidden_states)
        return moments[::-1]
