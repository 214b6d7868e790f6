# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How a pipeline is called: with numbers as people have them, and by several threads at once."""

import inspect
import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch

from ..limits import plain
from ..words import close_to


# What people write first, and what it is called here
_INSTEAD = {
    "prompt": 'images are of classes, `class_labels="golden retriever"` or an id; `pipe.labels` are the names.',
    "negative_prompt": "images are of classes, and `guidance_scale` leads away from no class.",
    "seed": "pass `generator=torch.manual_seed(0)`.",
    "cfg_scale": "it is called `guidance_scale`.",
    "steps": "it is called `num_inference_steps`.",
    "num_images": "it is called `num_images_per_prompt`.",
}
_EDITING = {
    "image": "`D2iTImg2ImgPipeline.from_pipe(pipe)` takes it.",
    "strength": "`D2iTImg2ImgPipeline.from_pipe(pipe)` takes it, with an `image`.",
    "mask_image": "`D2iTInpaintPipeline.from_pipe(pipe)` takes it, with an `image`.",
}
_BUDGETS = ("budget", "fine_ratio")  # what one model calls as the other does not

Call = TypeVar("Call", bound=Callable)

_guard = threading.Lock()
_turns: WeakKeyDictionary = WeakKeyDictionary()  # a lock for each denoiser, whichever pipelines it is in
_running: WeakSet = WeakSet()  # denoisers of the calls that have their turn


def turn_of(model: torch.nn.Module | None) -> threading.RLock:
    """What to hold while a denoiser is in a call, or is changed; the same with and without torch.compile's wrapper.

    Raises:
        ValueError: there is none.
    """
    if model is None:
        raise ValueError("`transformer` is None: this pipeline only decodes, by `decode_latents`.")
    with _guard:
        return _turns.setdefault(getattr(model, "_orig_mod", model), threading.RLock())


def refuse_unknown(pipe: object, kwargs: Mapping[str, Any], call: Callable) -> None:
    """Raise a TypeError for an argument that a call does not have, which says what to use instead."""
    known = inspect.signature(call).parameters
    for name in kwargs.keys() - known.keys():
        close = close_to(name, known)
        instead = f"did you mean {' or '.join(close)}?" if close else "it has nothing like it."
        instead = _INSTEAD.get(name, instead)
        if hasattr(pipe, "grain_model"):
            instead = _EDITING.get(name, instead)
        if name in _BUDGETS and pipe.transformer is not None:
            instead = f"it is called `{pipe.transformer.budget_argument.name}`."
        raise TypeError(f"`{name}` is no argument of {type(pipe).__name__}: {instead}")


def one_call(call: Call) -> Call:
    """Make a method the `__call__` of a pipeline: no gradients, `plain` arguments, calls on a denoiser take turns.

    A call keeps its state in the pipeline, where callbacks change it, and in the caches of its denoiser, which
    pipelines may share. So a second thread waits, and gets what it would get alone; a callback must not wait for it.

    Raises:
        ValueError: a callback calls the pipeline that it is a callback of, or one with the same denoiser.
    """

    @wraps(call)
    def waiting(self, *args, **kwargs):
        refuse_unknown(self, kwargs, call)
        model = getattr(self.transformer, "_orig_mod", self.transformer)
        with turn_of(model), torch.no_grad():
            if model in _running:
                raise ValueError(f"`callback_on_step_end` calls a {type(self).__name__} while its model is in a call.")
            _running.add(model)
            try:
                return call(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
            finally:
                _running.discard(model)

    return waiting
