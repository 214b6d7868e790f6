# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A smoke test of a training: a few batches over and over must be learned."""

_SHARE = 0.1  # of the run: its first and its last part are compared


class SmokeTest:
    """Compares the loss at the beginning and the end of a run on batches that repeat.

    Args:
        max_train_steps: length of the run.
    """

    def __init__(self, max_train_steps: int):
        self.max_train_steps = max_train_steps
        self.length = max(1, round(_SHARE * max_train_steps))
        self._sums = {"first": 0.0, "last": 0.0}
        self._counts = {"first": 0, "last": 0}

    def add(self, step: int, loss: float) -> None:
        """Note the loss of update number `step`, counted from 1."""
        for part, belongs in (("first", step <= self.length), ("last", step > self.max_train_steps - self.length)):
            if belongs:
                self._sums[part] += loss
                self._counts[part] += 1

    def result(self) -> str:
        """The two losses in words.

        Raises:
            RuntimeError: the loss has not fallen.
        """
        if not all(self._counts.values()):
            return "smoke test: resumed in the middle, nothing to compare"
        first, last = (self._sums[part] / self._counts[part] for part in ("first", "last"))
        text = f"smoke test: loss {first:.4f} in the first {self._counts['first']} updates, {last:.4f} in the last"
        if not last < first:
            raise RuntimeError(f"{text}: it has not fallen on batches that repeat, something does not learn.")
        return text
