# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Everything that processes count together, by one process or by two.

    accelerate launch --multi_gpu --num_processes 2 counted_together.py output_folder

test_gathering.py launches it so, and imports it for one process. What each ends with goes to `<process>.npz`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from diffusers_d2it.evaluation.feature_bank import FeatureBank
from diffusers_d2it.evaluation.scores import InceptionScore
from diffusers_d2it.evaluation.statistics import FeatureStatistics


N, D, BATCH = 61, 12, 4


def features() -> torch.Tensor:
    """Far from zero, so that a careless sum would lose digits."""
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 100


def count(accelerator: Accelerator, folder: Path) -> dict[str, np.ndarray | str | int]:
    """Each process counts every other batch; what all of them then hold."""
    statistics, score = FeatureStatistics(D), InceptionScore(N, num_splits=3)
    idle, idle_score = FeatureStatistics(D), InceptionScore(N, num_splits=3)  # of a process that has no images
    with FeatureBank(N, D, folder=folder, accelerator=accelerator) as bank:
        batches = torch.arange(N).split(BATCH)
        for indices in batches[accelerator.process_index :: accelerator.num_processes]:
            bank.write(features()[indices], indices)
            statistics.update(features()[indices], indices)
            score.update(features()[indices], indices)
        if accelerator.is_main_process:
            for indices in batches:
                idle.update(features()[indices])
                idle_score.update(features()[indices], indices)
        bank.finish()
        rows = bank[:]
        path = bank.path
        accelerator.wait_for_everyone()
    refused = ""
    with FeatureBank(2, D, folder=folder, accelerator=accelerator) as bank:
        bank.write(features()[:1], torch.tensor([0]))  # by every process
        try:
            bank.finish()
        except ValueError as error:
            refused = str(error)
    accelerator.wait_for_everyone()
    found = {"num_processes": accelerator.num_processes, "rows": rows.numpy(), "refused": refused}
    found |= {"file_is_there": path.exists()}
    for name, part in (("", statistics), ("idle_", idle)):
        total = part.gathered(accelerator)
        found |= {f"{name}mean": total.mean.numpy(), f"{name}covariance": total.covariance.numpy()}
        found |= {f"{name}num_images": total.num_images, f"{name}own": part.num_images}
    for name, part in (("score", score), ("idle_score", idle_score)):
        found[name] = np.array(part.gathered(accelerator).compute())
    return found


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    output = Path(sys.argv[1])
    np.savez(output / f"{accelerator.process_index}.npz", **count(accelerator, output))
    accelerator.end_training()
