# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Runs what pages show: Python blocks as they stand, in one namespace a page, and commands as far as their flags,
which each script reads itself.

    pytest README.md docs        pages are tests, their blocks too: pytest -v docs/control.md

A block that is not run says why in the page, in a comment before it, and pytest lists it among what it skipped:

    <!--- skip: next if(True, reason="needs a network") -->

    PICTURES=docs pytest docs/control.md        what blocks save takes the place of the page's pictures of that name
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import string
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from script_runs import ROOT, call, importing_from, load_script
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser


PAGES = ["README.md", "CONTRIBUTING.md", "docs/*.md", "examples/README.md", "benchmarks/README.md"]
PAGES += ["benchmarks/device/README.md", "src/diffusers_d2it/checkpoints/*/README.md"]
RUN = {"python examples/demo.py --checkpoint runs/d2it/pipeline"}  # commands that are short, and have all they need
FOLDERS = ["examples", "benchmarks", "reproduction", "src", "tests"]  # where a command finds what it names


class _Parsed(Exception):
    """The flags of a script have been read: it goes no further."""


def start_page(namespace: dict) -> None:
    """An empty folder, in which the repository and a trained pipeline seem to lie."""
    torch.set_num_threads(1)
    namespace["_folder"], namespace["_back"] = tempfile.TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["_folder"].name)
    for name in FOLDERS:
        os.symlink(ROOT / name, name)
    os.makedirs("runs/d2it")
    os.makedirs("DiT-XL-2-256")  # what `hf download` would have made
    os.symlink(ROOT / "src/diffusers_d2it/checkpoints/tiny-imagenet-20-64", "runs/d2it/pipeline")


def end_page(namespace: dict) -> None:
    os.chdir(namespace["_back"])
    for shown in (ROOT / os.environ["PICTURES"]).iterdir() if "PICTURES" in os.environ else ():
        if (made := Path(namespace["_folder"].name, shown.name)).is_file():
            shutil.copy(made, shown)
    namespace["_folder"].cleanup()


def check_commands(example) -> None:
    """Every command of a shell block is one that would begin: its script, its flags, its target are there."""
    variables: dict[str, str] = {}
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(string.Template(line).substitute(variables), comments=True)
        while words and (given := re.fullmatch(r"([A-Z_]\w*)=(.*)", words[0])):
            variables[given[1]] = given[2]
            words = words[1:]
        if words:
            check_command(words)


def check_command(words: list[str]) -> None:
    """Raise unless the program of a command takes its arguments; `python` only as far as the flags of the script."""
    program, *rest = words
    if program == "python":
        check_script(*rest)
        if shlex.join(words) in RUN:
            call(Path(rest[0]).name, *rest[1:])
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(rest[1:])
        assert args.config_file is None or Path(args.config_file).is_file(), args.config_file
        check_script(args.training_script, *args.training_script_args)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(rest)
        check_script(args.training_script, *args.training_script_args)
    elif program == "sbatch":
        job, *script = rest[2:]  # behind --nodes 2
        assert (ROOT / job).is_file(), job
        check_script(f"examples/{script[0]}", *script[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r'^    "(\w+)": \[|^extras\["(\w+)"\] =', (ROOT / "setup.py").read_text(), re.M)
        named = [name for word in rest for name in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", word)))]
        assert set(named) <= {a or b for a, b in extras} and any(word.startswith(".") for word in rest), words
    elif words[:2] == ["hf", "download"]:
        assert len(words) == 5 and words[3] == "--local-dir", words  # needs a network
    elif words[:3] == [".venv/bin/python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if "/" in word), words
    else:
        raise AssertionError(f"nobody looks at {program}: teach tests/pages.py, or skip the block and say why")


def check_script(script: str, *words: str) -> None:
    """Raise unless a script of the repository takes these words."""
    path, argv = Path(script), sys.argv
    assert (ROOT / path).is_file(), script
    sys.argv = [script, *words]
    try:
        with importing_from(ROOT / path.parent):
            if path.parent.name == "examples":
                load_script(path.name).parse_args()  # with what is said of flags that contradict one another
                return
            with reading_flags_only():
                runpy.run_path(script, run_name="__main__")
        raise AssertionError(f"{script} reads no flags")
    except _Parsed:
        pass
    except SystemExit as end:
        raise AssertionError(f"{shlex.join([script, *words])}: exit status {end.code}, see stderr") from None
    finally:
        sys.argv = argv


@contextmanager
def reading_flags_only():
    """Whatever reads its flags with argparse stops when it has."""
    known, every = argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args

    def parse_known_args(self, args=None, namespace=None):
        known(self, args, namespace)
        raise _Parsed

    def parse_args(self, args=None, namespace=None):
        if rest := known(self, args, namespace)[1]:
            self.error(f"unrecognized arguments: {rest}")
        raise _Parsed

    argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args = parse_known_args, parse_args
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args = known, every


pages = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("bash", check_commands), SkipParser()],
    patterns=PAGES,
    path=str(ROOT),
    setup=start_page,
    teardown=end_page,
)
