# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Start from public weights: of a DiT, an AutoencoderKL, or a DC-DiT as its authors released it.

    from diffusers_d2it.conversion import convert_autoencoder_kl, convert_dit_checkpoint

    model, report = convert_dit_checkpoint("DiT-XL-2-256x256.pt")
    vae, report = convert_autoencoder_kl("sd-vae-ft-ema")
    print(report)

Where every region is fine, the converted model computes what its source computes; what a source cannot hold, the
coarse grain, starts from the nearest thing it does hold. `upcycle_dit` takes only the blocks and embedders of a DiT,
for a DC-DiT whose other parts are to be trained. Every weight of the source and of the model is accounted for
in the `ConversionReport`: a weight that has no place, or that is missing, is an error.
"""

from .autoencoder_kl import convert_autoencoder_kl
from .dcdit import convert_dcdit_checkpoint
from .dit import convert_diffusers_dit, convert_dit_checkpoint
from .transfer import ConversionReport, save_converted
from .upcycling import upcycle_dit


__all__ = [
    "ConversionReport",
    "convert_autoencoder_kl",
    "convert_dcdit_checkpoint",
    "convert_diffusers_dit",
    "convert_dit_checkpoint",
    "save_converted",
    "upcycle_dit",
]
