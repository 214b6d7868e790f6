# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Flags that the scripts of this folder share. Their names are those of the arguments that the library takes."""

import argparse
import os
import shlex
import sys
from typing import Any

from command_line import make_parser, natural, number, positive, share, weight


# What a cache was written with: flags about images and classes do not go with one.
_OF_IMAGES = (
    "train_data_dir dataset_name dataset_config_name split streaming image_column label_column num_classes id2label"
    " unconditional".split()
)
# What flags can be, as the library lists it: to ask it would import torch
SAMPLERS = ("dpmsolver++", "unipc")
OBJECTIVES = ("epsilon", "v_prediction", "flow_matching")
METRICS = ("fid", "sfid", "is", "precision", "recall", "kid", "top1")
PAIR_METRICS = ("psnr", "ssim", "lpips", "rfid", "top1")
SCHEDULES = ("constant_with_warmup", "constant", "cosine", "cosine_with_restarts", "linear", "polynomial")
# KID wants a subset size, and more images than a row of a report has
REPORT_METRICS = ("fid", "sfid", "is", "precision", "recall")


def training_parser(description: str) -> argparse.ArgumentParser:
    """The flags of stage 1 that it shares with the others."""
    parser = make_parser(description)
    add_data_arguments(parser)
    add_class_arguments(parser)
    add_training_arguments(parser)
    add_hub_arguments(parser)
    return parser


def second_stage_parser(description: str, with_grains: bool = True) -> argparse.ArgumentParser:
    """The flags that the scripts of the second stage share; `check_second_stage` belongs to them."""
    parser = make_parser(description)
    add_data_arguments(parser, required=False)  # or --latent_cache
    group = parser.add_argument_group("second stage")
    kinds = "a DynamicAutoencoderKL from train_dvae.py" + ("" if with_grains else ", or of an AutoencoderKL")
    group.add_argument("--vae", required=True, help=f"folder or Hub name of {kinds}")
    group.add_argument("--latent_cache", help="folder written by cache_latents.py, instead of images")
    group.add_argument("--label_dropout", type=share, default=0.1, help="share of labels dropped, for guidance")
    add_class_arguments(parser)
    add_training_arguments(parser, with_grains)
    add_hub_arguments(parser)
    return parser


class _FineRatio(argparse.Action):
    def __call__(self, parser, namespace, ratios, option_string=None) -> None:
        if len(ratios) > 2 or not all(0 <= ratio <= 1 for ratio in ratios) or ratios != sorted(ratios):
            raise argparse.ArgumentError(self, f"must be one share in [0, 1], or two in ascending order, got {ratios}")
        setattr(namespace, self.dest, ratios)


