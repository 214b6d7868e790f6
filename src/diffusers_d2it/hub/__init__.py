# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What goes to the Hub: the files of a model or a pipeline and nothing else, with a card that says what is known."""

from .card import make_model_card
from .push import check_push, publish, push_folder


__all__ = ["check_push", "make_model_card", "publish", "push_folder"]
