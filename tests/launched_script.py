# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A training script for `accelerate launch`, sharded by FSDP2 on processes of a CPU, or struck in one process.

    launched_script.py sharded train_grain.py --flags of the script ...
    launched_script.py <strike> <process>/<number of processes> <folder> train_d2it.py --flags of the script ...

After the third batch <folder>/struck is written, and the process is killed ("kill") or goes on and waits for a signal
from outside ("wait").
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from script_runs import load_script

from diffusers_d2it.training import run


def shard() -> None:
    """accelerate shards on accelerators only, and would average here: processes of a CPU must pass as such."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    run.Accelerator = partial(Accelerator, cpu=True)
    is_sharded = run.is_sharded

    def must_be_sharded(model) -> bool:
        assert is_sharded(model), "this run is not sharded"
        return True

    run.is_sharded = must_be_sharded


def strike(how: str, process: str, folder: str) -> None:
    index, num_processes = map(int, process.split("/"))
    real = run.batches_from

    def batches_from(*args):
        accelerator = PartialState()
        for i, batch in enumerate(real(*args)):
            assert accelerator.num_processes == num_processes
            if i == 3 and accelerator.process_index == index and not Path(folder, "struck").exists():
                Path(folder, "struck").touch()
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    run.batches_from = batches_from


def main(what: str, *words: str) -> None:
    if what == "sharded":
        shard()
    else:
        strike(what, *words[:2])
        words = words[2:]
    module = load_script(words[0])
    module.main(module.parse_args(list(words[1:])))


if __name__ == "__main__":
    main(*sys.argv[1:])
