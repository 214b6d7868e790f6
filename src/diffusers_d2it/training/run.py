# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What stands around the steps of a training: folder and Accelerator, batches, log, and what is due when."""

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
)
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.bad_images import BAD_IMAGES
from ..data.loaders import OrderedLoader, StreamLoader, batches_from
from ..draws import generators_of
from ..files import lock
from ..files.folders import names_in
from ..optional import import_optional
from ..words import counted, listed
from .checkpoints import is_sharded
from .finding import found_checkpoints
from .stopping import StopSignals


_IMAGES = 7  # keeps the seeds apart from those of the order
_SMOKE_SHARE = 0.1  # of a run: the losses of its first and its last part are compared


def make_accelerator(
    output_dir: str | Path,
    *,
    resume_from_checkpoint: str | None = None,
    mixed_precision: str = "no",
    gradient_accumulation_steps: int = 1,
    report_to: str | None = None,
) -> Accelerator:
    """Take the folder of a run, as long as the process lives, and make its Accelerator.

    Args:
        output_dir: the folder: empty or new, unless the run is resumed; what a try before the first checkpoint leaves
            (logs, a list of unusable images) does not count.
        resume_from_checkpoint: what it is resumed from; None for a new run.
        mixed_precision: "no", "bf16", "fp16", or "auto": bf16 where the processor has units for it, else "no".
        gradient_accumulation_steps: forward passes of an update.
        report_to: a tracker known to accelerate; None or "none" for none.

    Raises:
        ValueError: `output_dir` holds something else than a run that is to be continued, or another run is working
            there; or the package of `report_to` is missing or broken.
    """
    report_to = None if report_to == "none" else report_to
    _check_output_dir(Path(output_dir), resume_from_checkpoint)
    if report_to == "tensorboard":
        purpose = "`report_to` tensorboard"
        import_optional("torch.utils.tensorboard", purpose, extra="training", package="tensorboard")
    elif report_to in LoggerType.list() and report_to != "all":
        import_optional(report_to, f"`report_to` {report_to}")
    accelerator = Accelerator(
        # An update always takes as many batches, also across the end of an epoch: `Run.batches` counts on it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=_own_precision() if mixed_precision == "auto" else mixed_precision,
        log_with=report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=os.path.join(output_dir, "logs")),
        step_scheduler_with_optimizer=False,
        # The others wait while the main process draws samples, and at the end of stage 1 measures many images.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],
    )
    accelerator.wait_for_everyone()  # only now may a process write into the output folder that another one checks
    if accelerator.is_main_process:
        accelerator.output_lock = lock(output_dir)
        if resume_from_checkpoint is None:
            Path(output_dir, BAD_IMAGES).unlink(missing_ok=True)  # of a try that came to nothing
    accelerator.wait_for_everyone()
    return accelerator


def _own_precision() -> str:
    """The mixed precision that this machine trains fastest in without scaling a loss.

    Any CPU knows bfloat16, but without AMX float32 is faster.
    """
    is_fast = torch.cuda.is_bf16_supported(False) if torch.cuda.is_available() else torch.cpu._is_amx_tile_supported()
    return "bf16" if is_fast else "no"


def _check_output_dir(folder: Path, resume_from_checkpoint: str | None) -> None:
    has_checkpoints = bool(found_checkpoints(folder))
    begins = resume_from_checkpoint is None or (resume_from_checkpoint == "latest" and not has_checkpoints)
    # What a run that ended before its first checkpoint has left is in nobody's way
    held = [name for name in names_in(folder) if name not in ("logs", "samples", BAD_IMAGES)]
    if held and begins:
        remedy = "`resume_from_checkpoint` 'latest' continues it" if has_checkpoints else "remove it"
        raise ValueError(f"`output_dir` {folder} must be empty, it holds {listed(held)}: pass another, or {remedy}.")


