# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What surrounds a training loop: data, checkpoints, the point to resume from. Never a model call.

Everything random in training is a function of the seed and of a position: the order of the images of (seed, epoch),
the flip of an image of (seed, epoch, index), noise and timesteps of (seed, step, process). A run that was interrupted
therefore continues exactly, whatever the number of workers.

datasets is imported where it is used: the package itself does not need it.
"""

import argparse
import json
import os
import random
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .calibration import EntropyCalibration


# ---------------------------------------------------------------------------------------------------------------------
# Flags that the three scripts share
# ---------------------------------------------------------------------------------------------------------------------


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the images come from: shared by training and calibration."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="name on the Hub, or a local folder, that datasets.load_dataset reads")
    group.add_argument(
        "--train_data_dir", help="folder of images, class by sub-folder; without sub-folders no classes"
    )
    group.add_argument("--split", default="train", help="split of the data set")
    group.add_argument("--image_column", default="image", help="column that holds the images")
    group.add_argument(
        "--resolution", type=int, default=256, help="images are resized and centre-cropped to this side"
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that decode images")


def add_class_arguments(parser: argparse.ArgumentParser) -> None:
    """Class labels of the second stage."""
    group = parser.add_argument_group("classes")
    group.add_argument("--label_column", help="column of integer labels; without it the model is unconditional")
    group.add_argument("--num_classes", type=int, help="size of the label table; default: one more than the largest")
    group.add_argument("--id2label", help="JSON file {id: name}; default: the names that the data set declares")
    group.add_argument("--label_dropout", type=float, default=0.1, help="share of labels dropped, for guidance")


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
    group.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no", help="autocast")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--checkpointing_steps", type=int, default=1000, help="updates between two checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, help="keep only the newest ones")
    group.add_argument("--resume_from_checkpoint", help="path of a checkpoint, or 'latest'")
    group.add_argument("--validation_steps", type=int, default=1000, help="updates between two sample grids")
    group.add_argument("--report_to", default="tensorboard", help="tracker known to accelerate, or 'none'")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The Accelerator of the training flags, with an order of the data that can be resumed."""
    return Accelerator(
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
    )


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def load_images(args: argparse.Namespace, streaming: bool = False):
    """The data set of the flags of `add_data_arguments`.

    Raises:
        ValueError: not exactly one source is named, or the data set lacks the column.
    """
    import datasets

    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("pass either --dataset_name or --train_data_dir.")
    if args.train_data_dir is not None:
        dataset = datasets.load_dataset(
            "imagefolder", data_dir=args.train_data_dir, split=args.split, streaming=streaming
        )
    else:
        dataset = datasets.load_dataset(args.dataset_name, split=args.split, streaming=streaming)
    if args.image_column not in (dataset.column_names or [args.image_column]):  # a stream may not know its columns
        raise ValueError(f"--image_column {args.image_column!r} is not among the columns {dataset.column_names}.")
    return dataset


def read_classes(images, args: argparse.Namespace) -> tuple[dict[int, str] | None, int | None]:
    """Names of the classes that occur, by id, and the size of the label table; (None, None) without labels.

    Raises:
        ValueError: a label is negative or beyond --num_classes, or has no name in --id2label.
    """
    if args.label_column is None:
        return None, None
    if args.label_column not in images.column_names:
        raise ValueError(f"--label_column {args.label_column!r} is not among the columns {images.column_names}.")
    labels = sorted(set(images[args.label_column]))
    num_classes = labels[-1] + 1 if args.num_classes is None else args.num_classes
    if labels[0] < 0 or labels[-1] >= num_classes:
        raise ValueError(
            f"column {args.label_column!r} holds labels from {labels[0]} to {labels[-1]}, --num_classes {num_classes}"
            f" allows 0 to {num_classes - 1}."
        )
    if args.id2label is not None:
        names = {int(key): name for key, name in json.loads(Path(args.id2label).read_text(encoding="utf-8")).items()}
    elif hasattr(images.features[args.label_column], "names"):
        names = dict(enumerate(images.features[args.label_column].names))
    else:
        names = {label: str(label) for label in labels}
    unnamed = [label for label in labels if label not in names]
    if unnamed:
        raise ValueError(f"--id2label {args.id2label} has no name for labels {unnamed}.")
    return {label: names[label] for label in labels}, num_classes


def drop_labels(
    class_labels: torch.Tensor, num_classes: int | None, share: float, generator: torch.Generator
) -> torch.Tensor | None:
    """Replace a random share of the labels by "no class", index `num_classes`; None for an unconditional model."""
    if num_classes is None:
        return None
    dropped = torch.rand(class_labels.shape, generator=generator, device=class_labels.device) < share
    return class_labels.masked_fill(dropped, num_classes)


