# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What several of these files measure: photographs, their maps, and features of a small network."""

import pytest
import torch
from metric_inputs import small_network
from photographs import load_photographs

from diffusers_d2it.evaluation import ModuleFeatures
from diffusers_d2it.pixels import to_uint8


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Eight photographs, uint8 (8, 3, 32, 32)."""
    return to_uint8(load_photographs(32))


@pytest.fixture(scope="module")
def true_maps(drawing, images) -> torch.Tensor:
    return drawing.true_maps(images)


@pytest.fixture(scope="module")
def features() -> ModuleFeatures:
    return ModuleFeatures(small_network(), "small")
