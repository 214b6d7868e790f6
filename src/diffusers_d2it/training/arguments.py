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

from ..broken_packages import import_optional
from ..files import lock
from .gate import GatedAccelerator
from .output_folder import check_output_dir


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that also reads flags from files: `train_d2it.py @examples/configs/imagenet-256/content-xl.txt`.

    A line of such a file is one word of the command; flags behind the file override it.
    """
    return argparse.ArgumentParser(
        description=description,
        epilog="A word @file reads flags from a file, one word a line: see examples/configs.",
        formatter_class=_HelpFormatter,
        fromfile_prefix_chars="@",
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False):
            return action.help  # the text says what happens without the flag
        return super()._get_help_string(action)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Optimisation, checkpoints and logging."""
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", required=True, help="checkpoints, samples, logs and the final model go here")
    group.add_argument("--seed", type=int, default=0, help="fixes initialisation, order, flips and noise")
    group.add_argument("--train_batch_size", type=int, default=32, help="images per process and forward pass")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forward passes per update")
    group.add_argument("--max_train_steps", type=int, required=True, help="updates of the weights in total")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="AdamW (sec. 4.1: 1e-4 at batch 256)")
    group.add_argument("--weight_decay", type=float, default=0.0, help="AdamW")
    group.add_argument("--lr_scheduler", default="constant_with_warmup", help="a schedule of diffusers.optimization")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="updates until the learning rate is reached")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    group.add_argument("--ema_decay", type=float, default=0.9999, help="decay of the weights' average (sec. 4.1)")
    group.add_argument(
        "--fine_ratio",
        type=float,
        nargs="+",
        metavar="RATIO",
        help="share of fine regions: one number, or two between which every batch draws its own",
    )
    group.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no", help="autocast")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--checkpointing_steps", type=int, default=1000, help="updates between two checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, help="keep only the newest ones")
    group.add_argument("--resume_from_checkpoint", help="path of a checkpoint, or 'latest'")
    group.add_argument("--validation_steps", type=int, default=1000, help="updates between two sample grids")
    group.add_argument(
        "--skip_nonfinite_steps",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N updates whose loss or gradient is not finite; with the next one the run stops",
    )
    group.add_argument(
        "--overfit_batches", type=int, metavar="N", help="smoke test: train on the first N batches, the loss must fall"
    )
    group.add_argument("--report_to", default="tensorboard", help="tracker known to accelerate, or 'none'")


def add_second_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """What the grain model and the content model have in common, and the autoencoder has not."""
    group = parser.add_argument_group("second stage")
    group.add_argument("--vae", required=True, help="folder or Hub name of a DynamicAutoencoderKL from train_dvae.py")
    group.add_argument("--latent_cache", help="folder written by cache_latents.py, instead of images")
    group.add_argument("--label_dropout", type=float, default=0.1, help="share of labels dropped, for guidance")
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")


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
