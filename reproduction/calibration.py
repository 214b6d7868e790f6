# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How far the share of fine regions lies from the ratio asked for, on photographs that the thresholds have not seen.

    python reproduction/calibration.py --data imagenet-256

`--data` is a folder that datasets.load_dataset reads, with a split train and a column image. The photographs are
divided at random, many times: thresholds are counted on one part and tried on the rest. The deviation between two
finite parts shrinks with the square root of their sizes; from it follows what thresholds of the whole set deviate by
on a large set of photographs of the same kind.
"""

import argparse
import json
from pathlib import Path

import datasets
import torch
from report import RESULTS
from study import write_json

from diffusers_d2it import region_entropy
from diffusers_d2it.data import to_pixels
from diffusers_d2it.entropy import NUM_QUANTILES, thresholds_for_ratios
from diffusers_d2it.grains import grain_map_from_entropy


RESOLUTION = 256
RATIOS = (0.3, 0.5, 0.7)
DIVISIONS = 200  # into two halves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with a split train and a column image")
    parser.add_argument("--output", type=Path, default=RESULTS / "calibration.json", help="JSON file")
    args = parser.parse_args()
    images = datasets.load_dataset(args.data, split="train")
    entropy = torch.cat([region_entropy(to_pixels(row["image"], RESOLUTION)[None]) for row in images])
    generator = torch.Generator().manual_seed(0)
    half = len(entropy) // 2
    deviations = []
    for _ in range(DIVISIONS):
        order = torch.randperm(len(entropy), generator=generator).tolist()
        quantiles = entropy[order[:half]].flatten().quantile(torch.linspace(0, 1, NUM_QUANTILES + 1))
        calibration, unseen = {"quantiles": quantiles.tolist()}, entropy[order[half:]]
        maps = [grain_map_from_entropy(unseen, thresholds_for_ratios(calibration, [1 - r, r])) for r in RATIOS]
        shares = [grain_map.float().mean() for grain_map in maps]
        deviations.append(torch.stack(shares) - torch.tensor(RATIOS))
    deviations = torch.stack(deviations)  # (divisions, ratios)
    between_halves = deviations.pow(2).mean(dim=0).sqrt()
    # Both halves vary alike: var(halves) = 2 s^2 / half; of the whole set against a large one it is s^2 / (2 half).
    whole = between_halves / 2
    result = {
        "photographs": len(entropy),
        "divisions": DIVISIONS,
        "ratios": RATIOS,
        "mean_share_of_unseen_half": [round(r + d, 4) for r, d in zip(RATIOS, deviations.mean(dim=0).tolist())],
        "rms_deviation_between_halves": [round(x, 4) for x in between_halves.tolist()],
        "expected_rms_deviation_of_all_on_a_large_set": [round(x, 4) for x in whole.tolist()],
        "divisions_within_0.03": [round(x, 3) for x in (deviations.abs() <= 0.03).float().mean(dim=0).tolist()],
    }
    write_json(args.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
