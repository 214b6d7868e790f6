# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Dynamic VAE (DVAE, sec. 3.1 of arXiv:2504.09454): one code for a smooth region, four for a detailed one.

Shapes:
    B batch, C latent channels, H W image sides in pixels, k number of grains
    f_0 > ... > f_{k-1} downsample factors, coarsest first; S = f_0 is the side of a region; f = f_{k-1} the finest
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, DiagonalGaussianDistribution
from diffusers.utils import BaseOutput, is_torch_version
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..entropy import NUM_BINS, SIGMA, region_entropy, thresholds_for_ratios
from ..grains import GrainLayout, check_grain_map, code_weights, grain_map_from_entropy
from ..limits import check_values, plain
from .configs import check_autoencoder
from .hierarchical_encoder import HierarchicalEncoder
from .strict import SafeAdapterMixin, StrictModelMixin
from .tiling import blend_tiles, tile_starts


class TiedGaussianDistribution(DiagonalGaussianDistribution):
    """Diagonal Gaussian over codes of mixed grain: one mean, one variance, one noise draw for all cells of a code.

    Args:
        parameters: means and log-variances, (B, 2C, H/f, W/f), equal inside every code.
        layout: of the grain map (B, H/S, W/S).
    """

    def __init__(self, parameters: torch.Tensor, layout: GrainLayout):
        super().__init__(parameters)
        self.layout = layout

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """Draw latents (B, C, H/f, W/f), equal inside every code."""
        return self.layout.tie(super().sample(generator))

    def kl(self) -> torch.Tensor:
        """KL divergence to the standard normal in nats, (B,): summed over codes, each counted once."""
        share = code_weights(self.layout.grain_of_cell, self.layout.num_grains)
        kl = 0.5 * (self.mean.pow(2) + self.var - 1.0 - self.logvar).sum(dim=1)  # (B, H/f, W/f)
        return (kl * share.to(kl)).sum(dim=(-2, -1))


@dataclass
class DynamicAutoencoderKLOutput(BaseOutput):
    """Output of `DynamicAutoencoderKL.encode`."""

    latent_dist: TiedGaussianDistribution  # posterior over the latents (B, C, H/f, W/f), tied inside every code
    grain_map: torch.Tensor  # grain of every region, (B, H/S, W/S), int64, 0 = coarsest
    entropy: torch.Tensor  # entropy of every region in nats, (B, H/S, W/S), float32