def to_pixels(image: PIL.Image.Image, resolution: int, flip: bool = False) -> torch.Tensor:
    """Resize the shorter side, crop the centre, and scale to [-1, 1]: (3, resolution, resolution), float32."""
    image = image.convert("RGB")
    if image.size != (resolution, resolution):
        image = PIL.ImageOps.fit(image, (resolution, resolution), PIL.Image.Resampling.BICUBIC)
    if flip:
        image = PIL.ImageOps.mirror(image)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def describe_source(args: argparse.Namespace) -> str:
    """The images of the data flags in words, for configurations and model cards."""
    name = args.dataset_name or args.train_data_dir
    return f"{os.path.basename(os.path.normpath(name))}, split {args.split}, {args.resolution}x{args.resolution}"


def count_entropy(
    accelerator: Accelerator, images, args: argparse.Namespace, region_size: int, max_images: int | None = None
) -> EntropyCalibration:
    """Distribution of the region entropy of a data set, streamed or not, each process counting its share.

    Args:
        accelerator: joins the counts of its processes.
        images: from `load_images`.
        args: the data flags.
        region_size: S in pixels.
        max_images: stop after so many images over all processes; None for all.
    """
    from datasets.distributed import split_dataset_by_node

    calibration = EntropyCalibration(region_size)
    share = split_dataset_by_node(images, accelerator.process_index, accelerator.num_processes)
    if max_images is not None:
        share = islice(share, -(-(max_images - accelerator.process_index) // accelerator.num_processes))
    for row in tqdm(share, desc="entropy", disable=not accelerator.is_main_process):
        calibration.update(to_pixels(row[args.image_column], args.resolution)[None])
    counted = torch.cat([calibration.counts, torch.tensor([calibration.num_images])]).to(accelerator.device)
    counted = accelerator.reduce(counted, "sum").cpu()
    total = EntropyCalibration(region_size)
    total.merge(counted[:-1], int(counted[-1]))
    return total


class ImageDataset(Dataset):
    """Images and labels of a map-style `datasets.Dataset`, randomly flipped.

    Items are {"pixels": (3, R, R) in [-1, 1], "class_labels": int64 scalar}; the label is 0 without a label column.

    Args:
        images: the data set.
        resolution: R.
        image_column: column of the images.
        label_column: column of the integer labels, or None.
        seed: with the epoch and the index it decides every flip.
    """

    def __init__(self, images, resolution: int, image_column: str, label_column: str | None, seed: int):
        if label_column is not None and label_column not in images.column_names:
            raise ValueError(f"--label_column {label_column!r} is not among the columns {images.column_names}.")
        self.images = images
        self.resolution = resolution
        self.image_column = image_column
        self.label_column = label_column
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other flips; accelerate's loaders call this at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.images[index]
        flip = random.Random(f"{self.seed}/{self.epoch}/{index}").random() < 0.5
        return {
            "pixels": to_pixels(row[self.image_column], self.resolution, flip),
            "class_labels": torch.tensor(0 if self.label_column is None else row[self.label_column]),
        }


def make_loader(accelerator: Accelerator, dataset: ImageDataset, args: argparse.Namespace) -> DataLoader:
    """Shuffled batches; the incomplete last batch of an epoch is left out.

    Raises:
        ValueError: the data set does not fill one batch of every process.
    """
    if len(dataset) < args.train_batch_size * accelerator.num_processes:
        raise ValueError(
            f"--train_batch_size {args.train_batch_size} on {accelerator.num_processes} processes needs more than the"
            f" {len(dataset)} images of the data set."
        )
    return DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
    )


def batches_from(accelerator: Accelerator, loader: DataLoader, first_batch: int) -> Iterator[dict]:
    """Batches without end, starting at batch number `first_batch` of the whole run."""
    epoch, position = divmod(first_batch, len(loader))
    while True:
        loader.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)  # with several processes accelerate tells the sampler only
        rest = accelerator.skip_first_batches(loader, position) if position else loader
        rest.set_epoch(epoch)
        yield from rest
        epoch, position = epoch + 1, 0


