# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A training script in which something happens to one process: for `accelerate launch`.

    struck_run.py train_d2it.py <process>/<number of processes> <strike> <folder> --flags of the script ...

After the third batch <folder>/struck is written, and the process is killed ("kill"), raises an error ("raise") or
goes on and waits for a signal from outside ("wait").
"""

import os
import signal
import sys
from pathlib import Path

from script_runs import load_script

from diffusers_d2it.training import run


def main(script: str, process: str, strike: str, folder: str, *flags: str) -> None:
    module = load_script(script)
    index, num_processes = map(int, process.split("/"))
    real = run.batches_from

    def batches_from(accelerator, *args):
        for i, batch in enumerate(real(accelerator, *args)):
            assert accelerator.num_processes == num_processes
            if i == 3 and accelerator.process_index == index:
                Path(folder, "struck").touch()
                if strike == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if strike == "raise":
                    raise ValueError("injected: this process cannot go on")
            yield batch

    run.batches_from = batches_from
    module.main(module.parse_args(list(flags)))


if __name__ == "__main__":
    main(*sys.argv[1:])
