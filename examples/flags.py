# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Flags that the scripts of this folder share. Their names are those of the arguments that the library takes."""

import argparse


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


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the images come from: shared by training and calibration."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="name on the Hub, or a local folder as in --train_data_dir")
    group.add_argument("--dataset_config_name", help="configuration of a data set on the Hub that has several")
    group.add_argument(
        "--train_data_dir",
        help="folder of images, class by sub-folder, without sub-folders no classes; or of .parquet or WebDataset .tar"
        " files; or one such file",
    )
    group.add_argument("--split", default="train", help="split of the data set; a folder of images has none")
    group.add_argument("--streaming", action="store_true", help="read the data set as a stream, without a local copy")
    group.add_argument("--image_column", help="column that holds the images; default: the only one that does")
    group.add_argument(
        "--resolution", type=int, default=256, help="images are resized and centre-cropped to this side"
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that decode images")


def add_class_arguments(parser: argparse.ArgumentParser) -> None:
    """Class labels of the second stage."""
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--label_column", help="column of labels, or json.<name>; default: label or cls if there is one"
    )
    group.add_argument("--unconditional", action="store_true", help="ignore labels and class sub-folders")
    group.add_argument("--num_classes", type=int, help="size of the label table; default: one more than the largest")
    group.add_argument("--id2label", help="JSON file {id: name}; default: the names that the data set declares")


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
