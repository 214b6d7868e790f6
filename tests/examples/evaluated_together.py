# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Calls evaluate.py several times in one process, as starting one takes longest: test_evaluate.py launches two.

    accelerate launch --multi_gpu --num_processes 2 evaluated_together.py '[["--samples", ...], ...]'

At the end each process says what it got of an error in the main process.
"""

import json
import sys

from accelerate import Accelerator
from script_runs import load_script

from diffusers_d2it.files import on_main_process


def fail() -> None:
    raise ValueError("only here")


if __name__ == "__main__":
    script = load_script("evaluate.py")
    for arguments in json.loads(sys.argv[1]):
        script.main(script.parse_args(arguments))
    accelerator = Accelerator()
    try:
        on_main_process(accelerator, fail)
    except ValueError as error:
        print(f"process {accelerator.process_index}: {error}")