def step_generator(accelerator: Accelerator, seed: int, batch_index: int) -> torch.Generator:
    """The generator of everything random in one batch of one process."""
    entropy = np.random.SeedSequence((seed, batch_index, accelerator.process_index)).generate_state(1, np.uint64)
    return torch.Generator(accelerator.device).manual_seed(int(entropy[0] >> 1))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """Saves and restores a run: weights, EMA, optimizer, schedule, in `output_dir/checkpoint-<step>`.

    A checkpoint is written aside and renamed, so a folder of that name is whole.

    Args:
        accelerator: the Accelerator, after `prepare`.
        output_dir: folder of the run.
        model: the trained model, unwrapped; saved as a diffusers folder `model`, so each checkpoint can be loaded.
        ema: its moving average; saved as `model_ema`.
        total_limit: keep only so many; None for all.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: str, model, ema: EMAModel, total_limit: int | None = None
    ):
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.model = model
        self.ema = ema
        self.total_limit = total_limit
        accelerator.register_save_state_pre_hook(self._save_models)
        accelerator.register_load_state_pre_hook(self._load_models)

    def _save_models(self, models, weights, folder: str) -> None:
        if self.accelerator.is_main_process:
            self.model.save_pretrained(os.path.join(folder, "model"))
            self.ema.save_pretrained(os.path.join(folder, "model_ema"))
        weights.clear()  # saved above, in a format that from_pretrained reads

    def _load_models(self, models, folder: str) -> None:
        loaded = type(self.model).from_pretrained(os.path.join(folder, "model"))
        found, expected = (json.loads(model.to_json_string()) for model in (loaded, self.model))  # no tuples in JSON
        changed = {
            key: (found.get(key), value)
            for key, value in expected.items()
            if found.get(key) != value and not key.startswith("_")
        }
        if changed:
            raise ValueError(f"checkpoint {folder} holds another model; (found, expected) differ in {changed}.")
        self.model.load_state_dict(loaded.state_dict())
        self.ema.load_state_dict(
            EMAModel.from_pretrained(os.path.join(folder, "model_ema"), type(self.model)).state_dict()
        )
        self.ema.to(self.accelerator.device)
        models.clear()

    def found(self) -> list[tuple[int, Path]]:
        """Step and path of every checkpoint, oldest first."""
        matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in self.output_dir.glob("checkpoint-*"))
        return sorted((int(match[1]), path) for match, path in matches if match)

    def save(self, step: int) -> None:
        """Write `checkpoint-<step>` and drop the oldest ones over the limit."""
        final = self.output_dir / f"checkpoint-{step}"
        staging = self.output_dir / f".staging-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(staging), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _replace_folder(staging, final)
            if self.total_limit is not None:
                for _, path in self.found()[: -self.total_limit]:
                    shutil.rmtree(path)

    def resume(self, resume_from: str | None) -> int:
        """Load a checkpoint and return its step; 0 without one.

        Args:
            resume_from: a path, "latest", or None.

        Raises:
            ValueError: the path is no checkpoint, `latest` finds none, the checkpoint holds another model, or the
                output folder already holds checkpoints that the run was not asked to resume.
        """
        found = self.found()
        if resume_from is None:
            if found:
                raise ValueError(
                    f"--output_dir {self.output_dir} already holds {found[-1][1].name}: pass --resume_from_checkpoint"
                    " latest to continue it, or another folder."
                )
            return 0
        if resume_from == "latest":
            if not found:
                raise ValueError(f"--resume_from_checkpoint latest: no checkpoint in {self.output_dir}.")
            path = found[-1][1]
        else:
            path = Path(resume_from)
        match = _CHECKPOINT.fullmatch(path.name)
        if match is None or not path.is_dir():
            raise ValueError(f"--resume_from_checkpoint {path} is not a folder named checkpoint-<step>.")
        self.accelerator.load_state(str(path))
        return int(match[1])


def save_aside(save: Callable[[str], None], folder: str | Path) -> None:
    """Call `save(path)` with a path beside `folder` and put the result in its place once it is complete."""
    folder = Path(folder)
    staging = folder.parent / f".staging-{folder.name}-{uuid.uuid4().hex[:8]}"
    save(str(staging))
    _replace_folder(staging, folder)


def _replace_folder(staging: Path, final: Path) -> None:
    if final.exists():
        old = final.parent / f".old-{final.name}-{uuid.uuid4().hex[:8]}"
        final.rename(old)
        staging.rename(final)
        shutil.rmtree(old)
    else:
        final.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(final)


def psnr(pixels: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1], a value per image: (B,)."""
    mse = (pixels.float() - reconstruction.float().clamp(-1, 1)).pow(2).mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse)


@contextmanager
def use_ema(ema: EMAModel, model: torch.nn.Module) -> Iterator[None]:
    """Run a block with the averaged weights in the model, and the trained ones back afterwards."""
    training = model.training
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        ema.restore(model.parameters())
        model.train(training)
