# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What every class-conditional pipeline has: labels as people write them, the schedule of guidance, decoding."""

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..limits import plain
from ..words import close_to, composed, listed, shown
from .base import Pipeline, StrictPipeline
from .calls import turn_of
from .lora import LoraPipelineMixin


KEPT = object()  # the dtype that models have: diffusers' `from_pipe` casts all to float32 where it is given none
# Labels in these have no order, or no meaning
_NO_ROW = (str, bytes, bytearray, Mapping, set, frozenset, np.ndarray, torch.Tensor)


class ClassConditionalPipeline(LoraPipelineMixin, StrictPipeline):
    """A pipeline of a denoiser with class labels, `transformer`, and of an autoencoder, `vae`.

    A subclass registers its components and `id2label`, and makes `image_processor`.
    """

    _callback_tensor_inputs = ["latents"]
    _current_timestep = None

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """As of `StrictPipeline`, but for labels (see `prepare_labels`); an interval must not end before it begins."""
        super().check_settings({name: value for name, value in settings.items() if name != "class_labels"})
        start, stop = settings.get("guidance_interval", (0, 1))
        if start > stop:
            raise ValueError(f"`guidance_interval` must be (start, stop) with start <= stop, got ({start}, {stop}).")

    def to(self: Pipeline, *args: Any, **kwargs: Any) -> Pipeline:
        """As of diffusers; a call that is under way in another thread ends first."""
        if kwargs.get("dtype") is KEPT:
            return self
        with nullcontext() if self.transformer is None else turn_of(self.transformer):
            return super().to(*args, **kwargs)

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of the classes by id, as serialised with the pipeline."""
        if self.config.id2label is None:
            return None
        return {int(key): name for key, name in self.config.id2label.items()}

    @property
    def components(self) -> dict[str, Any]:
        """All that another pipeline of this class is made from, the names of the classes included."""
        return super().components | {"id2label": self.id2label}

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Ids of class names.

        Args:
            label: a name or a list of names, as in `id2label`; one of several names separated by commas is enough.

        Raises:
            ValueError: a name is unknown (close ones are listed) or belongs to several classes, or the pipeline has no
                names.
        """
        ids_of_name = _ids_of_names(self.id2label or {})
        labels = [label] if isinstance(label, str) else label
        return [_label_id(one, self.id2label, ids_of_name) for one in labels]

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; a callback may set `_guidance_scale` between steps."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running or last call is guided, in some of its steps at least."""
        return self._guidance_scale != 1.0 and self.transformer.config.num_classes is not None

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What the running or last call was given for attention: {"scale": ...} weighs adapters."""
        return self._attention_kwargs

    @property
    def labels(self) -> dict[str, int]:
        """Ids of the classes by their names, each of several separated by commas; empty without names."""
        return {name: ids[0] for name, ids in _ids_of_names(self.id2label or {}).items() if len(ids) == 1}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along a side of a cell of the latents."""
        return self.vae.downsample_factor

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the running or last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the running or last step, for caches of diffusers that ask for it."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """A callback may set `_interrupt` to stop denoising; what has been reached is decoded."""
        return self._interrupt

    def _guidance_at(self, progress: float, interval: tuple[float, float], power: float | None) -> float:
        """Guidance scale after a share `progress` of the steps: 1 outside the interval, where one pass is enough."""
        if self.transformer.config.num_classes is None or not interval[0] <= progress < interval[1]:
            # The last step ends at progress 1, so an interval up to 1 includes it.
            return 1.0
        if power is None:
            return self._guidance_scale
        # Power-cosine schedule of MDT (Gao et al., arXiv:2303.14389): from 1 at pure noise to the full scale.
        return 1 + (self._guidance_scale - 1) * (1 - math.cos(math.pi * progress**power)) / 2

    @torch.no_grad()
    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Scaled latents (B, C, H / f, W / f) to images of `output_type`.

        Raises:
            ValueError: the latents are not finite (the model or the scheduler has diverged), or the images are not
                (the autoencoder has, or its dtype is too small). They would be black otherwise.
        """
        if not latents.isfinite().all():
            raise ValueError("denoising ended in latents that are not finite: the model or the scheduler diverged.")
        if output_type == "latent":
            return latents
        if self.vae is None:
            raise ValueError(f"`output_type` must be 'latent' without a `vae`, got {output_type!r}.")
        pixels = self.vae.decode(self.vae.unscale_latents(latents).to(self.vae.dtype)).sample
        if not pixels.isfinite().all():
            raise ValueError(
                f"`vae` decoded finite latents, up to {latents.abs().max().item():.4g}, to images that are not finite"
                f" in {self.vae.dtype}: its weights are damaged, or it needs another dtype."
            )
        return self.image_processor.postprocess(pixels.float(), output_type=output_type)


# ---------------------------------------------------------------------------------------------------------------------
# Labels, ids or names, to ids of the model
# ---------------------------------------------------------------------------------------------------------------------


