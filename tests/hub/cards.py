# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What tests read out of model cards."""

import re

import yaml


def first_snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1]


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])
