# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Which pipeline draws a checkpoint, and what records call the share of an image that got the most work."""

import os
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from diffusers_d2it import (
    D2iTImg2ImgPipeline,
    D2iTInpaintPipeline,
    D2iTPipeline,
    D2iTPipelineOutput,
    DCDiTPipeline,
    DCDiTPipelineOutput,
)
from diffusers_d2it.files.folders import read_json
from diffusers_d2it.files.source import check_source, pin
from diffusers_d2it.grains import fine_share
from diffusers_d2it.pipelines.index import INDEX
from diffusers_d2it.words import shown


Pipeline = D2iTPipeline | DCDiTPipeline

# By the class that an index names
PIPELINES = {one.__name__: D2iTPipeline for one in (D2iTPipeline, D2iTImg2ImgPipeline, D2iTInpaintPipeline)}
PIPELINES |= {DCDiTPipeline.__name__: DCDiTPipeline}
SHARES = {D2iTPipeline: "fine_share", DCDiTPipeline: "token_share"}


def find_checkpoint(checkpoint: str) -> tuple[type[Pipeline], str]:
    """The class of the pipeline that draws a checkpoint, and the folder where its files lie.

    Raises:
        ValueError: it is no folder or name on the Hub, or of another class.
        OSError: the Hub does not have it or cannot be reached.
    """
    check_source(checkpoint, None, None)
    is_folder = os.path.isdir(checkpoint)
    hub = {} if is_folder else pin(checkpoint, {})  # of one commit
    file = Path(checkpoint, INDEX) if is_folder else Path(hf_hub_download(checkpoint, INDEX, **hub))
    name = read_json(file).get("_class_name")
    if name not in list(PIPELINES):  # a list itself where code lies beside it
        raise ValueError(f"{file}: `_class_name` must be {' or '.join(PIPELINES)}, got {shown(name)}.")
    return PIPELINES[name], checkpoint if is_folder else PIPELINES[name].download(checkpoint, **hub)


def shares_of(output: D2iTPipelineOutput | DCDiTPipelineOutput, pipe: Pipeline) -> torch.Tensor:
    """The share of each image that got the most work, (B,): of its regions, or of its cells, mean of the steps."""
    if isinstance(output, D2iTPipelineOutput):
        return fine_share(output.grain_maps, pipe.transformer.config.num_grains)
    return output.token_counts.float().mean(dim=1) / output.boundary_maps[0].numel()
