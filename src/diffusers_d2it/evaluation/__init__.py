# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Figures of samples, reconstructions and grain maps, each with the protocol that it was measured by."""

from .evaluate import METRICS, Evaluator, compute_exactly, evaluate, open_reference, save_statistics
from .features import FeatureExtractor, ModuleFeatures, load_features, load_lpips, load_vision_model, vision_tokens
from .frechet import frechet_distance
from .images import ImageSet, open_images
from .reconstruction import (
    PAIR_METRICS,
    check_torchmetrics,
    evaluate_pairs,
    evaluate_reconstructions,
    reconstruction_scores,
)
from .results import Result, load_results, save_results
from .scores import inception_score, kernel_distance, precision_recall


__all__ = [
    "METRICS",
    "PAIR_METRICS",
    "Evaluator",
    "FeatureExtractor",
    "ImageSet",
    "ModuleFeatures",
    "Result",
    "check_torchmetrics",
    "compute_exactly",
    "evaluate",
    "evaluate_pairs",
    "evaluate_reconstructions",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_features",
    "load_lpips",
    "load_results",
    "load_vision_model",
    "open_images",
    "open_reference",
    "precision_recall",
    "reconstruction_scores",
    "save_results",
    "save_statistics",
    "vision_tokens",
]
