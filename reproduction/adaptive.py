# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""D2iT, DC-DiT and DiT in one study: what does a map by entropy buy, and what a learned router?

    python reproduction/adaptive.py --data tiny-imagenet-20 --work_dir runs/reproduction --jobs 2

Four models of one width and as many blocks, on the latents of one autoencoder: trained for as many updates, and for as
many multiply-adds as D2iT takes in these. Each is drawn under several budgets, DC-DiT also with guidance, whose half
without labels may be cheap, and with its boundaries at random places. What a row costs is counted and timed on the
real steps of its sampler.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from arms import CHUNKED_ARMS, find_arm
from cell_dit import CellDiT
from dcdit import MovedBoundaries
from plots import plot_costs
from report import SEEN, Claim, claims_table, judge, markdown_table, open_study, protocol, spread
from scoring import Scorer, map_jobs
from study import ADAPTIVE, Study, make_parser, write_json
from train_arm import without_refine_net

from diffusers_d2it import D2iTContentModel, DCDiTModel, DCDiTPipeline
from diffusers_d2it.evaluation import Drawing, Evaluator, ImageSet, compare


MODELS = {"d2it": "D2iT", "dc-dit": "DC-DiT", "dit": "DiT/2", "dit-1": "DiT/1"}
GUIDANCE = 1.5
TURNS = 5  # of the timed steps


@dataclass(frozen=True)
class Row:
    """A way to draw a model."""

    budget: float
    label: str = ""  # beside model and budget
    null_budget: float | None = None
    guidance_scale: float = 1.0
    moved: bool = False  # boundaries at random places
    equal_macs: bool = True  # whether it is drawn after that training too


ROWS = {
    "d2it": [Row(0.0), Row(0.25), Row(0.5), Row(0.75), Row(1.0)],
    "dc-dit": [
        Row(1.0),
        Row(0.7),
        Row(0.4),
        Row(1.0, ", boundaries at random", moved=True, equal_macs=False),
        Row(1.0, ", guided", guidance_scale=GUIDANCE, equal_macs=False),
        Row(1.0, ", guided, 0.1 without labels", 0.1, GUIDANCE, equal_macs=False),
        Row(0.55, ", guided", guidance_scale=GUIDANCE, equal_macs=False),  # as many tokens as the one before
    ],
    "dit": [Row(1.0)],
    "dit-1": [Row(1.0)],
}
BUDGETS = {"equal_steps": "equal updates", "equal_macs": "equal multiply-adds"}  # and how tables call them
MEASURES = {"frechet_distance": 1, "labelled_correctly": -1}  # of `report.MEASURES`
CLAIMS = [
    Claim("DC-DiT is better than DiT/2", "DC-DiT, 1", "DiT/2, 1"),
    Claim("D2iT is better than DiT/2", "D2iT, 0.5", "DiT/2, 1"),
    Claim("D2iT is better than DC-DiT", "D2iT, 0.5", "DC-DiT, 1"),
    Claim("DiT/1 is better than DC-DiT", "DiT/1, 1", "DC-DiT, 1"),
    Claim("DC-DiT with 0.4 of its tokens is better than DiT/2", "DC-DiT, 0.4", "DiT/2, 1"),
    Claim("DC-DiT is better with all of its tokens than with 0.4", "DC-DiT, 1", "DC-DiT, 0.4"),
    Claim("learned boundaries are better than as many random ones", "DC-DiT, 1", "DC-DiT, 1, boundaries at random"),
    Claim("guidance helps DC-DiT", "DC-DiT, 1, guided", "DC-DiT, 1"),
    Claim(
        "a cheap half without labels is better than as many tokens in both halves",
        "DC-DiT, 1, guided, 0.1 without labels",
        "DC-DiT, 0.55, guided",
    ),
]


def name_of(arm: str, row: Row) -> str:
    return f"{MODELS[arm]}, {row.budget:g}{row.label}"


def lengths_of(study: Study, arm: str) -> dict[str, int]:
    """Updates of a training."""
    return {"equal_steps": study.preset.steps, "equal_macs": study.steps_at_equal_macs(arm)}


def drawings_of(scorer: Scorer, arm: str, seed: int, steps: int) -> dict[str, Drawing]:
    """How each row of a trained model is drawn."""
    folder = scorer.study.train(arm, seed) / f"checkpoint-{steps}"
    if arm in CHUNKED_ARMS:
        kind = CellDiT if find_arm(arm).every_cell else DCDiTModel
        models = [kind.from_pretrained(folder, subfolder="model_ema").to(scorer.study.device).eval()]
        models += [deepcopy(models[0])]
        if kind is DCDiTModel:
            models[1].boundary_router = MovedBoundaries(models[1].boundary_router)
        parts = {"vae": scorer.study.vae, "scheduler": scorer.pipeline.scheduler}
        pipes = [DCDiTPipeline(transformer=model, **parts) for model in models]
    else:
        model = D2iTContentModel.from_pretrained(folder, subfolder="model_ema").to(scorer.study.device)
        parts = scorer.pipeline.components
        pipes = [type(scorer.pipeline)(**parts | {"transformer": model})] * 2
        if find_arm(arm).refine_share == 0:
            without_refine_net(model)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    plain = scorer.drawing(seed)
    return {
        name_of(arm, row): replace(plain, pipe=pipes[row.moved], guidance_scale=row.guidance_scale)
        for row in ROWS[arm]
    }


def arguments_of(arm: str, row: Row, drawing: Drawing) -> dict[str, float]:
    """What the pipeline is given for a row."""
    return drawing.pipe.transformer.budget_argument.at(row.budget, row.null_budget)


