# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The plots of docs/reproduction.md: means over the seeds, and the range from the lowest to the highest of them."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from diffusers_d2it.files import durable_file


def plot_ratios(path: Path, ratios: Sequence[float], reconstructions: Sequence[dict], table: dict[str, dict]) -> None:
    """Reconstruction and generation over the fine ratio."""
    figure, (left, right) = _figure()
    left.plot(ratios, [row["frechet_distance"] for row in reconstructions], "o-", color="black")
    left.set(title="reconstruction", xlabel="fine ratio", ylabel="Fréchet distance")
    for budget, label in (("equal_steps", "equal steps"), ("equal_seconds", "equal seconds")):
        _draw(right, ratios, [row[budget]["frechet_distance"] for row in table.values()], label)
    right.set(title="generation", xlabel="fine ratio", ylabel="Fréchet distance")
    right.legend()
    _save(figure, path)


def plot_curves(path: Path, curves: dict[str, list[dict]]) -> None:
    """Fréchet distance over training steps, and over seconds of training."""
    figure, both = _figure()
    for axes, unit in zip(both, ("steps", "seconds")):
        for label, points in curves.items():
            _draw(axes, [point[unit] for point in points], [point["frechet_distance"] for point in points], label)
        axes.set(xlabel=f"{unit} of training", ylabel="Fréchet distance")
        axes.legend()
    _save(figure, path)


def plot_costs(path: Path, table: dict[str, dict]) -> None:
    """Fréchet distance after equal updates over what the rows of each model cost to draw; guided ones are left out."""
    figure, both = _figure()
    plain = {name: row for name, row in table.items() if name.count(",") == 1}
    for axes, (cost, title) in zip(both, (("gmac", "GMAC of an image"), ("milliseconds", "milliseconds of a step"))):
        for arm in dict.fromkeys(row["arm"] for row in plain.values()):
            points = {name: row for name, row in plain.items() if row["arm"] == arm}
            positions = [row[cost] for row in points.values()]
            distances = [row["equal_steps"]["frechet_distance"] for row in points.values()]
            _draw(axes, positions, distances, next(iter(points)).split(",")[0])
            for name, place in zip(points, zip(positions, map(statistics.mean, distances))):
                axes.annotate(name.split(", ")[1], place, xytext=(4, 4), textcoords="offset points", fontsize="small")
        axes.set(xlabel=title, ylabel="Fréchet distance", xlim=(0, None))
        axes.legend()
    _save(figure, path)


def _figure() -> tuple:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    return figure, figure.subplots(1, 2)


def _draw(axes, positions: Sequence[float], values: Sequence[Sequence[float]], label: str) -> None:
    (line,) = axes.plot(positions, [statistics.mean(of_seeds) for of_seeds in values], "o-", label=label)
    axes.fill_between(positions, *zip(*((min(v), max(v)) for v in values)), color=line.get_color(), alpha=0.2)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable_file(path) as staged:
        figure.savefig(staged, dpi=100)
