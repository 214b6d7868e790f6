# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Interpreters with another Hub than this one, without the seconds in which libraries are imported.

What the libraries of the Hub make of HF_ENDPOINT and HF_HOME they decide when they are imported, so it takes a process
of its own to change it. `run_code` forks one from a helper that has imported them under these variables: one for each
of their values, so tests had better ask for the same. A helper is this file, and ends with the process that has
started it.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType


LIMIT = 300  # seconds of a process
IMPORTED = ["torch._dynamo", "torch.distributed.fsdp", "diffusers.training_utils", "diffusers.loaders.peft", "jinja2"]
IMPORTED += ["diffusers.pipelines.pipeline_utils", "diffusers.schedulers.scheduling_unipc_multistep", "psutil"]
MISSING = {"diffusers_d2it", "datasets", "einops"}  # what code imports in vain where a test wants it so


def run_code(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """What comes of `python -W always -c code` in an environment: status, stdout and stderr."""
    with TemporaryDirectory() as folder:
        request = {"code": code, "environment": environment, "folder": os.getcwd()}
        paths = [Path(folder, name) for name in ("stdout", "stderr")]
        settings = [(key, value) for key, value in environment.items() if _is_of_the_hub(key)]
        helper = _helper(tuple(sorted(settings)))
        helper.stdin.write(json.dumps(request | {"outputs": [*map(str, paths)]}) + "\n")
        helper.stdin.flush()
        status = int(helper.stdout.readline())
        return subprocess.CompletedProcess(["-c", code], status, *(path.read_text() for path in paths))


@cache
def _helper(settings: tuple[tuple[str, str], ...]) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not _is_of_the_hub(key)} | dict(settings)
    command = [sys.executable, "-W", "always", "-c", Path(__file__).read_text()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    helper = subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"}, **pipes)
    atexit.register(helper.communicate)
    return helper


def _is_of_the_hub(variable: str) -> bool:
    return variable.startswith(("HF_", "HUGGING"))


def serve() -> str:
    """Answer requests by the status of a fork of each; in a fork, the code that it is to run."""
    for name in IMPORTED:
        importlib.import_module(name)
    found = MISSING.intersection(name.partition(".")[0] for name in sys.modules)
    assert not found, f"{found} of the helper would be there for all"
    gc.freeze()  # what all forks share is not searched by each
    for line in sys.stdin:
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        request = json.loads(line)
        signal.alarm(LIMIT)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        modes = os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2
        for stream, (path, mode) in enumerate(zip([os.devnull, *request["outputs"]], modes, strict=True)):
            os.dup2(os.open(path, mode), stream)
        return request["code"]
    sys.exit()


if __name__ == "__main__":
    code = compile(serve(), "<string>", "exec")
    sys.modules["__main__"] = ModuleType("__main__")
    exec(code, vars(sys.modules["__main__"]))  # and then it ends as any other does
