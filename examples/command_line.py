# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How a script is spoken to: flags from the command line and from files, mistakes answered in one line.

A script reads its flags before it imports what takes seconds, torch above all:

    from command_line import begin

    def parse_args(arguments=None): ...

    if __name__ == "__main__":
        ARGS = begin(parse_args)

    import torch
    ...
    if __name__ == "__main__":
        main(ARGS)
"""

import argparse
import difflib
import logging
import math
import os
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TextIO


TRACEBACK = "D2IT_TRACEBACK"
# What flags, data and the machine lead to. Any other error is one of the code, and comes with its traceback
_MISTAKES = (ValueError, OSError, ImportError, FloatingPointError)


_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_until_the_end = ExitStack()
_HOME = re.compile(r"^(--\w+=)?(~[^/]*)(?=/|$)")  # where the shell does not see it: --flag=~/x, and in files of flags


def _home(match: re.Match) -> str:
    return (match[1] or "") + os.path.expanduser(match[2])


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default == [] or "default:" in action.help:
            return action.help  # the text says what happens without the flag
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that says a mistake in one line, and the flag that was probably meant."""

    def parse_args(self, args=None, namespace=None):
        """As of `argparse`; a flag that does not exist comes before one that is missing."""
        words = []
        for word in sys.argv[1:] if args is None else args:
            words += self._read(word[1:]) if word.startswith("@") else [word]
        words = [_HOME.sub(_home, word) for word in words]
        for word in words:
            self._check(word)
        return super().parse_args(words, namespace)

    def error(self, message: str) -> None:
        """End the script with `error: <message>`."""
        self.exit(2, f"error: {message}\n")

    def _read(self, path: str) -> list[str]:
        """The words of a file of flags; files that it names lie beside it, unless they are where one stands."""
        path = os.path.expanduser(path)
        try:
            with open(path, encoding="utf-8-sig") as file:  # some editors begin with a mark of the encoding
                lines = [line.strip() for line in file.read().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            self.error(f"@{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text in UTF-8'}")
        words = []
        for line in lines:
            line = re.sub(r"(^|\s+)#.*$", "", line).removesuffix("\\").rstrip()
            if re.match(r"--\w+\s", line):  # a flag with what belongs to it
                words += self._split(line)
            elif line:
                words.append(line)
        for i, word in enumerate(words):
            flag, equals, value = word.rpartition("=")
            beside = os.path.normpath(os.path.join(os.path.dirname(path), value))
            if value.endswith((".json", ".txt")) and not os.path.exists(value) and os.path.exists(beside):
                words[i] = flag + equals + beside
        return words

    def _split(self, line: str) -> list[str]:
        """The words of a line, in quotes where they hold spaces."""
        try:
            return shlex.split(line)
        except ValueError as error:  # an apostrophe may stand in a path
            words = line.split()
            return words if len(words) == 2 else self.error(f"{line} in a file of flags: {error}")

    def _check(self, word: str) -> None:
        name, known = word.partition("=")[0], list(self._option_string_actions)
        if name.startswith("--") and not any(flag.startswith(name) for flag in known):
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {close[0]}?" if close else "--help lists those that there are"
            self.error(f"{name} is not a flag of {self.prog}: {meant}")


def make_parser(description: str) -> Parser:
    """A parser that also reads flags from files: `train_d2it.py @examples/configs/imagenet-256/content-xl.txt`.

    A line of such a file is one word of the command, or a flag with its values, or a comment behind #; flags behind
    the file override it.
    """
    return Parser(
        description=description,
        epilog="A word @file reads flags from a file, one a line: see examples/configs.",
        formatter_class=_HelpFormatter,
    )


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], int | float]:
    """The type of a flag that is a whole number (`int`) or any (`float`), not less than `least` nor above `most`."""

    def read(text: str) -> int | float:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            limit = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"must be at least {least}{limit}, got {text}")
        return value

    read.__name__ = kind.__name__  # as argparse calls it where the text is no number
    return read


