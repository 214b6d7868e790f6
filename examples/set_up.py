# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts make of the flags that they share."""

import argparse
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from diffusers_d2it import DynamicAutoencoderKL, load_preset
from diffusers_d2it.data import (
    BadImages,
    ImageDataset,
    ImageStream,
    LatentCache,
    OrderedLoader,
    StreamLoader,
    load_images,
    make_dataset,
    make_loader,
)
from diffusers_d2it.hub import check_push, publish
from diffusers_d2it.training import Checkpoints, FiniteGate, Run, make_accelerator
from diffusers_d2it.words import counted, differences
from flags import hub_arguments, image_arguments, run_arguments


# Flags that may change when a run is continued: where things lie, how long and how often, what changes no weight.
# Of a preset the configuration counts, which `Checkpoints` compares: its file may be named from elsewhere.
_FREE = frozenset(
    "output_dir resume_from_checkpoint max_train_steps checkpointing_steps checkpoints_total_limit validation_steps"
    " report_to dataloader_num_workers train_batch_size gradient_accumulation_steps gradient_checkpointing compile"
    " push_to_hub hub_model_id hub_private_repo"
    " hub_remote_code license train_data_dir latent_cache vae grain preset init_from distill_from alignment"
    " calibration_images fid_model skip_nonfinite_steps".split()
)


def second_stage_data(
    args: argparse.Namespace,
    accelerator: Accelerator,
    vae: DynamicAutoencoderKL | AutoencoderKL,
    bad_images: BadImages,
    moments: bool = True,
) -> LatentCache | ImageDataset | ImageStream:
    """The latent cache or the images of the flags, for `make_loader`; prints what was found.

    With `moments=False` entropy and labels of a cache alone are read: the grain model needs no more.
    """
    if args.latent_cache is None:
        source = load_images(**image_arguments(args))
        accelerator.print(source)
        return make_dataset(accelerator, source, resolution=args.resolution, seed=args.seed, bad_images=bad_images)
    cache = LatentCache(
        args.latent_cache,
        vae,
        seed=args.seed,
        resolution=args.resolution,
        moments=moments,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    classes = "no classes" if cache.id2label is None else counted(len(cache.id2label), "class")
    accelerator.print(f"latent cache of {cache.description}: {counted(len(cache), 'image')}, {classes}")
    return cache


def load_start(args: argparse.Namespace, cls: type[ModelMixin], part: str) -> dict | ModelMixin:
    """What the flags start from: the configuration of --preset, or the model of --init_from, perhaps in a pipeline."""
    if args.init_from is None:
        return load_preset(args.preset, cls)
    subfolder = part if os.path.isdir(os.path.join(args.init_from, part)) else None
    return cls.from_pretrained(args.init_from, subfolder=subfolder)


def make_model(
    cls: type[ModelMixin], begun: dict | ModelMixin, sizes: dict[str, Any], other_classes: bool
) -> ModelMixin:
    """A model for the data, new or `begun` as --init_from has it.

    Args:
        cls: the model's class.
        begun: of `load_start`.
        sizes: keys of the configuration that the data decide; positions are computed for any `sample_size`.
        other_classes: whether a model with classes may begin others.

    Raises:
        ValueError: the model of --init_from has other sizes.
    """
    if isinstance(begun, dict):
        return cls(**(begun | sizes))
    found = {key: vars(begun).get(key, begun.config[key]) for key in sizes}  # what None stands for is an attribute
    found["sample_size"] = None
    if other_classes and None not in (found["num_classes"], sizes["num_classes"]):
        found["num_classes"] = sizes["num_classes"]
    if changed := differences(found, sizes | {"sample_size": None}):
        raise ValueError(f"--init_from does not fit the data: {'; '.join(changed)}.")
    begun.register_to_config(sample_size=sizes["sample_size"])
    if begun.config.num_classes != sizes["num_classes"]:
        begun.start_new_classes(sizes["num_classes"])
    return begun


def loader_of(args: argparse.Namespace, accelerator: Accelerator, data: Dataset) -> OrderedLoader | StreamLoader:
    """Shuffled batches of a data set."""
    return make_loader(accelerator, data, batch_size=args.train_batch_size, num_workers=args.dataloader_num_workers)


def start(args: argparse.Namespace) -> Accelerator:
    """Take the output folder, check what can be checked before anything is loaded, and seed the process."""
    accelerator = make_accelerator(
        args.output_dir,
        resume_from_checkpoint=args.resume_from_checkpoint,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        report_to=args.report_to,
    )
    args.mixed_precision = accelerator.mixed_precision  # not "auto": a resumed run must find the same
    if accelerator.is_main_process:
        check_push(**hub_arguments(args))
    set_seed(args.seed)
    return accelerator


def schedule_of(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The schedule of the learning rate."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def lasting(args: argparse.Namespace, num_processes: int) -> dict[str, Any]:
    """The flags that must be the same when a run is resumed, and the batch of an update."""
    flags = {name: value for name, value in vars(args).items() if name not in _FREE}
    flags["batch"] = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    if args.streaming:  # its order depends on who reads which part
        names = ("dataloader_num_workers", "train_batch_size", "gradient_accumulation_steps")
        flags |= {name: getattr(args, name) for name in names} | {"num_processes": num_processes}
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):  # the others end where the run ends
        flags["max_train_steps"] = args.max_train_steps
    return flags


def checkpoints_of(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: ModelMixin,
    ema: EMAModel,
    optimizers: dict[str, torch.optim.Optimizer],
    lr_scheduler: LRScheduler,
    gate: FiniteGate,
    identity: dict[str, Any],
    others: dict[str, torch.nn.Module] | None = None,
) -> Checkpoints:
    """The checkpoints of a run, which must find the flags and `identity` again when it is resumed."""
    return Checkpoints(
        accelerator,
        args.output_dir,
        model,
        ema,
        optimizers,
        lr_scheduler,
        gate,
        others=others,
        flags=lasting(args, accelerator.num_processes) | identity,
        total_limit=args.checkpoints_total_limit,
    )


def run_of(args: argparse.Namespace, accelerator: Accelerator, step: int) -> Run:
    """The training from update number `step` on."""
    return Run(
        accelerator,
        step,
        seed=args.seed,
        train_batch_size=args.train_batch_size,
        max_train_steps=args.max_train_steps,
        checkpointing_steps=args.checkpointing_steps,
        validation_steps=args.validation_steps,
        overfit_batches=args.overfit_batches,
    )


def publish_result(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe_or_model: DiffusionPipeline | torch.nn.Module,
    folder: str,
    **about: Any,
) -> None:
    """Write the card of what was trained into its folder, and push it if the flags say so; `about` is of `publish`."""
    flags = hub_arguments(args) | run_arguments(args, accelerator.num_processes)
    publish(pipe_or_model, folder, **flags, **about)