def class_ids(
    class_labels: int | str | list[int | str] | np.ndarray | torch.Tensor | None,
    num_classes: int | None,
    id2label: dict[int, str] | None,
) -> list[int] | None:
    """Ids of labels, each checked against the model and its names; None for an unconditional model.

    Args:
        class_labels: an id, a name, a list of either, or None. Digits in a string are a name where a class is called
            so, else an id.
        num_classes: classes of the model; None for an unconditional one.
        id2label: the names; only these ids are valid. None allows every id of the model.

    Raises:
        ValueError: a label is unknown (close ones are named), given to an unconditional model, or missing.
    """
    if num_classes is None:
        if class_labels is not None:
            raise ValueError(f"`class_labels` {class_labels!r} were given to an unconditional model.")
        return None
    class_labels = plain(class_labels)
    if isinstance(class_labels, (np.ndarray, torch.Tensor)) and class_labels.ndim == 2 and class_labels.shape[1] == 1:
        class_labels = class_labels[:, 0].tolist()
    elif isinstance(class_labels, Iterable) and not isinstance(class_labels, _NO_ROW):
        class_labels = list(class_labels)
    labels = [class_labels] if isinstance(class_labels, (int, float, str)) else class_labels
    if labels is None or labels == []:
        raise ValueError(f"`class_labels` are required: this model is class-conditional, got {class_labels!r}.")
    if isinstance(labels, list) and len(labels) == 1 and isinstance(labels[0], list):
        [labels] = labels
    if not isinstance(labels, list) or not labels:
        raise ValueError(f"`class_labels` must be an id, a name, or a row of them, got {shown(class_labels)}.")
    ids = []
    ids_of_name = _ids_of_names(id2label or {}) if any(isinstance(label, str) for label in labels) else {}
    for label in labels:
        if isinstance(label, str):
            if not _is_number(label) or composed(label) in ids_of_name:
                ids.append(_label_id(label, id2label, ids_of_name))
                continue
            label = int(label)
        if isinstance(label, float) and label.is_integer():
            label = int(label)  # a column of a table with a missing value holds floats
        if isinstance(label, bool) or not isinstance(label, int):
            raise ValueError(f"`class_labels` must be ids or names, got {label!r} of type {type(label).__name__}.")
        known = range(num_classes) if id2label is None else sorted(id2label)
        if label not in known:
            close = sorted(known, key=lambda id: (abs(id - label), id))[:3]
            named = [f"{id} ({id2label[id]})" if id2label else str(id) for id in close]
            raise ValueError(f"`class_labels`: unknown class id {label}. Close ids: {', '.join(named)}.")
        ids.append(int(label))
    return ids


def class_of(label: int, name: str, id2label: dict[int, str] | None, num_classes: int) -> int | None:
    """The class of a model that a class of some data set is; None if the model has none like it.

    It is found by its name, as a whole before one of several separated by commas; where classes of the model share
    that name it is the one with the same number. A name that is a number is that class, and of a model without names
    so is the label.

    Args:
        label: number of the class in the data set.
        name: its name there.
        id2label: the names of the model.
        num_classes: of the model.
    """
    known = id2label or {id: str(id) for id in range(num_classes)}
    if label in known and (name == str(label) or {*_names(name)} & {*_names(known[label])}):
        return label
    ids_of_name = _ids_of_names(known)
    for one in _names(name):
        try:
            return _label_id(one, known, ids_of_name)
        except ValueError:  # unknown, or of several classes
            continue
    number = int(name) if _is_number(name) else label if id2label is None else None
    return number if number in known else None


def _ids_of_names(id2label: dict[int, str]) -> dict[str, list[int]]:
    """The ids of every name, whole or part: "maillot" is the class called so before "maillot, tank suit"."""
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for id, names in id2label.items():
        whole.setdefault(composed(names), []).append(id)
        for name in {*_names(names)}:
            parts.setdefault(name, []).append(id)
    return parts | whole


def _label_id(label: str, id2label: dict[int, str] | None, ids_of_name: dict[str, list[int]]) -> int:
    """The only class of a name; `ids_of_name` are `_ids_of_names(id2label)`."""
    if id2label is None:
        raise ValueError(f"`class_labels` {label!r}: this pipeline has no `id2label`, pass ids.")
    found = ids_of_name.get(composed(label), [])
    if not found:  # in another case
        folded = composed(label).casefold()
        found = [id for name, ids in ids_of_name.items() if name.casefold() == folded for id in ids]
        found = [*dict.fromkeys(found)]
    if not found:
        close = close_to(label, ids_of_name)
        named = f"{'Close names' if close else 'Names'}: {listed(map(repr, close or sorted(ids_of_name)))}"
        raise ValueError(f"`class_labels`: unknown class name {label!r}. {named}.")
    if len(found) > 1:
        raise ValueError(
            f"`class_labels`: class name {label!r} belongs to several classes, {found}: pass one of these ids."
        )
    return found[0]


def _names(names: str) -> list[str]:
    """All that a class is called: its names as they stand, and each of those separated by commas."""
    return [composed(names), *(part.strip() for part in composed(names).split(","))]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
