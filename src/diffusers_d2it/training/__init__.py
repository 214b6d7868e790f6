# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share. Their loops, with the step, the gate and what saves and stops, stand in them."""

from ..draws import draw_integers, draw_uniform
from .adapters import add_adapters, save_adapters
from .alignment import Alignment, patches_of
from .checkpoints import Checkpoints, trained_weights, use_ema
from .discriminator import PatchDiscriminator
from .distillation import Distillation
from .finding import find_checkpoint, found_checkpoints
from .gate import FiniteGate
from .inputs import draw_budget, draw_fine_ratio, draw_grain_map, drop_labels, identity_of, load_autoencoder
from .measures import bar_of, count_entropy, grain_signals, measure_latents, token_signals, warn_of_few_tokens
from .perceptual import PerceptualLoss
from .run import Run, make_accelerator


__all__ = [
    "Alignment",
    "Checkpoints",
    "Distillation",
    "FiniteGate",
    "add_adapters",
    "bar_of",
    "PatchDiscriminator",
    "PerceptualLoss",
    "Run",
    "count_entropy",
    "draw_budget",
    "draw_fine_ratio",
    "draw_grain_map",
    "draw_integers",
    "draw_uniform",
    "drop_labels",
    "find_checkpoint",
    "found_checkpoints",
    "grain_signals",
    "identity_of",
    "load_autoencoder",
    "make_accelerator",
    "measure_latents",
    "patches_of",
    "save_adapters",
    "token_signals",
    "trained_weights",
    "use_ema",
    "warn_of_few_tokens",
]
