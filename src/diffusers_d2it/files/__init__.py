# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How anything is written and read: whole or absent, sealed, by one process at a time, and never any code."""

from .folders import (
    durable_file,
    is_sealed,
    lock,
    read_json,
    remove_folder,
    replace_folder,
    save_folder,
    seal,
    staging_folder,
    sweep,
    verify,
    write_json_durably,
)
from .processes import gather, on_main_process, place_of


__all__ = [
    "durable_file",
    "gather",
    "is_sealed",
    "lock",
    "on_main_process",
    "place_of",
    "read_json",
    "remove_folder",
    "replace_folder",
    "save_folder",
    "seal",
    "staging_folder",
    "sweep",
    "verify",
    "write_json_durably",
]
