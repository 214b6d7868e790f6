# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Metrics of samples, reconstructions and grain maps, each with the protocol that it was measured by."""

from .cost import ForwardMeter
from .evaluate import (
    METRIC_MINIMUM,
    METRICS,
    Evaluator,
    compute_exactly,
    evaluate,
    open_reference,
    save_statistics,
)
from .features import FeatureExtractor, ModuleFeatures, load_features, weights_digest
from .grain_maps import denoising_error_by_grain, grain_diagnostics, map_accuracy, spatial_autocorrelation
from .images import ImageSet, open_images
from .reconstruction import (
    PAIR_METRICS,
    check_torchmetrics,
    evaluate_pairs,
    evaluate_reconstructions,
    reconstruct,
    reconstruction_scores,
)
from .reports import MAP_SOURCES, Drawing, Row, compare
from .results import Result, load_results, save_report, save_results
from .scores import frechet_distance, inception_score, kernel_distance, precision_recall
from .vision_networks import VisionNetwork, load_lpips, load_vision_network


__all__ = [
    "MAP_SOURCES",
    "METRICS",
    "METRIC_MINIMUM",
    "PAIR_METRICS",
    "Drawing",
    "Evaluator",
    "ForwardMeter",
    "FeatureExtractor",
    "ImageSet",
    "ModuleFeatures",
    "Result",
    "Row",
    "VisionNetwork",
    "check_torchmetrics",
    "compare",
    "compute_exactly",
    "denoising_error_by_grain",
    "evaluate",
    "evaluate_pairs",
    "evaluate_reconstructions",
    "frechet_distance",
    "grain_diagnostics",
    "inception_score",
    "kernel_distance",
    "load_features",
    "load_lpips",
    "load_results",
    "load_vision_network",
    "map_accuracy",
    "open_images",
    "open_reference",
    "precision_recall",
    "reconstruct",
    "reconstruction_scores",
    "save_report",
    "save_results",
    "save_statistics",
    "spatial_autocorrelation",
    "weights_digest",
]
