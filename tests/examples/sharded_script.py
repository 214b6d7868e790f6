# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A training script under FSDP2 on processes of a CPU, for `accelerate launch`.

    sharded_script.py train_grain.py --flags of the script ...

accelerate shards on accelerators only, and would average here: processes of a CPU must pass as such.
"""

import sys
from functools import partial
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from diffusers_d2it.training import run


sys.path.append(str(Path(__file__).parent.parent))

from script_runs import load_script  # noqa: E402


def main(script: str, *flags: str) -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    run.Accelerator = partial(Accelerator, cpu=True)
    module = load_script(script)
    is_sharded = run.is_sharded

    def must_be_sharded(model) -> bool:
        assert is_sharded(model), "this run is not sharded"
        return True

    run.is_sharded = must_be_sharded
    module.main(module.parse_args(list(flags)))


if __name__ == "__main__":
    main(*sys.argv[1:])
