# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""DC-DiT, the Dynamic Chunking Diffusion Transformer (arXiv:2603.06351): learns which cells are worth a token.

Shapes:
    B images, C latent channels, O output channels, H W sides of the latents in cells
    D width of the transformer, E = D / conv_reduction width of the convolutions around it
    T cells that are kept as tokens, of all images together
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn

from ..budgets import BudgetArgument
from .chunking import Chunks, confidence, dechunk, keep_likeliest
from .configs import ROUTER_GROUPS, ROUTER_REDUCTION, check_chunking_model
from .layers import (
    ClassLabelsMixin,
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    TimestepEmbedder,
    check_conditioning,
    init_dit_weights,
    of_any_size,
    residual_stream,
    run_block,
    sincos_positions,
)
from .packed_attention import PackedAttention
from .strict import SafeAdapterMixin, StrictModelMixin


_EPS = 1e-5  # of the norms outside of the transformer's blocks
_FEW_TOKENS = -1.1  # bias of a new router: a quarter of the cells, and at first far fewer, are natural


@dataclass
class DCDiTOutput(BaseOutput):
    """Output of `DCDiTModel`."""

    # None is what hooks of accelerate need in a moment of their own
    sample: torch.Tensor  # the noise (and the variance), (B, O, H, W)
    boundary_probability: torch.Tensor | None = None  # of the router, (B, H, W) float32
    kept: torch.Tensor | None = None  # which cells were tokens, (B, H, W) bool


class ConvolutionStack(nn.Module):
    """Residual blocks under a conditioning, and a norm: the way into the transformer, and out of it.

    Args:
        widths: channels before the first block, and after each.
        conditioning_dim: width D of the conditioning.
        groups: of the group norms.
    """

    def __init__(self, widths: list[int], conditioning_dim: int, groups: int):
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(
            [
                ResnetBlock2D(
                    in_channels=before,
                    out_channels=min(before, after),
                    conv_2d_out_channels=after,
                    temb_channels=conditioning_dim,
                    groups=groups,
                    eps=_EPS,
                )
                for before, after in zip(widths, widths[1:])
            ]
        )
        self.norm = nn.RMSNorm(widths[-1], eps=_EPS)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """hidden_states (B, widths[0], H, W), conditioning (B, D) -> (B, H, W, widths[-1])."""
        for block in self.blocks:
            hidden_states = run_block(self, block, hidden_states, conditioning)
        return self.norm(hidden_states.permute(0, 2, 3, 1).to(self.norm.weight.dtype))


class PredictabilityRouter(nn.Module):
    """Boundary probability of a cell: what its neighbours do not predict is worth a token."""

    def __init__(self, dim: int):
        super().__init__()
        width = dim // ROUTER_REDUCTION
        self.proj = nn.Conv2d(dim, width, 1)
        self.predictor = nn.Conv2d(width, width, 3, padding=1)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(ROUTER_GROUPS, width)
        self.score = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.score.bias, _FEW_TOKENS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D, H, W) -> (B, H, W) in [0, 1]."""
        cells = self.proj(features)
        surprise = cells - self.predictor(cells)
        return self.score(F.silu(self.norm(self.conv(surprise))))[:, 0].sigmoid()


class CosineRouter(nn.Module):
    """Boundary probability of a cell: how little it resembles its neighbourhood. Of the paper's first version."""

    def __init__(self, dim: int):
        super().__init__()
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.neighbours = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        nn.init.constant_(self.neighbours.weight, 1 / 9)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D, H, W) -> (B, H, W) in [0, 1]."""
        cells = features.permute(0, 2, 3, 1)
        query, key = F.normalize(self.to_q(cells), dim=-1), F.normalize(self.to_k(cells), dim=-1)
        around = F.normalize(self.neighbours(key.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), dim=-1)
        return (1 - (query * around).sum(dim=-1)) / 2


ROUTERS = {"predictability": PredictabilityRouter, "cosine": CosineRouter}


class ChunkBlock(DiTBlock):
    """A block of DiT over the tokens of several images, each under the modulation of its own."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__(dim, heads, mlp_ratio, attn=PackedAttention(dim, heads))

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """Tokens hidden_states (T, D), conditioning (B, D) after its SiLU -> (T, D)."""
        modulation = self.adaln(conditioning).index_select(0, chunks.images)  # (T, 6 * D)
        return self.modulated(hidden_states, modulation, chunks)


