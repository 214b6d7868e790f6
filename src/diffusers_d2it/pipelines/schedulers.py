# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Which schedulers of diffusers work, and what they do: steps of diffusion or of flow matching, variances."""

import inspect

from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers


# Those that end at the data under a perfect prediction: others of diffusers fail, or end in noise without a word
_DIFFUSION = [kind.name for kind in KarrasDiffusionSchedulers]
_DIFFUSION += ["DDIMParallelScheduler", "DDPMParallelScheduler", "SASolverScheduler"]
_FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]
_FLOW += ["LTXEulerAncestralRFScheduler", "FlowMapEulerDiscreteScheduler"]
# These of diffusion take steps of flow matching too, with prediction_type "flow_prediction"
_BOTH = ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"]


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler takes the steps of flow matching, not of diffusion."""
    return _is_one_of(scheduler, _FLOW) or scheduler.config.get("prediction_type") == "flow_prediction"


def check_scheduler(scheduler: SchedulerMixin, transformer: ModelMixin, of_flow: bool) -> None:
    """Raise a ValueError unless a scheduler is known to work, and does what the model was trained for.

    A class of the user's own that is built on none of diffusers' is taken as it is.

    Args:
        scheduler: the scheduler.
        transformer: the model.
        of_flow: whether the model was trained by flow matching.
    """
    name, config = type(scheduler).__name__, scheduler.config
    of_diffusers = [base for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers.schedulers.")]
    known = _FLOW + _BOTH if of_flow else _DIFFUSION
    if is_flow(scheduler) != of_flow:
        kinds = ("flow matching", "diffusion") if of_flow else ("diffusion", "flow matching")
        raise ValueError(
            f"`scheduler` must be one of {kinds[0]}, as the model was trained, such as {known[0]}, got {name} of"
            f" {kinds[1]}; `from_config(pipe.scheduler.config)` keeps the kind."
        )
    if any(base.__name__.endswith("Scheduler") for base in of_diffusers) and not _is_one_of(scheduler, known):
        raise ValueError(f"`scheduler` must be one of {', '.join(known)}, got {name}.")
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"`scheduler` {name} shifts its steps by the size of an image: make it without dynamic shifting."
        )
    if not reads_variance(scheduler):
        return
    if not isinstance(scheduler, DDPMScheduler):
        raise ValueError(
            f"`scheduler` {name} with variance_type {config.variance_type!r} cuts predictions to three channels: make"
            " it with variance_type=None."
        )
    if transformer.out_channels != 2 * transformer.config.in_channels:
        raise ValueError(
            f"`scheduler` has variance_type {config.variance_type!r}, and the transformer predicts no variance."
        )


def _is_one_of(scheduler: SchedulerMixin, names: list[str]) -> bool:
    return any(base.__name__ in names for base in type(scheduler).__mro__)


def reads_variance(scheduler) -> bool:
    """Whether `scheduler.step` expects the network's variance beside its prediction."""
    # A config made from another scheduler's keeps entries that this one does not know.
    known = inspect.signature(type(scheduler).__init__).parameters
    return "variance_type" in known and scheduler.config.variance_type in ("learned", "learned_range")
