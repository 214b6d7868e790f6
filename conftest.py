# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Pages are tests too: `tests/pages.py`."""

from pages import pages


pytest_collect_file = pages.pytest()