class Run:
    """A training from its first step to its last: batches, count, log, and what is due after an update.

        run = Run(accelerator, step, ...)
        for batch, generators in run.batches(loader):
            with accelerator.accumulate(model):
                ...                                     # losses; and where gradients are synchronised an update
            run.note(losses)
            if not accelerator.sync_gradients:
                continue
            run.end_of_step(gradient_norm=norm)
            if run.saves or checkpoints.failed:
                checkpoints.save(run.step)
            if run.exit_code:                           # a signal has come
                checkpoints.finish()
                accelerator.end_training()
                sys.exit(run.exit_code)
            if run.validates(model):
                run.interruptible(draw_samples, run.sample_path)

    Args:
        accelerator: of `make_accelerator`, after `prepare`; its processes make every call alike.
        step: updates that have been made, of a run that was resumed.
        seed: with the number of an image in the run it fixes everything random about it.
        train_batch_size: images of a process in a forward pass.
        max_train_steps: updates in total.
        checkpointing_steps: updates between two checkpoints.
        validation_steps: updates between two times that samples are drawn.
        overfit_batches: smoke test: the run consists of its first so many batches, and the loss must fall; None for
            all of them.

    Raises:
        ValueError: `overfit_batches` is less than 1.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        step: int,
        *,
        seed: int,
        train_batch_size: int,
        max_train_steps: int,
        checkpointing_steps: int,
        validation_steps: int,
        overfit_batches: int | None = None,
    ):
        if overfit_batches is not None and overfit_batches < 1:
            raise ValueError(f"`overfit_batches` must be at least 1, got {overfit_batches}.")
        self.accelerator = accelerator
        self.step = step
        self.seed = seed
        self.train_batch_size = train_batch_size
        self.max_train_steps = max_train_steps
        self.checkpointing_steps = checkpointing_steps
        self.validation_steps = validation_steps
        self.overfit_batches = overfit_batches
        self.exit_code = 0  # of a process that was asked to stop: not 0 once it was
        self._stop = StopSignals(accelerator)
        self._progress = tqdm(total=max_train_steps, initial=step, disable=not accelerator.is_main_process)
        self._losses: dict[int, float] = {}
        self._noted: list[dict[str, torch.Tensor]] = []
        self._last_time = time.perf_counter()

    def batches(self, loader: OrderedLoader | StreamLoader) -> Iterator[tuple[dict[str, Any], list[torch.Generator]]]:
        """The batches that are left, each with the generators of everything random about its images.

        Raises:
            ValueError: at the end of a smoke test: the loss has not fallen.
        """
        number = self.step * self.accelerator.gradient_accumulation_steps
        batches = batches_from(loader, number, self.overfit_batches)
        processes, device = self.accelerator.num_processes, self.accelerator.device
        with logging_redirect_tqdm():  # no line of a log is written into the bar
            while self.step < self.max_train_steps:
                batch = next(batches)
                first = (number * processes + self.accelerator.process_index) * self.train_batch_size
                images = range(first, first + self.train_batch_size)
                yield batch, generators_of(images, self.seed, _IMAGES, device=device)
                number += 1
        self._stop.close()
        self._progress.close()
        if self.overfit_batches:
            self.accelerator.print(compare_ends(self._losses, self.max_train_steps))

    def note(self, scalars: dict[str, torch.Tensor]) -> None:
        """Keep what is to be logged of a forward pass, "loss" among it, without waiting for it."""
        self._noted.append({name: value.detach().float() for name, value in scalars.items()})

    def end_of_step(self, **scalars: torch.Tensor | float) -> dict[str, float]:
        """Count an update, log it and ask whether the run is to stop.

        Args:
            scalars: what is logged beside what was noted, which is logged as means over forward passes and processes:
                over those that are no NaN, the sign of what a batch did not have, unless the loss is one too.

        Returns:
            What was logged; "images_per_second", of all processes, among it.
        """
        self.step += 1
        names = list(self._noted[0])
        stacked = torch.stack([torch.stack([noted[name] for name in names]) for noted in self._noted])
        absent = stacked.isnan() & ~stacked[:, [names.index("loss")]].isnan()
        sums = torch.stack([stacked.masked_fill(absent, 0).sum(dim=0), (~absent).float().sum(dim=0)])
        total, count = self.accelerator.reduce(sums, "sum")
        values = dict(zip(names, (total / count).tolist()))
        values |= {name: float(value) for name, value in scalars.items()}
        now = time.perf_counter()
        num_images = len(self._noted) * self.train_batch_size * self.accelerator.num_processes
        values["images_per_second"] = num_images / (now - self._last_time)
        self._last_time = now
        self._noted.clear()
        if self.overfit_batches:
            self._losses[self.step] = values["loss"]
        self._progress.update()
        self._progress.set_postfix(loss=f"{values['loss']:.4f}")
        self.accelerator.log(values, step=self.step)
        self.exit_code = self._stop.exit_code()
        return values

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is due: after every `checkpointing_steps` updates, the last, and before a stop."""
        return self.exit_code != 0 or self._is_due(self.checkpointing_steps)

    def validates(self, model: torch.nn.Module) -> bool:
        """Whether this process draws samples of a model now: the main one, unless the weights are sharded."""
        return self.accelerator.is_main_process and self._is_due(self.validation_steps) and not is_sharded(model)

    def interruptible(self, function: Callable, *args: Any) -> Any:
        """`function(*args)`, or None if a signal ended it: for what takes long and changes nothing of the run."""
        return self._stop.interruptible(function, *args)

    @property
    def sample_path(self) -> str:
        """The picture of the samples after this step."""
        return os.path.join(self.accelerator.project_dir, "samples", f"step-{self.step:07d}.png")

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.max_train_steps


def compare_ends(losses: dict[int, float], max_train_steps: int) -> str:
    """The losses at the beginning and the end of a run, in words.

    Args:
        losses: by the number of the update, counted from 1.
        max_train_steps: length of the run.

    Raises:
        ValueError: the loss has not fallen.
    """
    length = max(1, round(_SMOKE_SHARE * max_train_steps))
    first = [loss for step, loss in losses.items() if step <= length]
    last = [loss for step, loss in losses.items() if step > max_train_steps - length]
    if not (first and last):
        return "smoke test: resumed in the middle, nothing to compare"
    before, after = sum(first) / len(first), sum(last) / len(last)
    text = f"loss {before:.4f} in the first {counted(len(first), 'update')}, {after:.4f} in the last"
    if max_train_steps > 1 and not after < before:
        raise ValueError(
            f"`overfit_batches`: {text}: it has not fallen on batches that repeat, so something does not learn."
        )
    return f"smoke test: {text}"
