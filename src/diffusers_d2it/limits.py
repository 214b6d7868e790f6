# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a value in a configuration may be, in words that stand both in a table and in an error.

RANGES = {
    "num_layers": Whole(1, 96),
    "num_classes": Optional(Whole(1, 1_000_000)),
}
check_ranges(config, RANGES)  # ValueError: `num_layers` must be at least 1 and at most 96, a whole number, got 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .words import shown


MAX_PARAMETERS = 20_000_000_000  # 80 GB in float32: thirty times the largest model of the paper


class Rule(Protocol):
    """What a value must be; as a string it completes "`key` must ..."."""

    def allows(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`. True is none, neither is 2.0."""

    low: int
    high: int

    def allows(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"be at least {self.low} and at most {self.high}, a whole number"


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`. True is none, neither is NaN."""

    low: float
    high: float

    def allows(self, value: Any) -> bool:
        return is_number(value) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"lie in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def allows(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "be true or false"


@dataclass(frozen=True)
class Text:
    """A string of at most `length` characters."""

    length: int

    def allows(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= self.length

    def __str__(self) -> str:
        return f"be a string of at most {self.length} characters"


@dataclass(frozen=True)
class Items:
    """A list or tuple of `shortest` to `longest` values of one kind."""

    rule: Rule
    shortest: int
    longest: int

    def allows(self, value: Any) -> bool:
        fits = isinstance(value, (list, tuple)) and self.shortest <= len(value) <= self.longest
        return fits and all(self.rule.allows(item) for item in value)

    def __str__(self) -> str:
        return f"be a list of {self.shortest} to {self.longest} values, each of which must {self.rule}"


@dataclass(frozen=True)
class Object:
    """A JSON object; a table of its own says what is in it."""

    def allows(self, value: Any) -> bool:
        return isinstance(value, Mapping)

    def __str__(self) -> str:
        return "be an object"


@dataclass(frozen=True)
class Optional:
    """Null, or what another rule allows."""

    rule: Rule

    def allows(self, value: Any) -> bool:
        return value is None or self.rule.allows(value)

    def __str__(self) -> str:
        return f"{self.rule}, or be null"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True is none."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def check_ranges(config: Mapping[str, Any], ranges: Mapping[str, Rule], inside: str = "") -> None:
    """Check every value that is there against its rule.

    Args:
        config: values by key.
        ranges: rules by key.
        inside: what the keys are called before their own names, with a dot behind it.

    Raises:
        ValueError: a value is out of its range; key, value and range are named.
    """
    for key, rule in ranges.items():
        if key in config and not rule.allows(config[key]):
            raise ValueError(f"`{inside}{key}` must {rule}, got {shown(config[key])}.")


def check_keys(config: Mapping[str, Any], known: set[str], inside: str = "") -> None:
    """Raise a ValueError that names a key that is not known and its value."""
    for key in config:
        if key not in known:
            raise ValueError(
                f"{shown(f'{inside}{key}')} is no key of this configuration, got {shown(config[key])}; expected are"
                f" {', '.join(sorted(known))}."
            )


def check_num_parameters(num_parameters: float, config: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raise a ValueError if a model would be larger than any that could be meant, before it is made.

    Args:
        num_parameters: how many it would have, about.
        config: of the model.
        keys: those that decide it.
    """
    if num_parameters > MAX_PARAMETERS:
        values = ", ".join(f"`{key}` {shown(config[key])}" for key in keys)
        raise ValueError(
            f"{values} ask for about {num_parameters:.2g} parameters, a model may have at most {MAX_PARAMETERS:.2g}."
        )
