# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Strings from outside (class names, data sets, commands) in Markdown: shown, and never markup of any kind."""

import html
import re

from ..words import printable, visible, without_paths, without_secrets


_ADDRESS = re.compile(r"(https?://[\w./?#=&%~+-]*[\w/])", re.ASCII)


def literal(text: object) -> str:
    """`text` as one line of Markdown that shows it literally: no markup, HTML, table cell, link or mention of it."""
    escaped = html.escape(printable(text), quote=False)
    escaped = re.sub(r"([\\`*_\[\]|~$!#@:])", r"\\\1", escaped)
    escaped = re.sub(r"(?i)(?<=www)\.", r"\\.", escaped)  # GitHub's Markdown links bare host names
    return re.sub(r"^(\d*)([-+=.)])(?=\s|-|$)", r"\1\\\2", escaped)  # markers of lists, rules and headings


def prose(text: object) -> str:
    """`text` like `literal`, without absolute paths, but with http(s) addresses as links."""
    pieces = _ADDRESS.split(without_paths(printable(text)))
    return "".join(f"<{piece}>" if i % 2 else _piece(piece) for i, piece in enumerate(pieces))


def _piece(text: str) -> str:
    """`literal` that keeps the spaces around a piece of a line."""
    left, right = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{left}{literal(text)}{right}" if text.strip() else text


def shell_block(commands: list[str]) -> str:
    """Commands as a block of code, without absolute paths and access tokens; "" if there are none."""
    if not commands:
        return ""
    lines = "\n".join(without_secrets(command) for command in commands).replace("\r\n", "\n").split("\n")
    text = "\n".join(visible(line.expandtabs(4).rstrip()) for line in lines)
    # A fence ends at a line of as many backticks, so it is longer than any run of them inside.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}bash\n{text}\n{fence}"
