# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From a class label to an image and its grain map, by any scheduler of diffusers, every code kept one value."""

from .grain_sampling import sample_grain_map
from .outputs import D2iTPipelineOutput, DCDiTPipelineOutput
from .pipeline_d2it import D2iTPipeline
from .pipeline_d2it_img2img import D2iTImg2ImgPipeline
from .pipeline_d2it_inpaint import D2iTInpaintPipeline
from .pipeline_dcdit import DCDiTPipeline
from .sampling_steps import SamplingSteps, TiedScheduler


__all__ = [
    "D2iTImg2ImgPipeline",
    "D2iTInpaintPipeline",
    "D2iTPipeline",
    "D2iTPipelineOutput",
    "DCDiTPipeline",
    "DCDiTPipelineOutput",
    "SamplingSteps",
    "TiedScheduler",
    "sample_grain_map",
]
