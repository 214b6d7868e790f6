# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Flags that the training scripts share, and the Accelerator they ask for."""

import argparse
import os
from datetime import timedelta

from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
)

from ..files import lock
from ..optional import import_optional
from .gate import GatedAccelerator
from .output_folder import check_output_dir


def make_accelerator(args: argparse.Namespace) -> GatedAccelerator:
    """Check the training flags, take the output folder and make the Accelerator of the run.

    Raises:
        ValueError: as `check_training_arguments`, or another run is working in the output folder.
    """
    check_training_arguments(args)
    accelerator = GatedAccelerator(
        max_skipped_steps=args.skip_nonfinite_steps,
        # An update always takes as many batches, also across the end of an epoch: `resume` counts on it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")),
        # Without the seedable sampler a resumed epoch sees its images in another order.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        step_scheduler_with_optimizer=False,
        # The others wait while the main process draws samples, and at the end of stage 1 measures many images.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
    )
    accelerator.wait_for_everyone()  # only now may a process write into the output folder that another one checks
    if accelerator.is_main_process:
        accelerator.output_lock = lock(args.output_dir)  # until the process ends
    accelerator.wait_for_everyone()
    return accelerator


def check_training_arguments(args: argparse.Namespace) -> None:
    """Check what can be checked before anything is loaded.

    Raises:
        ValueError: --fine_ratio is no share or range of shares, a number is too small, --output_dir holds something
            that the run is not asked to continue, or the package of --report_to is missing
            or broken.
    """
    ratios = args.fine_ratio
    if ratios is not None and (
        len(ratios) > 2 or not all(0 <= ratio <= 1 for ratio in ratios) or ratios != sorted(ratios)
    ):
        raise ValueError(f"--fine_ratio must be one share in [0, 1], or two in ascending order, got {ratios}.")
    for name, least in (("skip_nonfinite_steps", 0), ("overfit_batches", 1), ("checkpoints_total_limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
    check_output_dir(args)
    if args.report_to == "tensorboard":
        import_optional("torch.utils.tensorboard", "--report_to tensorboard", extra="training", package="tensorboard")
    elif args.report_to in LoggerType.list() and args.report_to != "all":
        import_optional(args.report_to, f"--report_to {args.report_to}")
