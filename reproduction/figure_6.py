# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Figure 6 of arXiv:2504.09454: how fast DiT and D2iT converge, over steps and over seconds.

python reproduction/figure_6.py --data tiny-imagenet-20 --work_dir runs/reproduction
"""

from plots import plot_curves
from report import open_study, protocol, spread, verdict
from scoring import Scorer, score_all
from study import make_parser, write_json


CURVES = {"DiT": ("dit", "fine"), "D2iT": ("d2it", "predicted")}


def scored_curves(scorer: Scorer, args) -> dict[str, list[dict]]:
    """Of each model the distances of all seeds after each of its checkpoints."""
    study, seeds = scorer.study, scorer.study.preset.seeds
    points = [(arm, steps, source) for arm, source in CURVES.values() for steps in study.checkpoints(arm)]
    scores = score_all(scorer, args, [(arm, seed, steps, source) for arm, steps, source in points for seed in seeds])
    curves = {label: [] for label in CURVES}
    for label, (arm, source) in CURVES.items():
        for steps in study.checkpoints(arm):
            distances = [scores[arm, seed, steps, source]["frechet_distance"] for seed in seeds]
            point = {"steps": steps, "seconds": steps * study.step_seconds[arm], "frechet_distance": distances}
            curves[label].append(point)
    return curves


def main() -> None:
    with open_study(make_parser(__doc__)) as (args, scorer):
        curves, judged = scored_curves(scorer, args), []
        dit = {point["steps"]: point["frechet_distance"] for point in curves["DiT"]}
        print("| steps | DiT | D2iT | D2iT is ahead |\n|---|---|---|---|")
        for point in curves["D2iT"]:
            other, own = dit[point["steps"]], point["frechet_distance"]
            judged.append({"claim": f"D2iT is ahead after {point['steps']} steps", "verdict": verdict(own, other)})
            print(f"| {point['steps']} | {spread(other)} | {spread(own)} | {judged[-1]['verdict']} |")
        result = {"protocol": protocol(scorer, args), "curves": curves, "claims": judged}
    write_json(args.output_dir / f"figure_6-{args.preset}.json", result)
    plot_curves(args.output_dir / f"figure_6-{args.preset}.png", curves)


if __name__ == "__main__":
    main()