def score(scorer: Scorer, arm: str, seed: int, budget: str) -> dict[str, dict]:
    """Figures of all rows of a run, kept in the work folder; of the first seed with what they cost."""
    steps = lengths_of(scorer.study, arm)[budget]
    file = scorer.study.work_dir / "adaptive" / f"{arm}-{seed}-{steps}.json"
    if file.exists():
        return json.loads(file.read_text())
    drawings = drawings_of(scorer, arm, seed, steps)
    rows = {name_of(arm, row): row for row in ROWS[arm] if row.equal_macs or budget == "equal_steps"}
    arguments = {name: arguments_of(arm, row, drawings[name]) for name, row in rows.items()}
    reference = ImageSet.from_tensor(scorer.photographs[0], "the training images")
    evaluator = Evaluator(reference, ["fid"], scorer.features)
    side = scorer.study.preset.resolution
    shape = (len(scorer.labels), 3, side, side)
    first = seed == scorer.study.preset.seeds[0]
    found = {}
    for row in compare({name: drawings[name] for name in rows}, arguments, evaluator, shape, costs=first):
        correct = scorer.labelled_correctly(row.images, scorer.labels)
        found[row.name] = {"frechet_distance": row.results[0]["value"], "labelled_correctly": correct}
        if first:
            tokens = {"backbone": row.cost["tokens"]["backbone"]} if arm == "dit" else row.cost["tokens"]
            found[row.name] |= {"tokens": tokens, "gmac": row.cost["macs"] / 1e9}
    write_json(file, found)
    return found


def time_steps(scorer: Scorer) -> dict[str, float]:
    """Milliseconds of a denoising step for an image, both passes if guided, of the rows in turns; kept."""
    file = scorer.study.work_dir / "adaptive" / "milliseconds.json"
    if not file.exists():
        calls: dict[str, Callable[[], object]] = {}
        side, seed = scorer.study.preset.resolution, scorer.study.preset.seeds[0]
        for arm in ADAPTIVE:
            drawings = drawings_of(scorer, arm, seed, scorer.study.preset.steps)
            for row in ROWS[arm]:
                drawing = drawings[name_of(arm, row)]
                images = slice(0, min(drawing.batch_size, len(scorer.labels)))
                given = arguments_of(arm, row, drawing) | {"output_type": "latent"}
                calls[name_of(arm, row)] = partial(drawing.call, images, (side, side), **given)
        seconds = {name: [] for name in calls}
        for _ in range(TURNS):
            for name, draw in calls.items():
                start = time.process_time()
                draw()
                seconds[name].append(time.process_time() - start)
        steps = len(range(images.start, images.stop)) * scorer.study.preset.sampling_steps
        write_json(file, {name: 1e3 * statistics.median(of) / steps for name, of in seconds.items()})
    return json.loads(file.read_text())


def score_all(scorer: Scorer, args: argparse.Namespace) -> dict[tuple[str, int, str], dict]:
    """Scores by (arm, seed, training); trains what is missing first."""
    scorer.study.train_all(list(ADAPTIVE))
    jobs = [(arm, seed, one) for seed in scorer.study.preset.seeds for arm in ADAPTIVE for one in BUDGETS]
    return map_jobs(score, scorer, args, jobs)


def table_of(scorer: Scorer, scores: dict[tuple[str, int, str], dict], milliseconds: dict[str, float]) -> dict:
    """Of every row what it costs, and its figures after both trainings, a number for every seed."""
    study, table = scorer.study, {}
    seeds = study.preset.seeds
    for arm in ADAPTIVE:
        for name in scores[arm, seeds[0], "equal_steps"]:
            first = scores[arm, seeds[0], "equal_steps"][name]
            table[name] = {"arm": arm, "tokens": first["tokens"], "gmac": first["gmac"]}
            table[name]["milliseconds"] = milliseconds[name]
            for budget, steps in lengths_of(study, arm).items():
                found = [scores[arm, seed, budget].get(name) for seed in seeds]
                if found[0] is not None:
                    table[name][budget] = {"steps": steps} | {key: [one[key] for one in found] for key in MEASURES}
    return table


def adaptive_table(table: dict[str, dict]) -> str:
    """The rows as Markdown."""
    heads = ["tokens", "GMAC / image", "ms / step", "equal updates", "labelled", "equal multiply-adds (updates)"]
    lines = [["", *heads]]
    for name, row in table.items():
        tokens = " + ".join(f"{number:.3g}" for number in row["tokens"].values())
        after, macs = row["equal_steps"], row.get("equal_macs")
        labelled = spread([100 * share for share in after["labelled_correctly"]], 1)
        last = "" if macs is None else f"{spread(macs['frechet_distance'])} ({macs['steps']})"
        cells = [name, tokens, f"{row['gmac']:.3f}", f"{row['milliseconds']:.2f}"]
        lines.append([*cells, spread(after["frechet_distance"]), f"{labelled} %", last])
    return markdown_table(*lines)


def main() -> None:
    with open_study(make_parser(__doc__)) as (args, scorer):
        scores = score_all(scorer, args)
        table = table_of(scorer, scores, time_steps(scorer))
        judged = judge(CLAIMS, table, BUDGETS, MEASURES, SEEN)
        print(adaptive_table(table) + "\n" + claims_table(judged, BUDGETS))
        training = {"seconds": scorer.study.step_seconds, "macs": scorer.study.macs}
        training = {kind: {arm: found[arm] for arm in ADAPTIVE} for kind, found in training.items()}
        result = {"protocol": protocol(scorer, args), "training_step": training, "rows": table, "claims": judged}
    write_json(Path(args.output_dir, f"adaptive-{args.preset}.json"), result)
    plot_costs(Path(args.output_dir, f"adaptive-{args.preset}.png"), table)


if __name__ == "__main__":
    main()
