# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Whether two models are the same."""

import torch


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Bit for bit, by the same names and in the same dtypes."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
