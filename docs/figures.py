# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Writes the tables of the pages from the results that they are of; a test looks whether pages and results agree.

    make figures

A table stands between comments that say which function of this file makes it, and from what:

    <!-- figures: rows table_3-small -->
    <!-- end -->
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / name) for name in ("examples", "reproduction", "benchmarks")]

import adaptive  # noqa: E402
import dcdit  # noqa: E402
from arithmetic import models_table, runs_table  # noqa: E402
from budget_report import budget_table  # noqa: E402
from feeding import cores_table  # noqa: E402
from figure_5 import reconstructions_table  # noqa: E402
from figure_6 import curves_table  # noqa: E402
from report import claims_table, markdown_table, rows_table  # noqa: E402
from run import goals_table  # noqa: E402
from small_dcdit import judged_table, lengths_table  # noqa: E402
from step_savers import savers_table  # noqa: E402


KINDS, MASKS = ("equal neighbours", "isolated regions"), ("right half", "centre")
PLACE = re.compile(r"(<!-- figures: ([^>]+) -->\n).*?(<!-- end -->)", re.S)


def result(name: str) -> dict[str, Any]:
    """A file of reproduction/results or benchmarks/results."""
    paths = [ROOT / folder / "results" / f"{name}.json" for folder in ("reproduction", "benchmarks")]
    return json.loads(next(path for path in paths if path.is_file()).read_text(encoding="utf-8"))


def in_turn(first: str, second: str, digits: int) -> Callable[..., str]:
    """A cell with a figure of each of two results, as people write shares: .74 / .76."""
    results = result(first), result(second)

    def cell(*keys: str) -> str:
        values = []
        for found in results:
            for key in keys:
                found = found[key]
            values.append(f"{found:.{digits}f}".removeprefix("0"))
        return " / ".join(values)

    return cell


def coherence(*names: str) -> str:
    cell = in_turn(*names, digits=3)
    rows = [["imagenette-128 / tiny-imagenet-20-64", *KINDS, "equal across the edge, half", "centre"]]
    of_halves = {"photographs": "real", "drawn whole": "drawn", "put together": "unrelated"}
    for label, key in of_halves.items():
        row = [label, *(cell("maps", "right half", key, kind) for kind in KINDS)]
        rows.append([*row, *(cell("maps", mask, key, "equal across the edge") for mask in MASKS)])
    for mask in MASKS:
        edges = [f"**{cell('maps', mask, 'completed', 'equal across the edge')}**" * (one == mask) for one in MASKS]
        rows.insert(-1, [f"completed, {mask}", *(cell("maps", mask, "completed", kind) for kind in KINDS), *edges])
    return markdown_table(*rows)


def in_painted(*names: str) -> str:
    columns = ["photographs", "reconstructions", "in-painted", "in-painted, FlowMatchLCM"]
    rows = [[""] + columns]
    for name in names:
        found = result(name)["judge"]
        rows.append([name.removeprefix("editing-"), *(f"{found[f'top-1, {one}']:.2f}"[1:] for one in columns)])
    return markdown_table(*rows)


def seams(*names: str) -> str:
    rows = [["mask", *(name.removeprefix("editing-") for name in names)]]
    for mask in ("ellipse", "centre", "narrow bar"):
        cells = [mask]
        for name in names:
            drawn, there = (
                f"{result(name)['seams'][f'{mask}: gradient across the edge, {what}']:.3f}"[1:]
                for what in ("in-painted", "photographs there")
            )
            cells.append(f"{drawn} (photographs {there})")
        rows.append(cells)
    return markdown_table(*rows)


FIGURES: dict[str, Callable[..., str]] = {
    "rows": lambda name: rows_table(result(name)["rows"]),
    "claims": lambda name: claims_table(result(name)["claims"]),
    "reconstructions": lambda name: reconstructions_table(result(name)["reconstructions"]),
    "curves": lambda name: curves_table(result(name)["curves"], result(name)["claims"]),
    "budget": lambda name: budget_table(result(name)["rows"], result(name)["real_images"]),
    "adaptive": lambda name: adaptive.adaptive_table(result(name)["rows"]),
    "seen": lambda name: claims_table(result(name)["claims"], adaptive.BUDGETS),
    "parts": lambda name, steps: dcdit.table(result(name)["arms"], int(steps)),
    "shares": lambda name: dcdit.shares_table(result(name)["arms"]),
    "claims_of_parts": lambda name: dcdit.claims_table(result(name)["arms"]),
    "lengths": lambda name: lengths_table(result(name)["lengths"]),
    "judged": lambda name: judged_table(result(name)["rows"]),
    "goals": goals_table,
    "models": lambda name: models_table(result(name)["models"]),
    "cores": lambda rates, models: cores_table(result(rates)["rates"], result(models)["models"]),
    "runs": lambda name: runs_table(result(name)["models"]),
    "savers": lambda name: savers_table(result(name)["savers"]),
    "coherence": coherence,
    "in_painted": in_painted,
    "seams": seams,
}


def filled(page: str) -> str:
    """A page with its tables as the results have them."""

    def fill(match: re.Match) -> str:
        name, *of = match[2].split()
        return match[1] + FIGURES[name](*of) + match[3]

    return PLACE.sub(fill, page)


if __name__ == "__main__":
    for path in sorted((ROOT / "docs").glob("*.md")):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
