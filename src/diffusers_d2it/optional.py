# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Packages that only some things need: imported where they are needed, and named where they are missing or broken."""

import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType

from .words import printable


def import_optional(name: str, purpose: str, extra: str | None = None, package: str | None = None) -> ModuleType:
    """Import an optional package for what needs it.

    Args:
        name: absolute name of the module to import.
        purpose: what needs it, in words.
        extra: extra of diffusers-d2it that installs it, if one does.
        package: the package, where it is not the first part of `name`.

    Raises:
        ValueError: it is missing or broken; the purpose, the package and its error are named.
    """
    package = package or name.partition(".")[0]
    remedy = f"`pip install {package}`" if extra is None else f'`pip install "diffusers-d2it[{extra}]"`'
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ValueError(f"{purpose} needs the package {package}: {remedy}.") from error
        raise ValueError(f"{purpose} needs {package}, and {_broken(error) or error}. Repair it: {remedy}.") from error


@contextmanager
def naming_what_is_broken(purpose: str) -> Iterator[None]:
    """Let an import that fails inside name the package that is to blame.

    diffusers and transformers import whatever optional package is installed. One that cannot be imported, such as a
    torchvision that was built for another torch, so takes them down.

    Args:
        purpose: what is done inside, in words.

    Raises:
        ImportError: a package was being imported when the error arose; its name, version and error are in it.
    """
    try:
        yield
    except Exception as error:
        broken = _broken(error)
        if broken is None:
            raise
        raise ImportError(f"{purpose} fails, as {broken}: repair it, or uninstall what is not needed.") from error


def _broken(error: BaseException) -> str | None:
    """The package in whose import the first error arose, its version and the error; None if it arose elsewhere."""
    while error.__cause__ is not None:
        error = error.__cause__
    files = [
        frame.f_code.co_filename
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"  # it is being imported
    ]
    if isinstance(error, SyntaxError):  # such a file has no frame
        files.append(error.filename or "")
    known = {"", "diffusers_d2it", *sys.stdlib_module_names}
    packages = [package for package in map(_package_of, files) if package not in known]
    if not packages:
        return None
    package = packages[-1]
    try:
        package += f" {metadata.version(package)}"
    except metadata.PackageNotFoundError:  # it is called otherwise than its modules
        pass
    return f"{package} cannot be imported ({type(error).__name__}: {printable(error)})"


def _package_of(file: str) -> str:
    """The first part of a path below the nearest entry of sys.path."""
    below = [Path(file).relative_to(entry) for entry in sys.path if entry and Path(file).is_relative_to(entry)]
    return min(below, key=lambda path: len(path.parts)).parts[0].removesuffix(".py") if below else ""
