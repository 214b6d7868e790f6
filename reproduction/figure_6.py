# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Figure 6 of arXiv:2504.09454: how fast DiT and D2iT converge, over steps and over seconds.

python reproduction/figure_6.py --data tiny-imagenet-20 --work_dir runs/reproduction
"""

from plots import plot_curves
from report import markdown_table, open_study, protocol, spread, verdict
from scoring import Scorer, score_all
from study import make_parser, write_json


CURVES = {
    "DiT": ("dit", "fine"),
    "D2iT": ("d2it", "predicted"),
    "DiT, velocity": ("dit-velocity", "fine"),
    "D2iT, velocity": ("d2it-velocity", "predicted"),
}
PAIRS = {"D2iT": "DiT", "D2iT, velocity": "DiT, velocity"}  # of the same objective


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


def judged_curves(curves: dict[str, list[dict]]) -> list[dict]:
    """Whether D2iT is ahead of DiT after each of its checkpoints, with the same objective."""
    judged = []
    for own, other in PAIRS.items():
        of_other = {point["steps"]: point["frechet_distance"] for point in curves[other]}
        for point in (one for one in curves[own] if one["steps"] in of_other):  # equal seconds are others
            distances = point["frechet_distance"], of_other[point["steps"]]
            judged.append({"model": own, "steps": point["steps"], "verdict": verdict(*distances)})
    return judged


def curves_table(curves: dict[str, list[dict]], judged: list[dict]) -> str:
    """As Markdown: a line for the steps of each checkpoint of D2iT."""
    distances = {(name, one["steps"]): spread(one["frechet_distance"]) for name in curves for one in curves[name]}
    verdicts = {(one["model"], one["steps"]): one["verdict"] for one in judged}
    lines = [["steps", *(cell for own, other in PAIRS.items() for cell in (other, own, f"{own} is ahead"))]]
    for steps in sorted({one["steps"] for one in judged}):
        # Steps at equal seconds are those of one objective alone
        keys = [key for own, other in PAIRS.items() for key in ((distances, other), (distances, own), (verdicts, own))]
        lines.append([str(steps), *(found.get((name, steps), "") for found, name in keys)])
    return markdown_table(*lines)


def main() -> None:
    with open_study(make_parser(__doc__)) as (args, scorer):
        curves = scored_curves(scorer, args)
        judged = judged_curves(curves)
        print(curves_table(curves, judged))
        result = {"protocol": protocol(scorer, args), "curves": curves, "claims": judged}
    write_json(args.output_dir / f"figure_6-{args.preset}.json", result)
    plot_curves(args.output_dir / f"figure_6-{args.preset}.png", curves)


if __name__ == "__main__":
    main()
