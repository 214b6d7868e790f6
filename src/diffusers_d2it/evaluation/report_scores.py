# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Scores of the sets of images that a report compares."""

from dataclasses import asdict

import torch

from .evaluate import Evaluator
from .images import ImageSet


def score(images: torch.Tensor, protocol: dict, evaluator: Evaluator) -> list[dict]:
    """The results of images (N, 3, H, W) uint8, as dictionaries: {"metric", "value", "protocol", "deviation"}.

    Args:
        images: in memory.
        protocol: what the protocols of the results say of them; "name" is that of the set.
        evaluator: knows the metrics and the reference.
    """
    return [asdict(result) for result in evaluator(ImageSet.from_tensor(images, protocol["name"], protocol))]
