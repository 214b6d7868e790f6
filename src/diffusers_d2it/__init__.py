# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""D2iT, the Dynamic Diffusion Transformer (arXiv:2504.09454), for diffusers.

from diffusers_d2it import D2iTPipeline, bundled_checkpoint

pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
image = pipe(class_labels=[207]).images[0]
"""

from importlib import import_module

from .optional import naming_what_is_broken


with naming_what_is_broken("importing diffusers"):  # before all that builds on it
    from diffusers import DiffusionPipeline as _DiffusionPipeline  # noqa: F401
    from diffusers import ModelMixin  # diffusers' loaders look for it in the package of a component

from .entropy import region_entropy
from .grains import GrainLayout, tie
from .hub.card import make_model_card
from .models.autoencoder_kl_dynamic import DynamicAutoencoderKL
from .models.latent_codec import LatentCodec
from .models.layers import DiTBlock, SelfAttentionProcessor
from .models.refine_net import RefineBlock
from .models.transformer_d2it_content import D2iTContentModel
from .models.transformer_d2it_grain import D2iTGrainModel
from .models.transformer_dcdit import ChunkBlock, DCDiTModel
from .pipelines.callbacks import D2iTCFGCutoffCallback
from .pipelines.grain_maps import foveated_grain_map, grain_map_from_boxes, grain_map_from_image, grain_map_from_mask
from .pipelines.grain_sampling import sample_grain_map
from .pipelines.outputs import D2iTPipelineOutput, DCDiTPipelineOutput
from .pipelines.pipeline_d2it import D2iTPipeline
from .pipelines.pipeline_d2it_img2img import D2iTImg2ImgPipeline
from .pipelines.pipeline_d2it_inpaint import D2iTInpaintPipeline
from .pipelines.pipeline_dcdit import DCDiTPipeline
from .presets import (
    bundled_checkpoint,
    list_bundled_checkpoints,
    list_presets,
    list_samplers,
    load_preset,
    load_sampler,
)
from .registration import register
from .visualization import visualize_boundary_map, visualize_grain_map


__version__ = "0.1.0"

_EVALUATION = ("evaluate", "load_features", "open_images")  # imported when they are asked for: they take a while

__all__ = [
    "DCDiTModel",
    "DCDiTPipeline",
    "DCDiTPipelineOutput",
    "D2iTCFGCutoffCallback",
    "D2iTContentModel",
    "D2iTGrainModel",
    "D2iTImg2ImgPipeline",
    "D2iTInpaintPipeline",
    "D2iTPipeline",
    "D2iTPipelineOutput",
    "DynamicAutoencoderKL",
    "GrainLayout",
    "LatentCodec",
    "ModelMixin",
    "bundled_checkpoint",
    "evaluate",
    "foveated_grain_map",
    "grain_map_from_boxes",
    "grain_map_from_image",
    "grain_map_from_mask",
    "list_bundled_checkpoints",
    "list_presets",
    "list_samplers",
    "load_features",
    "load_preset",
    "load_sampler",
    "make_model_card",
    "open_images",
    "region_entropy",
    "sample_grain_map",
    "tie",
    "visualize_boundary_map",
    "visualize_grain_map",
]


def __getattr__(name: str):
    if name in _EVALUATION:
        return getattr(import_module(f"{__name__}.evaluation"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register(
    [DynamicAutoencoderKL, D2iTGrainModel, D2iTContentModel, DCDiTModel],
    {
        "d2it": {"text2image": D2iTPipeline, "image2image": D2iTImg2ImgPipeline, "inpaint": D2iTInpaintPipeline},
        "dcdit": {"text2image": DCDiTPipeline},
    },
    block_classes=[DiTBlock, RefineBlock, ChunkBlock],
    processor_class=SelfAttentionProcessor,
)
