# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""From scores to what may be said: tables with their spread, claims with a verdict, one JSON file a script."""

import argparse
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import diffusers
import torch
from arms import ARMS, PRESETS
from scipy import stats
from scoring import Scorer, score_all
from study import Study, write_json

import diffusers_d2it
from diffusers_d2it.evaluation.features import weights_digest
from diffusers_d2it.files import lock


RESULTS = Path(__file__).parent / "results"
# Of a verdict on what others have published
SEEN = {"holds": "seen", "cannot be told": "not seen", "does not hold": "opposite"}
# By which a claim is judged; 1 where less is better
MEASURES = {"frechet_distance": 1, "distance_to_reconstructions": 1, "labelled_correctly": -1}
BUDGETS = {"equal_steps": "at equal steps", "equal_seconds": "at equal seconds"}  # and how tables call them


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    label: str
    arm: str  # of `ARMS`
    source: str = "predicted"  # of the maps that are sampled with
    paper: float | None = None  # what the paper has there


@dataclass(frozen=True)
class Claim:
    """That one row, named by its label, is better than another."""

    text: str
    better: str
    worse: str


@contextmanager
def open_study(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Namespace, Scorer]]:
    """The flags of a script of the study and its scorer, alone in the work folder."""
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="folder of the result")
    args = parser.parse_args()
    with lock(args.work_dir):
        yield args, Scorer(Study(args))


def verdict(better: Sequence[float], worse: Sequence[float]) -> str:
    """What pairs of distances, one a seed, say of the claim that the first ones are lower.

    "holds" or "does not hold" if the 95 % interval of the mean difference (Student's t) leaves zero out; else "cannot
    be told". Of twenty claims about equal things one is expected to be told.
    """
    differences = [high - low for low, high in zip(better, worse, strict=True)]
    if len(differences) < 2:
        return "cannot be told"
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    if abs(mean) <= stats.t.ppf(0.975, len(differences) - 1) * error:
        return "cannot be told"
    return "holds" if mean > 0 else "does not hold"


def score_rows(scorer: Scorer, args: argparse.Namespace, rows: Sequence[Row]) -> dict[str, dict]:
    """Scores of all rows at equal steps and at equal seconds, a number for every seed."""
    study, preset = scorer.study, scorer.study.preset
    budgets = {
        "equal_steps": {row.label: preset.steps for row in rows},
        "equal_seconds": {row.label: study.steps_at_equal_seconds(row.arm) for row in rows},
    }
    runs = [(row.arm, steps[row.label], row.source) for steps in budgets.values() for row in rows]
    jobs = [(arm, seed, steps, source) for arm, steps, source in runs for seed in preset.seeds]
    scores = score_all(scorer, args, jobs)
    table = {}
    for row in rows:
        table[row.label] = asdict(row) | {"milliseconds_of_a_step": 1000 * study.step_seconds[row.arm]}
        for budget, steps in budgets.items():
            found = [scores[row.arm, seed, steps[row.label], row.source] for seed in preset.seeds]
            of_seeds = {key: [one[key] for one in found] for key in found[0]}
            table[row.label][budget] = {"steps": steps[row.label]} | of_seeds
        table[row.label]["floor"] = scorer.distance(scorer.reconstructions("validation", ARMS[row.arm].fine_ratio))
    return table


def judge(
    claims: Sequence[Claim],
    table: dict[str, dict],
    budgets: Iterable[str] = BUDGETS,
    measures: Mapping[str, int] = MEASURES,
    words: Mapping[str, str] = MappingProxyType({}),
) -> list[dict]:
    """Every claim with its verdicts by each measure, under each budget that both of its rows have.

    Differences speak for the claim if they are positive; `words` are other words for verdicts.
    """
    judged = []
    for claim in claims:
        entry, better, worse = {"claim": claim.text}, table[claim.better], table[claim.worse]
        for budget in budgets:
            if not (budget in better and budget in worse):
                continue
            entry[budget] = {}
            for measure, sign in measures.items():
                low, high = ([sign * value for value in row[budget][measure]] for row in (better, worse))
                told, difference = verdict(low, high), statistics.mean(high) - statistics.mean(low)
                entry[budget][measure] = {"verdict": words.get(told, told), "difference": difference}
        judged.append(entry)
    return judged


def protocol(scorer: Scorer, args: argparse.Namespace) -> dict:
    """What the figures of a run depend on."""
    return {
        "data": Path(args.data).name,
        "preset": {"name": args.preset} | asdict(PRESETS[args.preset]),
        "arms": {name: asdict(arm) for name, arm in ARMS.items()},
        "autoencoder": {key: scorer.study.vae.config[key] for key in ("downsample_factors", "latent_channels")},
        "features": scorer.features.describe(),
        "classifier": {
            "sha256": weights_digest(scorer.classifier),
            "accuracy_on_real_validation_images": scorer.labelled_correctly(*scorer.validation),
        },
        "reference": f"{len(scorer.photographs[0])} training images",
        "samples": f"{scorer.study.preset.num_samples}, every class as often, no guidance, UniPC",
        "frechet_distance_of_the_validation_images": scorer.distance(scorer.validation[0]),
        "device": args.device,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, diffusers_d2it)},
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over the seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown_table(*lines: Sequence[str]) -> str:
    """Lines of cells as Markdown, the head first."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def rows_table(table: dict[str, dict]) -> str:
    """The rows of a result as Markdown."""
    heads = ["paper", "equal steps", "equal seconds (steps)", "floor", "to reconstructions", "labelled", "noise error"]
    lines = [["", *heads]]
    for label, row in table.items():
        steps, seconds = row["equal_steps"], row["equal_seconds"]
        noise = ["" if None in values else spread(values, digits=4) for values in zip(*steps["noise_error"])]
        cells = [label, "" if row["paper"] is None else str(row["paper"]), spread(steps["frechet_distance"])]
        cells += [f"{spread(seconds['frechet_distance'])} ({seconds['steps']})", f"{row['floor']:.2f}"]
        cells += [spread(steps["distance_to_reconstructions"])]
        cells += [f"{spread([100 * share for share in steps['labelled_correctly']], 1)} %", " / ".join(noise)]
        lines.append(cells)
    return markdown_table(*lines)


def claims_table(judged: list[dict], heads: Mapping[str, str] = BUDGETS) -> str:
    """The claims of a result as Markdown, under budgets with their heads: verdicts by `MEASURES`, in that order."""
    lines = [["claim", *heads.values()]]
    for entry in judged:
        lines.append([entry["claim"]])
        for found in (entry.get(budget, {}) for budget in heads):
            told = [found[measure]["verdict"] for measure in MEASURES if measure in found]
            if found:
                told[0] += f" ({found['frechet_distance']['difference']:+.2f})"
            lines[-1].append(" / ".join(told))
    return markdown_table(*lines)


def score_table(
    scorer: Scorer, args: argparse.Namespace, name: str, rows: Sequence[Row], claims: Sequence[Claim], **more
) -> dict[str, dict]:
    """Train what is missing, score, judge, print and write, with `more` beside; returns the scores of the rows."""
    table = score_rows(scorer, args, rows)
    judged = judge(claims, table)
    print(rows_table(table) + "\n" + claims_table(judged))
    result = {"protocol": protocol(scorer, args), **more, "rows": table, "claims": judged}
    write_json(args.output_dir / f"{name}-{args.preset}.json", result)
    return table
