# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What values may be: their types are the annotations of a function, their ranges stand in a table of limits.

LIMITS = {"num_layers": (1, 96), "name": (0, 100)}
check_values(config, get_type_hints(Model.__init__), LIMITS)
# ValueError: `num_layers` must be int in [1, 96], got 0.
"""

import math
from collections.abc import Mapping
from inspect import formatannotation
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch
from torch._subclasses import FakeTensor

from .words import shown


_ANY = (-math.inf, math.inf)


def check_values(
    values: Mapping[str, Any],
    annotations: Mapping[str, Any],
    limits: Mapping[str, tuple[float, float]],
    *,
    inside: str = "",
    exact: bool = True,
) -> None:
    """Check every value that has an annotation.

    True is no number, and no number is infinite or NaN; a whole number will do where a float is annotated, and a list
    where a tuple is, but no tuple is empty.

    Args:
        values: by their names.
        annotations: by the same names: classes, literals, tuples and lists of them, and unions of all these.
        limits: lowest and highest number by name, of the items if it is a list; for a string, of its length.
        inside: what the names are called before their own, with a dot behind it.
        exact: numbers are those of Python alone, as JSON holds them; False also takes those of numpy.

    Raises:
        ValueError: a value is of another type or out of its range; name, value and range are named.
    """
    for name, annotation in annotations.items():
        if name in values and not _allows(values[name], annotation, limits.get(name, _ANY), exact):
            expected = formatannotation(annotation).replace("torch._C.", "torch.")
            if name in limits:
                length = " with a length" if "str" in expected else ""
                expected += "{} in [{:,g}, {:,g}]".format(length, *limits[name])
            raise ValueError(f"`{inside}{name}` must be {expected}, got {shown(values[name])}.")


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a graph is recorded: for torch.compile, torch.export and ONNX, torch.jit.trace, or of FakeTensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(tensor, FakeTensor)


def can_be_read(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor may be looked at, as every check of values asks first.

    Not while a graph is recorded, which has none or keeps the answer for all others, nor under vmap; not on an
    accelerator, which would stall at every step, nor on the meta device.
    """
    in_vmap = torch._C._functorch.is_batchedtensor
    return tensor.device.type == "cpu" and not is_traced(tensor) and not in_vmap(tensor)


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as those of Python, rows of them as a list, tables as arrays; all else as it is.

    Rows are ranges, and arrays, tensors and columns of tables of one dimension.
    """
    if hasattr(value, "tolist") and getattr(value, "ndim", None) in (0, 1):
        return value.tolist()
    if isinstance(value, (list, tuple, range)):
        return [plain(one) for one in value]
    if hasattr(value, "to_numpy") and getattr(value, "ndim", None) == 2:
        return value.to_numpy()
    return value


def _allows(value: Any, annotation: Any, limits: tuple[float, float], exact: bool) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_allows(value, part, limits, exact) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)) or (origin is tuple and not value):
            return False
        parts = [parts[0]] * len(value) if origin is list or Ellipsis in parts else parts
        return len(value) == len(parts) and all(_allows(v, part, limits, exact) for v, part in zip(value, parts))
    if annotation in (int, float):
        return _is_number(value, annotation, exact) and limits[0] <= value <= limits[1] and abs(value) != math.inf
    if annotation is str:
        return isinstance(value, str) and limits[0] <= len(value) <= limits[1]
    return isinstance(value, origin or annotation)


def _is_number(value: Any, annotation: type, exact: bool) -> bool:
    if exact:
        return type(value) in (int, annotation)
    return isinstance(value, Integral if annotation is int else Real) and not isinstance(value, (bool, np.bool_))
