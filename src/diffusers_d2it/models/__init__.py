# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The networks of D2iT and of DC-DiT as `ModelMixin`s of diffusers that load what was saved or nothing."""

from .autoencoder_kl_dynamic import DynamicAutoencoderKL
from .latent_codec import LatentCodec
from .layers import DiTBlock
from .transformer_d2it_content import D2iTContentModel
from .transformer_d2it_grain import D2iTGrainModel
from .transformer_dcdit import DCDiTModel


__all__ = ["DCDiTModel", "D2iTContentModel", "D2iTGrainModel", "DiTBlock", "DynamicAutoencoderKL", "LatentCodec"]
