# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Representation alignment (REPA, Yu et al., arXiv:2410.06940) of a transformer with a vision model.

Shapes:
    B batch, h w sides of the grain map in regions, V width of a token of the vision model
    H W sides of latents in cells, T cells that DC-DiT keeps as tokens
"""

import torch
import torch.nn.functional as F
from torch import nn


class Alignment(nn.Module):
    """Tokens of the content model or of DC-DiT, projected, should point where the features of a vision model point.

    Args:
        transformer: the model; its tokens are read after block `layer`.
        layer: counted from 1, up to the blocks of the Multi-grained Net, or of DC-DiT.
        feature_width: V.

    Raises:
        ValueError: the model has no such layer.
    """

    def __init__(self, transformer: nn.Module, layer: int, feature_width: int):
        super().__init__()
        blocks = transformer.transformer_blocks
        if not 1 <= layer <= len(blocks):
            raise ValueError(f"`layer` must be 1 to {len(blocks)}, the blocks of the model, got {layer}.")
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        hidden = 4 * width
        self.projector = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, feature_width)
        )
        self._tokens = None
        blocks[layer - 1].register_forward_hook(self._keep_tokens)

    def _keep_tokens(self, block: nn.Module, inputs: tuple, tokens: torch.Tensor) -> None:
        if torch.is_grad_enabled():  # not those of samples drawn meanwhile
            self._tokens = tokens

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Mean of 1 - cosine between the tokens of the last forward pass and features, a scalar.

        Args:
            features: (B, h * w, V); for DC-DiT those of `patches_of` its tokens, (T, V).
        """
        tokens, self._tokens = self._tokens, None
        return 1 - F.cosine_similarity(self.projector(tokens).float(), features, dim=-1).mean()


def patches_of(kept: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Of each cell that is kept, (B, H, W) bool, the patch it lies in, among B * h * w: (T,) int64."""
    height, width = kept.shape[1:]
    image, row, column = kept.nonzero(as_tuple=True)
    return (image * size[0] + row * size[0] // height) * size[1] + column * size[1] // width
