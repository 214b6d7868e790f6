# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How values, names and differences are said in messages: on one line, cut where they are long, and harmless.

What comes from outside (names of classes and files, values of a configuration) is shown with every invisible character
spelled out, and never drives a terminal or becomes markup.
"""

import difflib
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any


_NAME_LENGTH = 60
_VALUE_LENGTH = 200

# Addresses are matched first so that their paths are left alone; `file:` is none of them.
_ABSOLUTE_PATH = re.compile(
    r"""(?P<address>\b(?!file:)[a-zA-Z][\w+.-]*://[^\s'"]*)
    | (?<=')(?P<single>(?:file:/+|~\w*/|[a-zA-Z]:[\\/]|/)[^'\n]+)(?=')
    | (?<=")(?P<double>(?:file:/+|~\w*/|[a-zA-Z]:[\\/]|/)[^"\n]+)(?=")
    | (?<![\w.~/\\})\]*$<])(?P<bare>(?:file:/+|~\w*/|[a-zA-Z]:[\\/]|/)(?:\\.|[^\s'"\\:;,)\]}])+)""",
    re.VERBOSE,
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def printable(text: object) -> str:
    """`text` on one line, with control and other invisible characters spelled out: safe to print in a terminal."""
    return visible(" ".join(str(text).split()))


def composed(text: str) -> str:
    """`text` in one encoding of its accents: what looks the same is the same."""
    return unicodedata.normalize("NFC", text)


def visible(text: str) -> str:
    """Every character that is not printable (ESC, line separators, direction marks) as its Python escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def without_paths(text: str) -> str:
    """Absolute paths reduced to their last part: they tell of a machine, and hold nowhere else."""

    def last_part(match: re.Match) -> str:
        if match["address"]:
            return match["address"]
        path = match["single"] or match["double"] or match["bare"]
        separators = r"[\\/]" if path[1:2] == ":" else "/"
        return next((part for part in reversed(re.split(separators, path)) if part), match[0])

    return _ABSOLUTE_PATH.sub(last_part, text)


def without_secrets(command: str) -> str:
    """A command without the absolute paths and the access tokens of the Hub that are in it."""
    return _TOKEN.sub("hf_***", without_paths(command))


def shorten(text: object) -> str:
    """`printable`, cut to a length that a list of names can hold."""
    text = printable(text)
    return text if len(text) <= _NAME_LENGTH else text[: _NAME_LENGTH - 1] + "…"


def shown(value: Any) -> str:
    """A value as it is shown in an error: in quotes, escaped, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= _VALUE_LENGTH else f"{text[:_VALUE_LENGTH]}... ({len(text)} characters)"


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first of some names, and how many more there are: "a, b, c and 4 more"."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def counted(count: int, word: str) -> str:
    """A number with its noun: "1 image", "2 images", "3 classes"."""
    return f"{count} {word if count == 1 else word + ('es' if word.endswith('s') else 's')}"


def close_to(name: object, known: Iterable[str], most: int = 3) -> list[str]:
    """Those of the known names that were probably meant: that have it as a word, or in them, or are spelt like it."""
    known, name = list(known), str(name).casefold()
    whole = [one for one in known if name in re.findall(r"\w+", one.casefold())]
    part = [one for one in known if len(name) > 2 and name in one.casefold()]
    spelt = difflib.get_close_matches(name, {one.casefold(): one for one in known}, n=most)
    spelt = [one for folded in spelt for one in known if one.casefold() == folded]
    return [*dict.fromkeys(whole + part + spelt)][:most]


def differing(a: Any, b: Any, name: str = "", missing: Any = None) -> dict[str, tuple]:
    """Where two values of JSON differ: the dotted name of each field, and both values, `missing` where one is not."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return {} if a == b else {name: (a, b)}
    found = {}
    for key in dict.fromkeys([*a, *b]):
        found |= differing(a.get(key, missing), b.get(key, missing), f"{name}.{key}" if name else str(key), missing)
    return found


def differences(found: Any, expected: Any) -> list[str]:
    """`differing` in words: the dotted name of each field, what was found and what expected."""
    return [f"{name} {_json(one)}, not {_json(other)}" for name, (one, other) in differing(found, expected).items()]


def _json(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _VALUE_LENGTH else f"{text[:_VALUE_LENGTH]}..."