class DynamicAutoencoderKL(StrictModelMixin, AutoencoderMixin, SafeAdapterMixin, ConfigMixin):
    r"""Variational autoencoder that gives every region of an image as many codes as its entropy asks for.

    The trunk of the encoder is read at every factor of `downsample_factors`; Dynamic Grained Coding decides by the
    entropy of a region (Eqs. 2-3, arXiv:2504.09454) which of the heads encodes it, and coarser codes are copied to
    the finest grid, which the decoder reads.

        vae = DynamicAutoencoderKL.from_pretrained(...)
        posterior = vae.encode(pixels, fine_ratio=0.5)      # pixels (B, 3, H, W) in [-1, 1]
        latents = posterior.latent_dist.sample(generator)   # (B, C, H/f, W/f)
        pixels = vae.decode(latents).sample

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the decoded image.
        latent_channels: C, channels of a code.
        downsample_factors: powers of two, each twice the one before, finest first; (8, 16) in sec. 4.1.
        block_out_channels: width of the encoder at each halving of the image, up to the coarsest factor.
        decoder_block_out_channels: width of the decoder, from the image to the finest grid.
        layers_per_block: residual blocks in each level of the encoder; the decoder has one more.
        norm_num_groups: groups of every GroupNorm.
        mid_block_add_attention: self-attention in the heads of the encoder and at the bottom of the decoder.
        sample_size: side of the training images in pixels; also the smallest side of a tile.
        scaling_factor: latents are multiplied by it before diffusion, measured on the training set after stage 1.
        shift_factor: subtracted from the latents before scaling; None for zero.
        grain_ratios: share of regions of each grain, coarsest first, that `encode` aims at by default; None for equal
            shares. (0.5, 0.5) is the paper's main setting.
        calibration: entropy quantiles of a data set and how they were counted, from `EntropyCalibration.to_config`.
            Without it `encode` needs a `grain_map`, or a `fine_ratio` of 1, or with two grains of 0.
        use_post_quant_conv: a 1x1 convolution between the latents and the decoder, as diffusers' `AutoencoderKL` has
            one; for weights that come from there. Folded into the decoder's first convolution it would change the
            border of the image, because that convolution pads with zeros.

    Raises:
        ValueError: a value is out of its range (`configs.LIMITS`), factors, widths or ratios contradict one
            another, or the calibration was counted for another region size.
    """

    _check_together = staticmethod(check_autoencoder)
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DownEncoderBlock2D", "UpDecoderBlock2D", "UNetMidBlock2D"]
    _repeated_blocks = ["ResnetBlock2D"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in", "conv_out", "post_quant_conv"]
    _group_offload_block_modules = ["encoder", "post_quant_conv", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        downsample_factors: tuple[int, ...] = (8, 16),
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        decoder_block_out_channels: tuple[int, ...] = (128, 128, 256, 256),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        grain_ratios: tuple[float, ...] | None = None,
        calibration: dict | None = None,
        use_post_quant_conv: bool = False,
    ):
        self.check_config(self.config)
        super().__init__()
        self.encoder = HierarchicalEncoder(
            in_channels,
            latent_channels,
            downsample_factors,
            block_out_channels,
            layers_per_block,
            norm_num_groups,
            mid_block_add_attention,
        )
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=("UpDecoderBlock2D",) * len(decoder_block_out_channels),
            block_out_channels=decoder_block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_overlap_factor = 0.25

    @property
    def num_grains(self) -> int:
        """k, the number of grains."""
        return len(self.config.downsample_factors)

    @property
    def region_size(self) -> int:
        """S, the side of a region in pixels: the coarsest factor."""
        return self.config.downsample_factors[-1]

    @property
    def downsample_factor(self) -> int:
        """f, pixels per cell of the latents along one side: the finest factor."""
        return self.config.downsample_factors[0]

    @property
    def grain_ratios(self) -> list[float]:
        """Share of regions of each grain that `encode` aims at by default, coarsest first."""
        return list(self.config.grain_ratios or [1 / self.num_grains] * self.num_grains)

    def freeze_fine_path(self) -> None:
        """Leave only the encoder of the coarser grains to train: fine codes and the decoder stay what they are.

        For an autoencoder converted from a public one: a diffusion model that was trained on its fine codes still
        knows them.
        """
        self.requires_grad_(False)
        encoder, finest = self.encoder, f"f{self.downsample_factor}"
        encoder.down_blocks[self.downsample_factor.bit_length() :].requires_grad_(True)
        encoder.downsamplers.requires_grad_(True)
        for heads in (encoder.mid_blocks, encoder.conv_norm_outs, encoder.conv_outs):
            heads.requires_grad_(True)
            heads[finest].requires_grad_(False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` the residual blocks, which `encode` and `decode` run: pipelines do not call `forward`.

        Compiled as one, the decoder has wrong gradients on a CPU under bf16 autocast (torch 2.13).
        """
        self.compile_repeated_blocks(*args, **kwargs)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """What diffusion works on: latents of the posterior, shifted and scaled to zero mean and unit variance."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unscale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """What `decode` reads: the inverse of `scale_latents`."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)

    # -----------------------------------------------------------------------------------------------------------------
    # Dynamic Grained Coding
    # -----------------------------------------------------------------------------------------------------------------

    def region_entropy(self, x: torch.Tensor) -> torch.Tensor:
        """Entropy of the regions of images (B, 3, H, W) in [-1, 1], counted as in the calibration: (B, h, w)."""
        return region_entropy(x, self.region_size, *_counting(self))

    def thresholds(self, fine_ratio: float | None = None) -> list[float]:
        """Entropy thresholds T_0 ... T_{k-2} in nats for a share of fine regions.

        Args:
            fine_ratio: share of regions in the finest grain, in [0, 1]; the other grains share the rest in the
                proportion of `config.grain_ratios`. None takes `config.grain_ratios` as they are.

        Raises:
            ValueError: the ratio lies outside [0, 1], or the model has not been calibrated.
        """
        ratios = self.grain_ratios
        if fine_ratio is not None:
            fine_ratio = plain(fine_ratio)
            check_values({"fine_ratio": fine_ratio}, {"fine_ratio": float}, {"fine_ratio": (0, 1)}, exact=False)
            coarse = ratios[:-1] if sum(ratios[:-1]) > 0 else [1.0] * (self.num_grains - 1)
            ratios = [(1 - fine_ratio) * share / sum(coarse) for share in coarse] + [fine_ratio]
        if self.config.calibration is None:
            if any(0 < ratio < 1 for ratio in ratios):
                of_one_grain = "0 or 1" if self.num_grains == 2 else "1"
                raise ValueError(
                    "this DynamicAutoencoderKL has no entropy thresholds: run examples/calibrate_dvae.py on its"
                    f" training images, or pass a `grain_map`, or a `fine_ratio` of {of_one_grain}."
                )
            return thresholds_for_ratios({"quantiles": [0.0, 0.0]}, ratios)
        return thresholds_for_ratios(self.config.calibration, ratios)

    # -----------------------------------------------------------------------------------------------------------------
    # Encode and decode
    # -----------------------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(
        self,
        x: torch.Tensor,
        grain_map: torch.Tensor | None = None,
        fine_ratio: float | None = None,
        return_dict: bool = True,
    ) -> DynamicAutoencoderKLOutput | tuple:
        """Encode images into a posterior over codes of mixed grain.

        Args:
            x: images (B, 3, H, W) in [-1, 1], H and W multiples of S.
            grain_map: grain of every region, (B, H/S, W/S), int64, 0 = coarsest; None lets the entropy decide.
            fine_ratio: share of fine regions over the calibration set, in [0, 1]; None for `config.grain_ratios`.
            return_dict: False returns the tuple (latent_dist, grain_map, entropy).

        Raises:
            ValueError: `x` has another shape, sides that are not multiples of S or values outside [-1, 1]; the map has
                another shape, dtype or value; both map and ratio are given; the ratio lies outside [0, 1]; the model
                has not been calibrated.
        """
        entropy = self.region_entropy(x)
        if grain_map is None:
            grain_map = grain_map_from_entropy(entropy, self.thresholds(fine_ratio))
        elif fine_ratio is not None:
            raise ValueError("`grain_map` and `fine_ratio` are mutually exclusive: pass one of them.")
        else:
            check_grain_map(grain_map, self.num_grains)
            if grain_map.shape != entropy.shape:
                raise ValueError(
                    f"`grain_map` must have one entry per region, shape {tuple(entropy.shape)} for these images, got"
                    f" {tuple(grain_map.shape)}."
                )
            grain_map = grain_map.to(x.device)

        latent_dist = self.posterior(self.encode_grains(x), grain_map)
        if not return_dict:
            return latent_dist, grain_map, entropy
        return DynamicAutoencoderKLOutput(latent_dist=latent_dist, grain_map=grain_map, entropy=entropy)

    @apply_forward_hook
    def encode_grains(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Encode images at every grain, before any map chooses: what a cache keeps, as it serves every fine ratio.

            moments = vae.encode_grains(pixels)
            latents = vae.posterior(moments, grain_map).sample(generator)  # as of `encode(pixels, grain_map)`

        Args:
            x: images (B, in_channels, H, W) in [-1, 1], H and W multiples of S.

        Returns:
            Means and log-variances of each grain on its own grid, coarsest first: (B, 2C, H/S, W/S), ...
            (B, 2C, H/f, W/f).

        Raises:
            ValueError: `x` has another shape or sides that are not multiples of S.
        """
        channels, size = self.config.in_channels, self.region_size
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % size or x.shape[3] % size:
            raise ValueError(
                f"`x` must have shape (B, {channels}, H, W), H and W multiples of the region size {size}, got"
                f" {tuple(x.shape)}."
            )
        if self.use_slicing and len(x) > 1:
            slices = [self._encode_grains(one) for one in x.split(1)]
            return [torch.cat(grain) for grain in zip(*slices)]
        return self._encode_grains(x)

    @staticmethod
    def posterior(moments: list[torch.Tensor], grain_map: torch.Tensor) -> TiedGaussianDistribution:
        """The posterior over codes of mixed grain: each region takes the moments of its grain, from `encode_grains`.

        Args:
            moments: one tensor per grain, coarsest first: (B, 2C, H/S, W/S), ... (B, 2C, H/f, W/f).
            grain_map: grain of every region, (B, H/S, W/S), int64, 0 = coarsest.

        Raises:
            ValueError: the map has another dtype or value, or does not match the moments.
        """
        layout = GrainLayout.from_grain_map(grain_map, len(moments))
        return TiedGaussianDistribution(layout.merge(moments), layout)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Decode latents (B, C, H/f, W/f), unscaled, into images (B, 3, H, W), about [-1, 1].

        `generator` is accepted because diffusers' pipelines pass one; decoding is deterministic.

        Raises:
            ValueError: `z` is not (B, C, ., .).
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(f"`z` must have shape (B, {self.config.latent_channels}, h, w), got {tuple(z.shape)}.")
        slices = z.split(1) if self.use_slicing else (z,)
        sample = torch.cat([self._decode(one) for one in slices])
        if not return_dict:
            return (sample,)
        return DecoderOutput(sample=sample)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Reconstruct images (B, 3, H, W) in [-1, 1] from the mode of the posterior, or from a sample of it."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    # -----------------------------------------------------------------------------------------------------------------
    # Tiling: memory bounded by the tile, seams blended over a quarter of it
    # -----------------------------------------------------------------------------------------------------------------

    def _encode_grains(self, x: torch.Tensor) -> list[torch.Tensor]:
        if not self.use_tiling or max(x.shape[-2:]) <= self.tile_sample_min_size:
            return self.encoder(x)
        # The tile and its stride are whole regions, so that tiles meet on the grid of every grain.
        tile, stride = self._tile_and_stride()
        tops, lefts = (tile_starts(side, tile, stride) for side in x.shape[-2:])
        tiles = [[self.encoder(x[..., top : top + tile, left : left + tile]) for left in lefts] for top in tops]
        moments = []
        for grain, factor in enumerate(reversed(self.config.downsample_factors)):
            rows = [[heads[grain] for heads in row] for row in tiles]
            moments.append(blend_tiles(rows, stride=stride // factor, overlap=(tile - stride) // factor))
        return moments

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        factor = self.downsample_factor
        if not self.use_tiling or max(z.shape[-2:]) * factor <= self.tile_sample_min_size:
            return self.decoder(z)
        tile, stride = (side // factor for side in self._tile_and_stride())
        tops, lefts = (tile_starts(side, tile, stride) for side in z.shape[-2:])
        tiles = [[self.decoder(z[..., top : top + tile, left : left + tile]) for left in lefts] for top in tops]
        return blend_tiles(tiles, stride=stride * factor, overlap=(tile - stride) * factor)

    def _tile_and_stride(self) -> tuple[int, int]:
        unit = self.region_size
        tile = max(self.tile_sample_min_size // unit, 2) * unit
        overlap = max(round(tile * self.tile_overlap_factor / unit), 1) * unit
        return tile, tile - overlap


# An earlier torch takes no module there; its graphs of dynamic shapes cannot encode
@torch.compiler.assume_constant_result if is_torch_version(">=", "2.13") else lambda function: function
def _counting(vae: DynamicAutoencoderKL) -> tuple[int, float]:
    """Bins and width of a value, by which the entropy is counted: constants, also in graphs of dynamic shapes."""
    calibration = vae.config.calibration or {}
    return calibration.get("num_bins", NUM_BINS), calibration.get("sigma", SIGMA)