class DCDiTModel(ClassLabelsMixin, StrictModelMixin, AttentionMixin, CacheMixin, SafeAdapterMixin, ConfigMixin):
    r"""A diffusion transformer over the cells that its router keeps, between two stacks of convolutions over all.

        output = model(latents, timestep, class_labels, budget=0.5)    # half of what the router would keep
        output.sample, output.kept.float().mean()

    Args:
        sample_size: side of the training latents in cells.
        in_channels: C.
        out_channels: O; None for C, 2C with learned variance.
        num_layers: blocks of the transformer.
        num_conv_layers: residual blocks on each side of it.
        num_attention_heads, attention_head_dim, mlp_ratio: of every block.
        num_classes: number of class labels; label `num_classes` means no class. None for an unconditional model.
        conv_reduction: D / E.
        norm_num_groups: of the group norms; it leaves two channels a group, or the conditioning of a block is lost.
        router: "predictability", or "cosine" as in the paper's first version.
        smoothing_sigma: of the smoothing behind the transformer, in cells: 1 for 32x32 cells, 2 for 64x64.
        frequency_shift: of the timestep embedding, in [0, 1]: 0 as in the original DiT, 1 as in diffusers' DiT.
        conditioning_norm: the convolutions read the conditioning through a LayerNorm of theirs, so that it can stay
            what blocks from another model have been trained with.
        position_patch_size: side p in cells of the patches whose grid the positions are on: row i lies at
            (i - (p - 1) / 2) / p. 1 for the grid of cells, that of a DiT for blocks that come from it.

    Raises:
        ValueError: a value is out of its range (`configs.LIMITS`), or contradicts another.
    """

    budget_argument = BudgetArgument("budget", "null_budget", smallest=0.01)
    patch_size = 1  # cells along a side of what is a token, or is none
    _check_together = staticmethod(check_chunking_model)
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ChunkBlock", "ResnetBlock2D"]
    _repeated_blocks = ["ChunkBlock"]
    _keep_in_fp32_modules = ["boundary_router", "residual_proj"]  # loaded in half precision: which cells are tokens
    _skip_layerwise_casting_patterns = [
        "conv_in",
        "encoder",  # diffusers casts convolutions for the forward pass alone
        "decoder",
        "norm",
        "time_embed",
        "label_embed",
        "boundary_router",
        "residual_proj",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 12,
        num_conv_layers: int = 2,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        conv_reduction: int = 4,
        norm_num_groups: int = 32,
        router: Literal["predictability", "cosine"] = "predictability",
        smoothing_sigma: float = 1.0,
        frequency_shift: float = 0.0,
        conditioning_norm: bool = False,
        position_patch_size: int = 1,
    ):
        self.check_config(self.config)
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        width = dim // conv_reduction
        self.gradient_checkpointing = False
        self.out_channels = out_channels or in_channels

        self.time_embed = TimestepEmbedder(dim, frequency_shift)
        self.label_embed = LabelEmbedder(num_classes, dim) if num_classes is not None else None

        self.norm_conditioning = nn.LayerNorm(dim, eps=_EPS) if conditioning_norm else None

        # All cells, to features; which of them are tokens
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.encoder = ConvolutionStack([width] * num_conv_layers + [dim], dim, norm_num_groups)
        self.residual_proj = nn.Linear(dim, dim)
        self.boundary_router = ROUTERS[router](dim)  # `router` is the key of the configuration

        # The tokens
        self.transformer_blocks = nn.ModuleList(
            [ChunkBlock(dim, num_attention_heads, mlp_ratio) for _ in range(num_layers)]
        )
        self.norm_backbone = nn.RMSNorm(dim, eps=_EPS)

        # All cells again
        self.decoder = ConvolutionStack([dim] + [width] * num_conv_layers, dim, norm_num_groups)
        self.norm_out = FinalLayer(width, self.out_channels, conditioning_dim=dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DiT's initialisation: blocks and noise start at zero."""
        init_dit_weights(self)
        nn.init.zeros_(self.norm_out.proj_out.weight)

    def count_tokens(self, inputs: Mapping[str, Any], output: Any) -> dict[str, torch.Tensor]:
        """As of `budgets.AdaptiveDenoiser`: the cells that were kept."""
        kept = output["kept"] if isinstance(output, DCDiTOutput) else output[2]
        return {"backbone": kept.flatten(1).sum(dim=1)}

    def enable_cache(self, config: Any) -> None:
        """No cache of diffusers works here.

        Raises:
            ValueError: always; what a block computed of other tokens is of no use in the next step.
        """
        raise ValueError(
            f"`config` must not be a cache, got {type(config).__name__}: in every step other cells are tokens, and a"
            " smaller `budget` saves time."
        )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        budget: float | torch.Tensor = 1.0,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> DCDiTOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict noise.

        Args:
            hidden_states: noised latents (B, C, H, W), of any sides.
            timestep: (B,) or a scalar, in the scheduler's units, 0 ... 999.
            class_labels: (B,) int64, `num_classes` for no class; None for an unconditional model.
            budget: share of the cells that the router would keep, in (0, 1], for all images or (B,) for each.
            return_dict: False returns a tuple.
            attention_kwargs: {"scale": ...} weighs adapters in this pass.

        Returns:
            The noise (and the variance), (B, O, H, W); the router's probability and the kept cells, (B, H, W).

        Raises:
            ValueError: shapes, labels or budget do not fit the configuration or one another.
        """
        channels, num_classes = self.config.in_channels, self.config.num_classes
        timestep = check_conditioning(hidden_states, channels, timestep, class_labels, num_classes)  # (B,)
        label_embedding = 0.0 if self.label_embed is None else self.label_embed(class_labels)  # (B, D)
        conditioning = self.time_embed(timestep, hidden_states.dtype) + label_embedding  # (B, D)
        of_convolutions = conditioning if self.norm_conditioning is None else self.norm_conditioning(conditioning)

        # 1. Convolutions over all cells
        features = self.encoder(self.conv_in(hidden_states), of_convolutions)  # (B, H, W, D)

        # 2. Router: the cells that are worth a token, as many of them as the budget allows
        with torch.autocast(hidden_states.device.type, enabled=False):
            residual = self.residual_proj(features.to(self.residual_proj.weight.dtype))  # (B, H, W, D)
            residual = residual.to(features.device, torch.float32)  # several devices may share the layers
            probability = self._boundary_probability(features).to(features.device)  # (B, H, W)
        chunks = Chunks.of(keep_likeliest(probability.detach(), budget))

        # 3. Transformer over these
        tokens = residual_stream(features.flatten(0, 2)[chunks.cells])  # (T, D)
        patch_size = self.config.position_patch_size
        positions = sincos_positions(probability.shape[1:], tokens[None], patch_size)  # (H * W, D)
        tokens = of_any_size(tokens + positions[chunks.cells % len(positions)], 0)
        modulating = F.silu(conditioning)
        for block in self.transformer_blocks:
            tokens = run_block(self, block, tokens, modulating, chunks)  # (T, D)
        tokens = self.norm_backbone(tokens)

        # 4. Back to all cells, and 5. convolutions over them
        with torch.autocast(hidden_states.device.type, enabled=False):
            tokens = tokens.to(probability.device, torch.float32)
            cells = dechunk(tokens, probability, chunks, self.config.smoothing_sigma)  # (B, H, W, D)
            cells = cells * confidence(probability)[..., None] + residual
        cells = self.decoder(cells.to(features.dtype).permute(0, 3, 1, 2), of_convolutions)  # (B, H, W, E)
        noise = self.norm_out(cells.flatten(1, 2), modulating)  # (B, H * W, O)
        noise = noise.transpose(1, 2).unflatten(2, probability.shape[1:])  # (B, O, H, W)

        if not return_dict:
            return noise, probability, chunks.kept
        return DCDiTOutput(sample=noise, boundary_probability=probability, kept=chunks.kept)

    def _boundary_probability(self, features: torch.Tensor) -> torch.Tensor:
        """Of every cell, (B, H, W) float32; the first and the last are always natural, so that no image is empty."""
        dtype = next(self.boundary_router.parameters()).dtype
        probability = self.boundary_router(features.to(dtype).permute(0, 3, 1, 2)).float()
        ends = torch.zeros_like(probability, dtype=torch.bool)
        ends[:, 0, 0] = ends[:, -1, -1] = True
        return torch.where(ends, 1.0, probability)
