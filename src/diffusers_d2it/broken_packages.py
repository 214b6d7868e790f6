# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Packages that are installed and cannot be imported: they break only what needs them, and their name is said.

diffusers and transformers ask whether an optional package is there, and import it if it is. One that is there and
broken, such as a torchvision that was built for another torch, so takes them down, and us with them. `call_around`
finds out which one it was, hides it, as if it were not installed, and tries again. Where nothing is broken, that is
one plain call.
"""

import importlib
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch  # noqa: F401  it cannot be imported twice: what breaks this import is not hidden


T = TypeVar("T")

# Nothing works without these: to hide them would only hide what is wrong with them.
_REQUIRED = frozenset(
    "diffusers_d2it torch diffusers transformers accelerate safetensors huggingface_hub datasets einops scipy numpy"
    " PIL filelock fsspec".split()
)

_LOST = {
    "bitsandbytes": "quantised weights",
    "peft": "LoRA adapters",
    "torchvision": "LPIPS (--perceptual_weight) and the image processors of transformers that are built on it",
    "xformers": "its attention backend",
}

_find_distribution = metadata.Distribution.from_name
_hidden: dict[str, str] = {}  # the packages that were hidden, each with its version and error in words


def call_around(function: Callable[[], T], wanted: str | None = None) -> T:
    """Call what imports, without the optional packages that break it.

    Each package that breaks it counts as not installed from then on, in this process; a RuntimeWarning says which it
    is, its error, and what does not work without it.

    Args:
        function: called again for each broken package, so it must bear that.
        wanted: a package that it cannot do without.

    Returns:
        What it returns.

    Raises:
        Exception: that of the function, if no optional package is to blame, or the wanted one.
    """
    while True:
        before = set(sys.modules)
        try:
            return function()
        except Exception as error:
            package, cause = _culprit(error)
            if package is None or package == wanted:
                raise
        _hide(package, cause)
        _drop_half_imported(before)
        _look_again()


def import_optional(name: str, purpose: str, extra: str | None = None, package: str | None = None) -> ModuleType:
    """Import an optional package for what needs it.

    Args:
        name: absolute name of the module to import.
        purpose: what needs it, in words, such as the flag that was given.
        extra: extra of diffusers-d2it that installs it, if one does.
        package: the package, where it is not the first part of `name`.

    Raises:
        ValueError: it is missing or broken; the purpose, the package and its error are named.
    """
    package = package or name.partition(".")[0]
    remedy = f"`pip install {package}`" if extra is None else f'`pip install "diffusers-d2it[{extra}]"`'
    if package not in _hidden and importlib.util.find_spec(package) is None:
        raise ValueError(f"{purpose} needs the package {package}: {remedy}.")
    try:
        return call_around(lambda: importlib.import_module(name), wanted=package)
    except Exception as error:
        broken = _hidden.get(package) or _broken(package, _causes(error)[0])
        raise ValueError(f"{purpose} needs a package that is broken: {broken}. Repair it: {remedy}.") from error


def _culprit(error: BaseException) -> tuple[str | None, BaseException | None]:
    """The optional package in which an import failed, and its error; None if there is none.

    It is the innermost one: what it imports itself is required, or part of Python.
    """
    for cause in _causes(error):
        modules = [
            frame.f_globals.get("__name__", "")
            for frame, _ in traceback.walk_tb(cause.__traceback__)
            if frame.f_code.co_name == "<module>"  # it is being imported
        ]
        if isinstance(cause, ImportError):  # what was to be imported, or lacks a name
            modules.append(cause.name or "")
        if isinstance(cause, SyntaxError):  # such a file has no frame
            modules.append(_module_of_file(cause.filename))
        for package in (module.partition(".")[0] for module in reversed(modules)):
            if _is_optional(package):
                return package, cause
    return None, None


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that led to it, the first one first."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain[::-1]


def _module_of_file(path: str | None) -> str:
    """The name below sys.path under which a source file is found, "" if there is none."""
    roots = [Path(entry).absolute() for entry in sys.path if entry and Path(path or "").is_relative_to(entry)]
    if not roots:
        return ""
    nearest = max(roots, key=lambda root: len(root.parts))
    return ".".join(Path(path).relative_to(nearest).with_suffix("").parts)


def _is_optional(package: str) -> bool:
    if not package or package in _REQUIRED or package in sys.stdlib_module_names or package == "__main__":
        return False
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was made, not found
        return False


def _hide(package: str, error: BaseException) -> None:
    broken = _broken(package, error)
    lost = _LOST.get(package, "what needs it")
    warnings.warn(
        f"{broken}. It counts as not installed here: {lost} will not work. Repair or uninstall it.",
        RuntimeWarning,
        stacklevel=3,
    )
    _hidden[package] = broken
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        del sys.modules[name]
    sys.modules[package] = None  # to be imported it is missing, and so it is to those who ask for it
    metadata.Distribution.from_name = classmethod(_distribution)  # where some libraries ask


def _distribution(cls: type, name: str) -> metadata.Distribution:
    """`importlib.metadata.Distribution.from_name` without what is hidden."""
    if name.replace("-", "_") in _hidden:
        raise metadata.PackageNotFoundError(name)
    return _find_distribution(name)


def _drop_half_imported(before: set[str]) -> None:
    """Drop modules whose package failed on the way: imported anew, it would not know them as its own."""
    for name in sorted(set(sys.modules) - before):
        parent = name.rpartition(".")[0]
        if parent and parent not in sys.modules:
            del sys.modules[name]


def _look_again() -> None:
    """Let the libraries that have noted which packages are there look again."""
    for name in ("transformers.utils.import_utils", "peft.import_utils"):
        for function in vars(sys.modules.get(name, ModuleType(name))).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
    noted = sys.modules.get("diffusers.utils.import_utils")
    if noted is not None:  # in flags: a second copy of the module finds what is there now
        again = importlib.util.module_from_spec(noted.__spec__)
        noted.__spec__.loader.exec_module(again)
        flags = {name: value for name, value in vars(again).items() if name.endswith("_available")}
        vars(noted).update({name: value for name, value in flags.items() if isinstance(value, bool)})
    # The fronts of packages, which know what names there are; the modules behind them stay, and so do their classes
    for name, front in sorted(sys.modules.items()):
        if type(front).__name__ == "_LazyModule" and name.partition(".")[0] in ("diffusers", "transformers"):
            del sys.modules[name]
            vars(front).update(vars(importlib.import_module(name)))
            sys.modules[name] = front
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, front)


def _broken(package: str, error: BaseException) -> str:
    """A package, its version and why it cannot be imported, on one line."""
    try:
        version = f" {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        version = ""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and missing in _hidden:
        reason = _hidden[missing]
    else:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{package}{version} is installed and cannot be imported ({reason})"
