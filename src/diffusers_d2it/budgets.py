# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How much of its work an adaptive model may do, by one name for all of them.

    pipe(label, **pipe.transformer.budget_argument.at(0.5))    # half of what the model would spend

Shapes:
    B images
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .limits import check_values


@dataclass(frozen=True)
class BudgetArgument:
    """The argument of a pipeline that says how much of its work a model may do: 1 is all."""

    name: str
    null_name: str | None = None  # of the argument for the pass without a label; None if both passes have one budget
    smallest: float = 0.0  # that can be asked for

    def at(self, budget: float, null_budget: float | None = None) -> dict[str, float]:
        """The arguments of the pipeline for a budget.

        Raises:
            ValueError: a budget lies outside of its range, or there is none for the pass without a label.
        """
        arguments = {self.name: budget}
        if null_budget is not None:
            if self.null_name is None:
                raise ValueError(f"`null_budget` must be None, `{self.name}` is of both passes, got {null_budget}.")
            arguments[self.null_name] = null_budget
        annotations, limits = dict.fromkeys(arguments, float), dict.fromkeys(arguments, (self.smallest, 1))
        check_values(arguments, annotations, limits)
        return arguments


class AdaptiveDenoiser(Protocol):
    """What a network supplies whose cost depends on a budget."""

    budget_argument: BudgetArgument

    def count_tokens(self, inputs: Mapping[str, Any], output: Any) -> dict[str, torch.Tensor]:
        """Tokens of each image in the stages of a forward pass, (B,) of "backbone" and "refine".

        `inputs` are the arguments of `forward` by their names, `output` is what it returned.
        """
