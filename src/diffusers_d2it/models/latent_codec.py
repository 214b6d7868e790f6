# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the second stage needs of an autoencoder: its moments, and the scale on which diffusion sees its codes.

Shapes:
    B images, C latent channels, H W their sides in pixels, f pixels along a side of a cell
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..entropy import NUM_BINS, SIGMA
from ..files.source import public_config
from .autoencoder_kl_dynamic import DynamicAutoencoderKL


# What encoding does not read: a cache outlives a tuned decoder or a new calibration
_MODULES_OF_DECODING = ("decoder.", "post_quant_conv.")
CONFIG_OF_DECODING = {
    "out_channels",
    "decoder_block_out_channels",
    "up_block_types",
    "use_post_quant_conv",
    "sample_size",
    "force_upcast",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "grain_ratios",
    "calibration",
}


class LatentCodec:
    """An autoencoder as a second stage sees it, whichever it is: D2iT's, of several grains, or any `AutoencoderKL`.

        codec = LatentCodec(vae)
        moments = codec.moments(batch)                       # of a latent cache, or of batch["pixels"]
        latents = codec.scale(codec.posterior(moments).sample(generator))
        images = codec.decode(latents)

    Args:
        vae: the autoencoder, or a codec of it.

    Attributes:
        vae: the autoencoder.
        has_grains: whether it is D2iT's.
        factors: pixels along a side of a cell of each grain, finest first.
        channels: C.

    Raises:
        ValueError: it is neither.
    """

    def __init__(self, vae: "DynamicAutoencoderKL | AutoencoderKL | LatentCodec"):
        vae = vae.vae if isinstance(vae, LatentCodec) else vae
        model = getattr(vae, "_orig_mod", vae)  # under torch.compile
        if not isinstance(model, DynamicAutoencoderKL | AutoencoderKL):
            raise ValueError(f"`vae` must be a DynamicAutoencoderKL or an AutoencoderKL, got {type(model).__name__}.")
        self.vae, self.has_grains = vae, isinstance(model, DynamicAutoencoderKL)
        config = vae.config
        halvings = len(config.block_out_channels) - 1
        self.factors = list(config.downsample_factors) if self.has_grains else [2**halvings]
        self.channels = config.latent_channels

    @property
    def factor(self) -> int:
        """f of the latents: the finest."""
        return self.factors[0]

    @property
    def unit(self) -> int:
        """What sides of images must be multiples of, in pixels: a region of D2iT's autoencoder, a cell of another."""
        return self.factors[-1]

    # -----------------------------------------------------------------------------------------------------------------
    # From images to latents, and back
    # -----------------------------------------------------------------------------------------------------------------

    def encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Means and log-variances of each grain, coarsest first, (B, 2C, H / F, W / F); of one without grains one.

        Raises:
            ValueError: the images have another number of channels, or sides that are not multiples of `unit`.
        """
        if self.has_grains:
            return self.vae.encode_grains(pixels)
        channels = self.vae.config.in_channels
        if pixels.ndim != 4 or pixels.shape[1] != channels or any(side % self.unit for side in pixels.shape[2:]):
            raise ValueError(
                f"`pixels` must have shape (B, {channels}, H, W), H and W multiples of {self.unit}, got"
                f" {tuple(pixels.shape)}."
            )
        return [self.vae.encode(pixels).latent_dist.parameters]

    def moments(self, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """As `encode`, of a batch: read from a cache, or of `batch["pixels"]`."""
        return batch["moments"] if "moments" in batch else self.encode(batch["pixels"])

    @staticmethod
    def posterior(moments: list[torch.Tensor]) -> DiagonalGaussianDistribution:
        """The posterior of all cells in the finest grain; one of mixed grain is `DynamicAutoencoderKL.posterior`."""
        return DiagonalGaussianDistribution(moments[-1])

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """What diffusion works on: codes of zero mean and unit variance."""
        mean, factor = self._statistics(latents)
        return (latents - mean) * factor

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `scale`."""
        mean, factor = self._statistics(latents)
        return latents / factor + mean

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, H / f, W / f) as images (B, 3, H, W), about [-1, 1]."""
        return self.vae.decode(self.unscale(latents).to(self.vae.dtype)).sample

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """The mean of the codes and what makes their variance one: of all, or of each channel, (C, 1, 1)."""
        config = self.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return config.shift_factor or 0.0, config.scaling_factor
        mean, deviation = (
            torch.tensor(config[key], device=latents.device, dtype=latents.dtype)[:, None, None]
            for key in ("latents_mean", "latents_std")
        )
        return mean, config.scaling_factor / deviation

    # -----------------------------------------------------------------------------------------------------------------
    # What a cache and a resumed run compare
    # -----------------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What a cache says of the autoencoder that its codes are of: the fields of a `LatentCachePlan`."""
        config = self.vae.config
        mean, deviation = (config.get(key) for key in ("latents_mean", "latents_std"))
        return {
            "autoencoder": "DynamicAutoencoderKL" if self.has_grains else "AutoencoderKL",
            "vae_fingerprint": self.fingerprint(),
            "scaling_factor": config.scaling_factor,
            "shift_factor": config.shift_factor or 0.0,
            "latents_mean": mean and list(mean),
            "latents_std": deviation and list(deviation),
            "downsample_factors": self.factors,
            "latent_channels": self.channels,
        }

    def fingerprint(self) -> str:
        """SHA-256 of all that decides how it encodes: configuration, names, shapes and float32 weights.

        The decoder has no part in it, nor have scale, shift and thresholds, which are applied to codes after they are
        read. The bins and the width by which a calibration counts entropy have one.
        """
        config = public_config(self.vae.config)
        config = {key: value for key, value in config.items() if key not in CONFIG_OF_DECODING}
        if self.has_grains:
            calibration = self.vae.config.calibration or {}
            config.update(num_bins=calibration.get("num_bins", NUM_BINS), sigma=calibration.get("sigma", SIGMA))
        sha256 = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        model = getattr(self.vae, "_orig_mod", self.vae)
        for name, tensor in sorted(model.state_dict().items()):
            if not name.startswith(_MODULES_OF_DECODING):
                sha256.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
                sha256.update(tensor.to("cpu", torch.float32).contiguous().numpy())
        return sha256.hexdigest()