positive, natural = number(int, 1), number(int, 0)
weight, share = number(float, 0), number(float, 0, 1)


def output_file(text: str) -> str:
    """The type of a flag that names a file to be written at the end: its folder is made, and tried, at the start."""
    if os.path.exists(text) and not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text} is no regular file: name a new file, or one to be replaced")
    output_folder(os.path.dirname(text) or ".")
    return text


def picture_file(text: str) -> str:
    """`output_file` for a picture, whose ending says how it is written."""
    if os.path.splitext(text)[1].lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"{text} must end in {', '.join(_PICTURES)}")
    return output_file(text)


def output_folder(text: str) -> str:
    """The type of a flag that names a folder to be written to at the end: it is made, and tried, at the start."""
    try:
        os.makedirs(text, exist_ok=True)
        with tempfile.TemporaryFile(dir=text) as file:
            file.write(bytes(4096))  # which a full disk refuses
            file.flush()
        return text
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written to: {error}") from None


class _Lasting:
    """A stream that nobody may be reading any more (`| head`, a terminal that was closed): that ends no run either."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or 0

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable, *arguments: str) -> int | None:
        try:
            return function(*arguments)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # where what is still in the buffer goes, too
            os.close(nowhere)


def begin(parse_args: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """The flags of a script. What goes wrong from here on is said in one line, with the exit status 2.

    The traceback is shown as well if the environment variable D2IT_TRACEBACK is set.
    """
    for name in ("stdout", "stderr"):
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
        setattr(sys, name, _Lasting(getattr(sys, name)))
    warnings.filterwarnings("ignore", "This DataLoader will create")  # --dataloader_num_workers is the user's choice
    warnings.formatwarning = lambda message, category, *where, **line: f"{category.__name__}: {message}"
    logging.captureWarnings(True)
    args = parse_args()
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    _until_the_end.enter_context(logging_redirect_tqdm())  # no line of a log is written into a bar
    errors = sys.stderr  # torch puts another stream in its place while several processes end

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Before `main`, packages are imported: of one that is broken the traceback says which it is
        runs = any(frame.f_code.co_name == "main" for frame, _ in traceback.walk_tb(trace))
        is_mistake = issubclass(kind, _MISTAKES if runs else ImportError)
        for bar in list(tqdm._instances):
            bar.close()  # so that its line ends
        if os.environ.get(TRACEBACK) or not (is_mistake or issubclass(kind, KeyboardInterrupt)):
            traceback.print_exception(kind, error, trace, file=errors)
        if issubclass(kind, KeyboardInterrupt):
            sys.exit(130)
        if is_mistake:
            print(f"error: {in_flags(str(error) or kind.__name__, args)} ({TRACEBACK}=1 shows where)", file=errors)
            errors.flush()
            sys.exit(2)

    sys.excepthook = say
    return args


def next_command(script: str, rest: str = " ...", **flags: object) -> str:
    """The last line of a script: the command that comes after it; `rest` stands for flags that the user chooses.

    A flag of None or False is left out, one of True has no value.
    """
    given = [
        f"--{name}" if value is True else shlex.join([f"--{name}", str(value)])
        for name, value in flags.items()
        if value not in (None, False)
    ]
    path = shlex.quote(os.path.join(os.path.dirname(sys.argv[0]), script))
    return f"next: python {path} {' '.join(given)}{rest}"


def in_flags(message: str, args: argparse.Namespace) -> str:
    """A message of the library on one line, in which arguments that are flags of the script are written as such."""
    line = " ".join(message.split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    line = line.replace("`labelled=False`", "--unconditional").replace("`streaming=False`", "no --streaming")
    if "checkpoint" in vars(args):
        line = line.replace("`pretrained_model_name_or_path`", "--checkpoint")
    names = {name.removeprefix("train_"): name for name in vars(args)} | {name: name for name in vars(args)}
    return re.sub(r"`(\w+)`", lambda match: f"--{names[match[1]]}" if match[1] in names else match[0], line)
