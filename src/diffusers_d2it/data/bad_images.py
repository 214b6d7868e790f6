# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Images that could not be used: by name, with the reason and a count, whichever process met them."""

import json
import logging
import multiprocessing
import os
from pathlib import Path

from ..words import counted


logger = logging.getLogger(__name__)

BAD_IMAGES = "bad_images.jsonl"  # in the output folder of a run

_MAX_LOGGED = 10  # per process; all of them are in the file
_MAX_SHOWN = 5


class BadImages:
    """The images that could not be used, in a file that all processes and workers of a run append to.

    The file, of JSON lines, has {"name", "reason"} for each image and comes into being with the first one. It is kept
    when a run is resumed, so it speaks of the whole run.

        bad_images = BadImages(os.path.join(args.output_dir, "bad_images.jsonl"))
        ...
        accelerator.print(bad_images.summary())
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._reasons: dict[str, str] = {}
        self._offset = 0
        self._num_logged = 0
        self._counts = multiprocessing.Array("q", 2)  # read and enlarged, also by the workers of this process

    def add(self, name: str, reason: str) -> None:
        """Note an image that could not be used; a name that is known already changes nothing."""
        if name in self.found():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"name": name, "reason": reason}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line.encode())  # in one call, so that lines of several processes never mix
        finally:
            os.close(file)
        self._num_logged += 1
        if self._num_logged <= _MAX_LOGGED:
            rest = f"; others are only listed in {self.path}" if self._num_logged == _MAX_LOGGED else ""
            logger.warning("image %r cannot be used: %s%s", name, reason, rest)

    def count(self, size: tuple[int, int], resolution: int) -> None:
        """Count an image that is used, and whether its shorter side had to be enlarged to the resolution."""
        with self._counts.get_lock():
            self._counts[0] += 1
            self._counts[1] += min(size) < resolution

    def found(self) -> dict[str, str]:
        """Reason by name of every image that any process has noted so far, each name once."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read()
        except FileNotFoundError:
            return self._reasons
        whole = lines[: lines.rfind(b"\n") + 1]  # another process may be writing the last one
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self._reasons.setdefault(entry["name"], entry["reason"])
            except (ValueError, TypeError, KeyError):
                pass  # cut by a killed process: that image is met, and noted, again
        return self._reasons

    def none_usable(self, source: str) -> ValueError:
        """The error of a source of images none of which can be used."""
        return ValueError(f"{source}: none of the images can be used. {self.summary()}")

    def summary(self) -> str:
        """What was not used and why, and how much was enlarged, in words; empty if there is nothing to say."""
        found = self.found()
        sentences = []
        if found:
            shown = "; ".join(f"{name!r}: {reason}" for name, reason in list(found.items())[:_MAX_SHOWN])
            more = f"; all in {self.path}" if len(found) > _MAX_SHOWN else f" ({self.path})"
            sentences.append(f"{counted(len(found), 'image')} could not be used: {shown}{more}.")
        num_read, num_enlarged = self._counts
        if num_enlarged:
            # A share, as those that were read several times count as often
            sentences.append(
                f"{num_enlarged / num_read:.1%} of the images were smaller than the resolution, and enlarged to it."
            )
        return "\n".join(sentences)
