# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Dynamic Grain Transformer (sec. 3.2.2 of arXiv:2504.09454): draws the map of grains from noise.

Shapes:
    B batch, k grains, h w sides of the grain map in regions, D width
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..limits import can_be_read
from .configs import check_grain_model
from .layers import (
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
from .strict import SafeAdapterMixin, StrictModelMixin


@dataclass
class D2iTGrainModelOutput(BaseOutput):
    """Output of `D2iTGrainModel`."""

    logits: torch.Tensor  # unnormalised log-probabilities g of Eq. 4 for the grain of each region, (B, k, h, w)


class D2iTGrainModel(ClassLabelsMixin, StrictModelMixin, AttentionMixin, SafeAdapterMixin, ConfigMixin):
    r"""A DiT with one token per region that predicts the clean grain map from a noised one.

    A single pass from noise to logits would make every region an independent coin, so the map is drawn by diffusion:
    the state has one channel per grain (one-hot, -1 and +1), the network predicts the clean map as logits, trained by
    the cross-entropy of Eq. 5, and a diffusers scheduler that knows `prediction_type="sample"` (DDIM, DDPM,
    DPMSolverMultistep, UniPC and others) steps on their expectation (`expected_state`). The map is the argmax of the
    last logits (Eq. 4).

        state = torch.randn(1, 2, 16, 16)
        for t in scheduler.timesteps:
            logits = grain_model(state, t, class_labels).logits
            state = scheduler.step(grain_model.expected_state(logits), t, state).prev_sample
        grain_map = logits.argmax(dim=1)

    Args:
        sample_size: side of the training maps in regions.
        num_grains: k.
        num_layers, num_attention_heads, attention_head_dim, mlp_ratio: DiT-S is 12, 6, 64, 4.0 (sec. 4.1: 33M).
        num_classes: number of class labels; label `num_classes` means no class. None for an unconditional model.
        fine_ratio_condition: accept the share of fine regions as a condition.

    Raises:
        ValueError: a value is out of its range (`configs.LIMITS`).
    """

    _check_together = staticmethod(check_grain_model)
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", "time_embed", "label_embed", "fine_ratio_embed"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        num_grains: int = 2,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        fine_ratio_condition: bool = True,
    ):
        self.check_config(self.config)
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False
        self.patch_embed = nn.Linear(num_grains, dim)
        self.time_embed = TimestepEmbedder(dim)
        self.label_embed = LabelEmbedder(num_classes, dim) if num_classes is not None else None
        if fine_ratio_condition:
            self.fine_ratio_embed = TimestepEmbedder(dim)
            self.null_fine_ratio = nn.Parameter(torch.zeros(dim))
        self.transformer_blocks = nn.ModuleList(
            [DiTBlock(dim, num_attention_heads, mlp_ratio) for _ in range(num_layers)]
        )
        self.norm_out = FinalLayer(dim, num_grains)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DiT's initialisation; the output starts at zero, every grain equally likely."""
        init_dit_weights(self)
        nn.init.zeros_(self.norm_out.proj_out.weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        fine_ratio: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> D2iTGrainModelOutput | tuple:
        """Predict the clean map.

        Args:
            hidden_states: noised one-hot map (B, k, h, w).
            timestep: (B,) or a scalar, in the scheduler's units, 0 ... 999.
            class_labels: (B,) int64, `num_classes` for no class; None for an unconditional model.
            fine_ratio: (B,) float, the share of regions in the finest grain, in [0, 1]; NaN where it is left open.
                None leaves it open everywhere.
            return_dict: False returns a tuple.

        Raises:
            ValueError: shapes, labels or ratio do not fit the configuration.
        """
        num_grains, num_classes = self.config.num_grains, self.config.num_classes
        timestep = check_conditioning(hidden_states, num_grains, timestep, class_labels, num_classes)  # (B,)
        batch_size, _, height, width = hidden_states.shape
        self._check_fine_ratio(fine_ratio, batch_size)

        # 1. Conditioning: timestep, class, share of fine regions
        conditioning = self.time_embed(timestep, hidden_states.dtype)  # (B, D)
        if self.label_embed is not None:
            conditioning = conditioning + self.label_embed(class_labels)
        if self.config.fine_ratio_condition:
            conditioning = conditioning + self._embed_fine_ratio(fine_ratio, batch_size, hidden_states.dtype)
        conditioning = F.silu(conditioning)

        # 2. One token per region
        tokens = self.patch_embed(hidden_states.flatten(2).transpose(1, 2))  # (B, h * w, D)
        tokens = residual_stream(tokens)
        tokens = tokens + sincos_positions((height, width), tokens)

        # 3. DiT blocks
        for block in self.transformer_blocks:
            tokens = run_block(self, block, tokens, conditioning)  # (B, h * w, D)

        # 4. Logits of each grain
        logits = self.norm_out(tokens, conditioning)  # (B, h * w, k)
        logits = logits.transpose(1, 2).unflatten(2, (height, width))  # (B, k, h, w)

        if not return_dict:
            return (logits,)
        return D2iTGrainModelOutput(logits=logits)

    def _embed_fine_ratio(self, fine_ratio: torch.Tensor | None, batch_size: int, dtype: torch.dtype) -> torch.Tensor:
        if fine_ratio is None:
            return self.null_fine_ratio.expand(batch_size, -1)
        # The ratio uses the timestep's frequencies, so it is spread over the same range, 0 ... 1000.
        embedded = self.fine_ratio_embed(torch.nan_to_num(fine_ratio) * 1000, dtype)
        return torch.where(fine_ratio.isnan()[:, None], self.null_fine_ratio.to(embedded), embedded)

    def _check_fine_ratio(self, fine_ratio: torch.Tensor | None, batch_size: int) -> None:
        if fine_ratio is None:
            return
        if not self.config.fine_ratio_condition:
            raise ValueError("`fine_ratio` was given to a grain model with fine_ratio_condition=False.")
        if fine_ratio.shape != (batch_size,) or not fine_ratio.is_floating_point():
            raise ValueError(
                f"`fine_ratio` must be floating point of shape ({batch_size},), got {fine_ratio.dtype} of shape"
                f" {tuple(fine_ratio.shape)}."
            )
        if can_be_read(fine_ratio) and ((fine_ratio < 0) | (fine_ratio > 1)).any():  # false for NaN: left open
            raise ValueError(f"`fine_ratio` must lie in [0, 1] or be NaN, got {fine_ratio.tolist()}.")

    @staticmethod
    def expected_state(logits: torch.Tensor) -> torch.Tensor:
        """x0 of the diffusion over maps: the one-hot state (-1, +1) expected under softmax(logits), (B, k, h, w)."""
        return 2 * logits.softmax(dim=1) - 1

    @staticmethod
    def state_from_grain_map(grain_map: torch.Tensor, num_grains: int) -> torch.Tensor:
        """The clean state of a map: (B, h, w) int64 -> (B, k, h, w) one-hot with -1 and +1, float32."""
        one_hot = F.one_hot(grain_map, num_grains).float()
        return (2 * one_hot - 1).movedim(-1, 1)