def add_data_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Where the images come from: one of two flags, which is required unless something else can take their place."""
    group = parser.add_argument_group("data")
    path = group.add_mutually_exclusive_group(required=required)
    path.add_argument("--dataset_name", help="name on the Hub, or a local folder as in --train_data_dir")
    path.add_argument(
        "--train_data_dir",
        help="folder of images, class by sub-folder, without sub-folders no classes; or of .parquet or WebDataset .tar"
        " files; or one such file",
    )
    group.add_argument("--dataset_config_name", help="configuration of a data set on the Hub that has several")
    group.add_argument(
        "--split",
        help="of a data set, or of a folder with sub-folders train, val, ...; default: train, or the only one",
    )
    group.add_argument("--streaming", action="store_true", help="read the data set as a stream, without a local copy")
    group.add_argument("--image_column", help="column that holds the images; default: the only one that does")
    group.add_argument(
        "--resolution", type=positive, default=256, help="images are resized and centre-cropped to this side"
    )
    group.add_argument("--dataloader_num_workers", type=natural, default=0, help="processes that decode images")


def add_class_arguments(parser: argparse.ArgumentParser) -> None:
    """Class labels: every stage reads them, so that what one finds unclear is said by the first."""
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--label_column",
        help="column of labels, or json.<name>, or class_folder for sub-folders; default: label, cls, class, ...",
    )
    group.add_argument("--unconditional", action="store_true", help="ignore labels and class sub-folders")
    group.add_argument(
        "--num_classes", type=positive, help="number of classes; default: one more than the largest label"
    )
    group.add_argument("--id2label", help="JSON file {id: name}; default: the names that the data set declares")


def add_training_arguments(parser: argparse.ArgumentParser, with_grains: bool = True) -> None:
    """Optimisation, checkpoints and logging; and the fine ratio, of a model `with_grains`."""
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", required=True, help="checkpoints, samples, logs and the final model go here")
    group.add_argument("--seed", type=natural, default=0, help="fixes initialisation, order, flips and noise")
    group.add_argument("--train_batch_size", type=positive, default=32, help="images per process and forward pass")
    group.add_argument("--gradient_accumulation_steps", type=positive, default=1, help="forward passes per update")
    group.add_argument("--max_train_steps", type=positive, required=True, help="updates of the weights in total")
    group.add_argument("--learning_rate", type=weight, default=1e-4, help="AdamW (sec. 4.1: 1e-4 at batch 256)")
    group.add_argument("--weight_decay", type=weight, default=0.0, help="AdamW")
    group.add_argument(
        "--lr_scheduler", choices=SCHEDULES, default=SCHEDULES[0], help="of the learning rate, as in diffusers"
    )
    group.add_argument("--lr_warmup_steps", type=natural, default=0, help="updates of warm-up")
    group.add_argument("--max_grad_norm", type=weight, default=1.0, help="gradients are clipped to this norm")
    group.add_argument("--ema_decay", type=share, default=0.9999, help="decay of the weights' average (sec. 4.1)")
    if with_grains:
        group.add_argument(
            "--fine_ratio",
            type=share,
            nargs="+",
            action=_FineRatio,
            metavar="RATIO",
            help="share of fine regions: one number, or two between which every batch draws its own",
        )
    group.add_argument(
        "--mixed_precision",
        choices=["no", "bf16", "fp16", "auto"],
        default="no",
        help="autocast; auto is bf16 where the processor has units for it (a GPU, a CPU with AMX), else no",
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--compile", action="store_true", help="torch.compile the blocks of the model")
    group.add_argument("--checkpointing_steps", type=positive, default=1000, help="updates between two checkpoints")
    group.add_argument("--checkpoints_total_limit", type=positive, help="keep only the newest ones")
    group.add_argument("--resume_from_checkpoint", help="path of a checkpoint, or 'latest'")
    group.add_argument("--validation_steps", type=positive, default=1000, help="updates between two sample grids")
    group.add_argument(
        "--skip_nonfinite_steps",
        type=natural,
        default=0,
        metavar="N",
        help="leave out up to N updates whose loss or gradient is not finite; with the next one the run stops",
    )
    group.add_argument(
        "--overfit_batches",
        type=positive,
        metavar="N",
        help="smoke test: train on the first N batches, the loss must fall",
    )
    group.add_argument("--report_to", default="tensorboard", help="tracker known to accelerate, or 'none'")


def add_denoiser_arguments(parser: argparse.ArgumentParser) -> None:
    """What the content model and DC-DiT have in common, each with a pipeline; `check_second_stage` belongs to it."""
    group = parser.add_argument_group("denoising")
    group.add_argument("--objective", choices=OBJECTIVES, default="epsilon", help="what is predicted")
    group.add_argument("--learn_sigma", action="store_true", help="predict the variance too, trained by the VLB")
    group.add_argument("--snr_gamma", type=weight, help="min-SNR weighting of the timesteps; 5 is usual")
    group.add_argument(
        "--hub_remote_code",
        action="store_true",
        help="with --push_to_hub: also push code, to a branch that loads without this package",
    )
    group = parser.add_argument_group("representation alignment (REPA)")
    group.add_argument(
        "--alignment",
        help="network to align with: facebook/dinov2-base or another vision transformer, or efficientnet-lite0",
    )
    group.add_argument("--alignment_layer", type=positive, help="block that is aligned; default: a third of the way")
    group.add_argument("--alignment_weight", type=weight, default=0.5, help="weight of the alignment loss")


def check_second_stage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the script unless there is either a cache or images, and no flag about the images that a cache holds."""
    given = [flag for flag in _OF_IMAGES if getattr(args, flag)]
    if args.latent_cache is not None and given:
        parser.error(f"--latent_cache holds images and labels already: it does not go with --{given[0]}")
    if args.latent_cache is None and args.train_data_dir is None and args.dataset_name is None:
        parser.error("pass --latent_cache, --train_data_dir or --dataset_name")
    if getattr(args, "alignment", None) is not None and args.latent_cache is not None:
        parser.error("--alignment needs the images: pass --train_data_dir or --dataset_name, not --latent_cache")


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a training script about the Hub and its model card."""
    group = parser.add_argument_group("Hub")
    group.add_argument("--push_to_hub", action="store_true", help="push the result to the Hub at the end")
    group.add_argument("--hub_model_id", help="user/name of its repository, also named in the model card")
    group.add_argument(
        "--hub_private_repo",
        action="store_true",
        default=None,  # None leaves the visibility to the account's default
        help="make the repository private if it is new",
    )
    group.add_argument(
        "--license", help="licence of the weights, by its Hub identifier (apache-2.0); default: the card says none"
    )


def add_report_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Checkpoint, or several, data, features and sampling: shared by the reports on checkpoints."""
    group = parser.add_argument_group("checkpoint")
    what = "folders or Hub names of pipelines" if several else "folder or Hub name of a pipeline"
    group.add_argument("--checkpoint", nargs="+" if several else 1, help=f"{what}; default: the bundled one")
    add_data_arguments(parser)
    add_class_arguments(parser)
    parser.set_defaults(resolution=None)  # that of the checkpoint
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--features",
        default="inception",
        help="in which images are compared: inception, a vision transformer of transformers such as"
        " facebook/dinov2-large, or package.module:callable that returns an nn.Module",
    )
    group.add_argument("--weights", help="with --features inception: file of its weights")
    group.add_argument("--metrics", nargs="+", choices=REPORT_METRICS, default=["fid"], help="as of evaluate.py")
    group.add_argument(
        "--num_images",
        type=positive,
        help="samples of a row, and real images for their maps; default: 1000, or what is there",
    )
    group.add_argument(
        "--num_reference_images",
        type=number(int, 2),
        help="other real images, which samples are compared with; default: 5000, or what is there",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--scheduler", choices=SAMPLERS, help="a fast sampler; default: that of the checkpoint")
    group.add_argument("--num_inference_steps", type=positive, default=20, help="denoising steps")
    group.add_argument("--guidance_scale", type=weight, default=1.0, help="classifier-free guidance; 1 is without")
    group.add_argument("--grain_num_inference_steps", type=positive, default=10, help="steps of the grain model")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the models")
    group.add_argument("--batch_size", type=positive, default=32, help="images of a process in a forward pass")
    group.add_argument("--seed", type=natural, default=0, help="fixes which images are taken, and all noise")


def image_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What `load_images` is given: of the data flags, and of the class flags where a script has them.

    Raises:
        ValueError: --train_data_dir does not exist.
    """
    if args.train_data_dir is not None and not os.path.exists(args.train_data_dir):
        raise ValueError(f"--train_data_dir {args.train_data_dir} does not exist.")
    arguments = {
        "path": args.train_data_dir or args.dataset_name,
        "split": args.split,
        "config_name": args.dataset_config_name,
        "streaming": args.streaming,
        "image_column": args.image_column,
        "labelled": "label_column" in args and not args.unconditional,
    }
    return arguments | {name: getattr(args, name, None) for name in ("label_column", "num_classes", "id2label")}


def where(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that say what the images and classes are, for `next_command`; a cache is made of no stream."""
    return {name: getattr(args, name, None) for name in _OF_IMAGES if name != "streaming"}


def hub_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What `check_push` and `publish` are given of the flags of `add_hub_arguments`."""
    names = ("push_to_hub", "hub_model_id", "hub_private_repo", "license", "hub_remote_code")
    return {name: getattr(args, name) for name in names if name in args}  # code is of pipelines only


def run_arguments(args: argparse.Namespace, num_processes: int) -> dict[str, Any]:
    """What `publish` is told of a run: its data set, its command, its updates and the images of one."""
    # Options of a launcher beyond the number of processes are not known here
    launcher = ["python"] if num_processes == 1 else ["accelerate", "launch", "--num_processes", str(num_processes)]
    return {
        "dataset_name": args.dataset_name,
        "commands": [shlex.join([*launcher, *sys.argv])],
        "train_steps": args.max_train_steps,
        "train_batch_size": args.train_batch_size * args.gradient_accumulation_steps * num_processes,
    }
