# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Runs the scripts of examples/: as a user does, in processes of their own, or here, which spares their start.

run, train              a process; `as_code` for one that another starts
call, call_train        here
in_processes, together  forks of this process
importing_from, main_of scripts of other folders, here
"""

import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_multi_gpu_env


ROOT = Path(__file__).parents[1]
OF_SCRIPTS = EXAMPLES, REPRODUCTION, BENCHMARKS = [ROOT / name for name in ("examples", "reproduction", "benchmarks")]
sys.path.append(str(EXAMPLES))  # where the scripts find what they share
LIMIT = 500  # seconds of a process
STEPS = 5  # eight photographs in batches of two: the fifth step is in the second epoch
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
# Without a GPU, accelerate runs two processes only under the flag --multi_gpu and with ACCELERATE_USE_CPU
TWO_PROCESSES = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]

SHARDED_PROCESSES = [*LAUNCH, "--config_file", str(EXAMPLES / "configs" / "accelerate" / "eight-gpus-fsdp2.yaml")]
SHARDED_PROCESSES += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]


def run(script: str, *arguments, launch: list[str] | None = None, expect_failure: bool = False, **environment: str):
    """Run a script to its end; its result, with stdout and stderr as text."""
    command = [*(launch or [sys.executable]), str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert (result.returncode != 0) == expect_failure, result.stdout + result.stderr
    return result


def as_code(script: str, *arguments) -> str:
    """Code that runs a script to its end, for a process that is no new one."""
    words = [str(EXAMPLES / script), *map(str, arguments)]
    start = f"import runpy, sys\nsys.argv = {words!r}\nsys.path.insert(0, {str(EXAMPLES)!r})\n"
    return f"{start}runpy.run_path(sys.argv[0], run_name='__main__')"


def train(script: str, output: Path, steps: int, *arguments, **kwargs):
    """Run a training script on 32-pixel images in batches of two, with a checkpoint every other step."""
    return run(script, *training_flags(output, steps), *arguments, **kwargs)


def load_script(name: str) -> ModuleType:
    """A script of examples/ as a module; skips the test of one whose extra is not installed."""
    if name == "app.py":
        pytest.importorskip("gradio")
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script: str, *arguments) -> None:
    """Call a script in this process; its errors come as exceptions."""
    module = load_script(script)
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        module.main(module.parse_args())
    finally:
        sys.argv = argv
        forget_group()


@contextmanager
def importing_from(*folders: Path) -> Iterator[None]:
    """Modules of folders can be imported by their names, as the scripts in them do.

    What is imported meanwhile of any folder of scripts is forgotten: several of them have modules of the same name.
    """
    places, known = [*sys.path], {*sys.modules}
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = places
        for name in {*sys.modules} - known:
            if Path(getattr(sys.modules[name], "__file__", None) or "").resolve().parent in OF_SCRIPTS:
                del sys.modules[name]


def main_of(module: str, *arguments) -> None:
    """Call `main` of a module of such a folder with these arguments."""
    argv, sys.argv = sys.argv, [f"{module}.py", *map(str, arguments)]
    try:
        importlib.import_module(module).main()
    finally:
        sys.argv = argv


def forget_group() -> None:
    """Let the next Accelerator of this process find out which processes there are."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def join_threads() -> None:
    """Wait for the other threads, such as one that writes a checkpoint, as an interpreter does at its end."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def in_processes(work: Callable[[], object], number: int = 2, environment: dict[str, str] | None = None) -> list:
    """What `work` returns, as JSON, in each process of a group; None of one that failed or was killed.

    Without accelerate's launcher, which would end a process when the other one has failed.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": str(number)}
    group |= (environment or {}) | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    children = []
    for rank in range(number):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT)  # one that waits for another that is no more
            os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            torch.set_num_threads(1)  # those that computed before the fork are not here: it would wait for them
            forget_group()
            sys.stdout = sys.stderr = open(os.devnull, "w")
            try:
                os.write(writer, json.dumps(work()).encode())
            finally:
                join_threads()
                os._exit(0)
        os.close(writer)
        children.append((child, reader))
    said = []
    for child, reader in children:
        with open(reader) as file:
            said.append(file.read())
        os.waitpid(child, 0)
    return [json.loads(text) if text else None for text in said]


def together(work: Callable[[], object], sharded: bool = False) -> str:
    """What two processes print that do the same, without an error; if asked, launched to shard what they train."""
    environment = None
    if sharded:
        launch = launch_command_parser().parse_args([*SHARDED_PROCESSES[len(LAUNCH) :], "script"])
        environment = prepare_multi_gpu_env(_validate_launch_command(launch)[0])
    with tempfile.TemporaryFile("a+") as printed, tempfile.TemporaryFile("a+") as errors:

        def printing() -> bool:
            with redirect_stdout(printed), redirect_stderr(errors):
                try:
                    work()
                except BaseException:
                    traceback.print_exc()
                    raise
                finally:
                    printed.flush()
                    errors.flush()
            return True

        ended = in_processes(printing, environment=environment)
        for file in (printed, errors):
            file.seek(0)
        said = printed.read()
        assert ended == [True, True], said + errors.read()
    return said


def call_train(script: str, output: Path, steps: int, *arguments) -> None:
    """`train` in this process."""
    try:
        call(script, *training_flags(output, steps), *arguments)
    finally:
        gc.collect()  # the lock of the output folder goes with what the script has left


def logged(run_folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of a run by tag and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for file in run_folder.glob("logs/**/events.out.tfevents.*"):  # the flags have a file of their own
        events = EventAccumulator(str(file), {"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return scalars


def training_flags(output: Path, steps: int) -> list:
    """The flags of `train`."""
    flags = ["--output_dir", output, "--max_train_steps", steps, "--resolution", 32, "--train_batch_size", 2]
    return [*flags, "--seed", 7, "--report_to", "none", "--checkpointing_steps", 2, "--validation_steps", STEPS]
