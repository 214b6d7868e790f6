# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Both reports on a checkpoint in one start of processes, for `accelerate launch`.

two_reports.py output_folder --flags that both scripts have ...
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState


sys.path.append(str(Path(__file__).parent.parent))

from script_runs import load_script  # noqa: E402


def main(output: str, *flags: str) -> None:
    for script, own in (
        ("grain_report.py", ["--output", f"{output}/report.json"]),
        ("budget_report.py", ["--output_dir", output, "--fine_ratios", "0", "0.5"]),
    ):
        module = load_script(script)
        module.main(module.parse_args([*flags, *own]))
        print(f"{AcceleratorState().num_processes} processes")
        AcceleratorState._reset_state(reset_partial_state=True)  # the script has left its group of processes
        GradientState._reset_state()


if __name__ == "__main__":
    main(*sys.argv[1:])
