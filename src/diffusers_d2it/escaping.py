# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Strings from outside made harmless where they are shown: in Markdown, in fenced code and in a terminal."""

import html
import re


_NAME_LENGTH_SHOWN = 60

# Addresses are matched first so that their paths are left alone; `file:` is none of them.
_ABSOLUTE_PATH = re.compile(
    r"""(?P<address>\b(?!file:)[a-zA-Z][\w+.-]*://[^\s'"]*)
    | (?<=')(?P<single>(?:file:/+|~\w*/|[a-zA-Z]:[\\/]|/)[^'\n]+)(?=')
    | (?<=")(?P<double>(?:file:/+|~\w*/|[a-zA-Z]:[\\/]|/)[^"\n]+)(?=")
    | (?<![\w.~/\\})\]*$<])(?P<bare>(?:file:/+|~\w*/|[a-zA-Z]:[\\/]|/)(?:\\.|[^\s'"\\:;,)\]}])+)""",
    re.VERBOSE,
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_ADDRESS = re.compile(r"(https?://[\w./?#=&%~+-]*[\w/])", re.ASCII)


def printable(text: object) -> str:
    """`text` on one line, with control and other invisible characters spelled out: safe to print in a terminal."""
    return visible(" ".join(str(text).split()))


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
    return text if len(text) <= _NAME_LENGTH_SHOWN else text[: _NAME_LENGTH_SHOWN - 1] + "…"


def to_markdown(text: object) -> str:
    """`text` as one line of Markdown that shows it literally: no markup, HTML, table cell, link or mention of it."""
    escaped = html.escape(printable(text), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|~$!#@:])", r"\\\1", escaped)
    escaped = re.sub(r"(?i)(?<=www)\.", r"\\.", escaped)  # GitHub's Markdown links bare host names
    return re.sub(r"^(\d*)([-+=.)])(?=\s|-|$)", r"\1\\\2", escaped)  # markers of lists, rules and headings


def prose_to_markdown(text: object) -> str:
    """`text` literally like `to_markdown`, without absolute paths, but with http(s) addresses as links."""
    pieces = _ADDRESS.split(without_paths(printable(text)))
    return "".join(f"<{piece}>" if i % 2 else _piece(piece) for i, piece in enumerate(pieces))


def _piece(text: str) -> str:
    """`to_markdown` that keeps the spaces around a piece of a line."""
    left, right = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{left}{to_markdown(text)}{right}" if text.strip() else text
