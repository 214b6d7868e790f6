# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Dynamic Content Transformer (sec. 3.2.3 of arXiv:2504.09454): predicts noise that has the grain of its region.

Shapes:
    B batch, C latent channels, O output channels (C, or 2C with learned variance), D width
    h w sides of the grain map in regions, k grains, R = 2 ** (k-1) cells along a side of a region
    latents are (B, C, h * R, w * R)
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from ..budgets import BudgetArgument
from ..grains import GrainLayout
from ..limits import can_be_read
from .configs import check_content_model
from .layers import (
    FREQUENCY_SIZE,
    ClassLabelsMixin,
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    TimestepEmbedder,
    check_conditioning,
    init_dit_weights,
    residual_stream,
    run_block,
    sincos_positions,
)
from .refine_net import RefineNet, pack_levels, patchify, unpatchify
from .strict import SafeAdapterMixin, StrictModelMixin


# Of the caches of diffusers those that know where blocks of this kind keep what they compute
CacheConfig = FirstBlockCacheConfig | MagCacheConfig | TaylorSeerCacheConfig | PyramidAttentionBroadcastConfig
_CACHES = get_args(CacheConfig)


class GrainEmbedder(nn.Module):
    """Embedding of a region's grain, added to its token. It starts at zero: the network starts as a plain DiT."""

    def __init__(self, num_grains: int, dim: int):
        super().__init__()
        self.embed = nn.Embedding(num_grains, FREQUENCY_SIZE)
        self.linear_1 = nn.Linear(FREQUENCY_SIZE, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, grain_map: torch.Tensor) -> torch.Tensor:
        """(B, h, w) int64 -> (B, h * w, D)."""
        grains = torch.arange(self.embed.num_embeddings, device=grain_map.device)
        per_grain = self.linear_2(F.silu(self.linear_1(self.embed(grains))))  # (k, D)
        return F.embedding(grain_map.flatten(1), per_grain)


