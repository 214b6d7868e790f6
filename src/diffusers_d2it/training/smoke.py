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
        self._first: list[float] = []
        self._last: list[float] = []

    def add(self, step: int, loss: float) -> None:
        """Note the loss of update number `step`, counted from 1."""
        length = max(1, round(_SHARE * self.max_train_steps))
        if step <= length:
            self._first.append(loss)
        if step > self.max_train_steps - length:
            self._last.append(loss)

    def result(self) -> str:
        """The two losses in words.

        Raises:
            RuntimeError: the loss has not fallen.
        """
        if not self._first or not self._last:
            return "smoke test: resumed in the middle, nothing to compare"
        first, last = (sum(losses) / len(losses) for losses in (self._first, self._last))
        text = f"smoke test: loss {first:.4f} in the first {len(self._first)} updates, {last:.4f} in the last"
        if not last < first:
            raise RuntimeError(f"{text}: it has not fallen on batches that repeat, something does not learn.")
        return text
