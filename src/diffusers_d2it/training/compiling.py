# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Compile a model for training, block by block."""

import torch
from diffusers import ModelMixin


def compile_blocks(model: ModelMixin, dynamic: bool | None = None) -> None:
    """`torch.compile` every repeated block of a model.

    Never the whole of it: compiled as one, encoder and decoder of the autoencoder gave the right reconstructions, and
    on a CPU under bf16 autocast wrong gradients without a word (torch 2.13).

    Args:
        model: its class names the blocks.
        dynamic: False for a model whose blocks meet the same shapes at each step; None lets torch find out.
    """
    # Blocks of a class share their code: each width and size of an autoencoder is another variant of it
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    model.compile_repeated_blocks(dynamic=dynamic)