class D2iTContentModel(ClassLabelsMixin, StrictModelMixin, AttentionMixin, CacheMixin, SafeAdapterMixin, ConfigMixin):
    r"""Multi-grained Net, Router and RefineNet: rough noise for every region, corrected where the map is fine.

        layout = model.prepare_grain_map(grain_map)         # once per map
        noise = model(latents, timestep, layout, class_labels).sample

    The latents are tied: every cell of a coarse code has one value (`diffusers_d2it.tie`). So is the output.
    With an all-fine map and a fresh RefineNet the model is a DiT of patch size R.

    Args:
        sample_size: side of the training latents in cells.
        in_channels: C.
        out_channels: O; None for C. 2C predicts the variance too, for schedulers with variance_type "learned_range".
        num_grains: k. The patch size of the Multi-grained Net is R = 2 ** (k - 1): a token per region.
        num_layers: blocks of the Multi-grained Net, N_L.
        num_refine_layers: blocks of each RefineNet, N_R; one RefineNet for every grain but the coarsest. They replace
            layers of the backbone, 5 : 1 (Table 4).
        num_attention_heads, attention_head_dim, mlp_ratio: of every block.
        num_classes: number of class labels; label `num_classes` means no class. None for an unconditional model.
        window_size: side of RefineNet's attention windows in tokens: a multiple of R up to 16.
        frequency_shift: of every timestep embedding, in [0, 1]: 0 as in the original DiT, 1 as in diffusers' DiT
            (its `downscale_freq_shift`), for weights that were trained or are to be used as there.

    Raises:
        ValueError: a value is out of its range (`configs.LIMITS`), or contradicts another.
    """

    budget_argument = BudgetArgument("fine_ratio")
    _check_together = staticmethod(check_content_model)
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock", "RefineBlock"]
    _repeated_blocks = ["DiTBlock", "RefineBlock"]
    _skip_layerwise_casting_patterns = [
        "patch_embed",
        "norm",
        "time_embed",
        "label_embed",
        "grain_embed",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_grains: int = 2,
        num_layers: int = 23,
        num_refine_layers: int = 5,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        window_size: int = 4,
        frequency_shift: float = 0.0,
    ):
        self.check_config(self.config)
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False
        self.residual_dtype = torch.float32  # under autocast
        self.out_channels = out_channels or in_channels
        self.patch_size = 2 ** (num_grains - 1)

        # Multi-grained Net
        self.patch_embed = nn.Linear(in_channels * self.patch_size**2, dim)
        self.grain_embed = GrainEmbedder(num_grains, dim)
        self.time_embed = TimestepEmbedder(dim, frequency_shift)
        self.label_embed = LabelEmbedder(num_classes, dim) if num_classes is not None else None
        self.transformer_blocks = nn.ModuleList(
            [DiTBlock(dim, num_attention_heads, mlp_ratio) for _ in range(num_layers)]
        )
        self.norm_out = FinalLayer(dim, self.out_channels * self.patch_size**2)

        # Fine-grained Net: one RefineNet for each finer grain
        self.refine_nets = nn.ModuleList(
            [
                RefineNet(
                    in_channels,
                    self.out_channels,
                    patch_size=self.patch_size >> level,
                    dim=dim,
                    num_layers=num_refine_layers,
                    heads=num_attention_heads,
                    mlp_ratio=mlp_ratio,
                    side=window_size,
                    frequency_shift=frequency_shift,
                )
                for level in range(1, num_grains)
            ]
        )
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DiT's initialisation; the grain embedding, the noise and RefineNet's residual start at zero."""
        init_dit_weights(self)
        nn.init.zeros_(self.grain_embed.linear_2.weight)
        for norm_out in (self.norm_out, *(refine_net.norm_out for refine_net in self.refine_nets)):
            nn.init.zeros_(norm_out.proj_out.weight)
        for refine_net in self.refine_nets:
            for block in refine_net.transformer_blocks:
                nn.init.trunc_normal_(block.attn.relative_position_bias, std=0.02)

    def set_residual_dtype(self, dtype: torch.dtype) -> None:
        """Choose the dtype of the residual stream under autocast, where weights are float32.

        float32 is the default. bfloat16 halves what every pass over the tokens reads and writes, and what training
        keeps of them, and rounds the sum over the layers at every layer. Without autocast all is in the dtype of the
        weights.

        Raises:
            ValueError: another dtype.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"`dtype` must be torch.float32 or torch.bfloat16, got {dtype!r}.")
        for net in (self, *self.refine_nets):
            net.residual_dtype = dtype

    def prepare_grain_map(self, grain_map: torch.Tensor) -> GrainLayout:
        """Work out what depends on the map alone, so that `forward` need not repeat it at every step.

        For a compiled model its sizes are rounded, so that one graph serves every map.
        Where a graph is recorded, they are those of a map that is fine throughout, and it costs as much.

        Args:
            grain_map: (B, h, w) int64, 0 = coarsest.

        Raises:
            ValueError: wrong type, dtype, shape or values.
        """
        num_grains, window_size = self.config.num_grains, self.config.window_size
        layout = GrainLayout.from_grain_map(grain_map, num_grains)
        is_compiled = any(net._compiled_call_impl is not None for net in (self, self.transformer_blocks[0]))
        levels = pack_levels(grain_map, num_grains, window_size, rounded=is_compiled)
        return replace(layout, levels=levels, window_size=window_size)

    def count_tokens(self, inputs: Mapping[str, Any], output: Any = None) -> dict[str, torch.Tensor]:
        """As of `budgets.AdaptiveDenoiser`: a coarse region is one token of the backbone, a fine one several more."""
        layout = inputs["grain_map"]
        if not isinstance(layout, GrainLayout):
            layout = GrainLayout.from_grain_map(layout, self.config.num_grains)
        return layout.num_tokens

    def enable_cache(self, config: CacheConfig) -> None:
        """As of diffusers: keep what blocks compute over several steps, as `config` says.

        Raises:
            ValueError: a cache that cannot work here: another one than FirstBlockCache, MagCache, TaylorSeerCache and
                PyramidAttentionBroadcast, or TaylorSeer's lite mode.
        """
        if not isinstance(config, _CACHES):
            names = ", ".join(cache.__name__ for cache in _CACHES)
            raise ValueError(f"`config` must be one of {names}, got {type(config).__name__}.")
        if getattr(config, "use_lite_mode", False):
            raise ValueError(
                "`use_lite_mode` of TaylorSeer leaves out all blocks and keeps the output of a layer that this model"
                " does not have. Give it `cache_identifiers` instead, such as"
                r" ['(refine_nets\.\d+\.)?transformer_blocks\.\d+']."
            )
        super().enable_cache(config)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        grain_map: torch.Tensor | GrainLayout,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple:
        """Predict multi-grained noise, Eqs. 6-9.

        Args:
            hidden_states: noised latents z_t, tied, (B, C, h * R, w * R).
            timestep: (B,) or a scalar, in the scheduler's units, 0 ... 999.
            grain_map: (B, h, w) int64, 0 = coarsest, or what `prepare_grain_map` made of it.
            class_labels: (B,) int64, `num_classes` for no class; None for an unconditional model.
            return_dict: False returns a tuple.
            attention_kwargs: {"scale": ...} weighs adapters in this pass.

        Returns:
            The noise (and the variance), tied, (B, O, h * R, w * R).

        Raises:
            ValueError: shapes, labels or map do not fit the configuration or one another, or the latents are not tied
                (checked on the CPU; reading the answer back from an accelerator would stall it at every step).
        """
        channels, num_classes = self.config.in_channels, self.config.num_classes
        timestep = check_conditioning(hidden_states, channels, timestep, class_labels, num_classes)  # (B,)
        layout = self._prepare(hidden_states, grain_map)
        label_embedding = 0.0 if self.label_embed is None else self.label_embed(class_labels)  # (B, D)

        # 1. Multi-grained Net: rough tokens, one per region (Eq. 6)
        conditioning = F.silu(self.time_embed(timestep, hidden_states.dtype) + label_embedding)  # (B, D)
        tokens = self.patch_embed(patchify(hidden_states, self.patch_size))  # (B, h * w, D)
        tokens = residual_stream(tokens, self.residual_dtype)
        tokens = tokens + sincos_positions(layout.grain_map.shape[1:], tokens)
        tokens = tokens + self.grain_embed(layout.grain_map)
        for block in self.transformer_blocks:
            tokens = run_block(self, block, tokens, conditioning)  # (B, h * w, D)

        # 2. Router: noise of every region (Eq. 7); the cells of a coarse code share their mean
        noise = self.norm_out(tokens, conditioning)  # (B, h * w, O * R * R)
        noise = unpatchify(noise, layout.grain_map.shape[1], self.patch_size)  # (B, O, h * R, w * R)
        noise = layout.average(noise, grain=0)

        # 3. RefineNet: correct the finer regions (Eq. 8) and 4. merge (Eq. 9), once for every finer grain
        tokens = tokens.flatten(0, 1)  # (B * h * w, D)
        for level, refine_net in enumerate(self.refine_nets, start=1):
            packed = layout.levels[level - 1]
            residual, tokens = refine_net(tokens, hidden_states, noise, timestep, label_embedding, packed)
            noise = layout.average(noise + residual, grain=level)  # (B, O, h * R, w * R)

        if not return_dict:
            return (noise,)
        return Transformer2DModelOutput(sample=noise)

    def _prepare(self, hidden_states: torch.Tensor, grain_map: torch.Tensor | GrainLayout) -> GrainLayout:
        """The layout of a map, on the device of the latents and checked against them."""
        layout = grain_map if isinstance(grain_map, GrainLayout) else self.prepare_grain_map(grain_map)
        if layout.grain_map.device != hidden_states.device:
            layout = layout.to(hidden_states.device)
        if (layout.num_grains, layout.window_size) != (self.config.num_grains, self.config.window_size):
            raise ValueError(
                f"`grain_map` was prepared for {layout.num_grains} grains and windows of {layout.window_size} tokens,"
                f" this model has {self.config.num_grains} and {self.config.window_size}: use its `prepare_grain_map`."
            )
        layout.check_sides(hidden_states)
        if can_be_read(hidden_states):
            layout.check_tied(hidden_states)
        return layout
