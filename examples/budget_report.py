# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Checkpoints under several budgets: quality and cost of D2iT and DC-DiT on one data set.

    python examples/budget_report.py --checkpoint runs/d2it/pipeline runs/dcdit/pipeline --train_data_dir photos \
        --features inception --num_images 1000 --budgets 0.25 0.5 0.75 1 --output_dir budget

A budget is the share of fine regions of D2iT, whose grain model draws maps that have it exactly, and of DC-DiT the
share of the cells that its router would keep. Writes budget.json (all numbers with their protocols), budget.md (a
table) and budget.png (a plot). Labels and noise are the same in all rows. Seconds are medians over batches of the rows
in turns, so a machine that is busy with other things slows all of them alike.
"""

import argparse
from pathlib import Path

from command_line import begin, make_parser, output_folder, share
from flags import add_report_arguments


BUDGETS = (0.25, 0.5, 0.75, 1.0)
FILES = ("budget.json", "budget.md", "budget.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_report_arguments(parser, several=True)
    parser.add_argument("--budgets", type=share, nargs="+", default=list(BUDGETS), help="of each checkpoint")
    parser.add_argument(
        "--output_dir", type=output_folder, default="budget", help="folder for budget.json, budget.md and budget.png"
    )
    args = parser.parse_args(arguments)
    for name in FILES:
        if Path(args.output_dir, name).exists():
            parser.error(f"{Path(args.output_dir, name)} exists: remove it, or name another folder")
    if len(set(args.budgets)) < len(args.budgets):
        parser.error(f"argument --budgets: must be different shares, got {args.budgets}")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import platform
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator

from diffusers_d2it import D2iTPipeline
from diffusers_d2it.evaluation import (
    Drawing,
    Evaluator,
    compare,
    reconstruct,
    save_report,
)
from diffusers_d2it.files import durable_file
from diffusers_d2it.optional import import_optional
from diffusers_d2it.words import counted
from report_inputs import in_words, markdown_table, prepare


def budget(
    drawings: Mapping[str, Drawing], images: torch.Tensor, evaluator: Evaluator, budgets: Sequence[float]
) -> list[dict]:
    """Quality and cost of checkpoints at several budgets.

    Args:
        drawings: how images are drawn, by checkpoint.
        images: real images (N, 3, H, W) uint8, to be reconstructed.
        evaluator: metrics and reference.
        budgets: of each checkpoint.

    Returns:
        For each row: "checkpoint"; "budget"; "results" of `evaluate`; "tokens" of an image in a pass, by stage;
        "gmac", 10^9 multiply-adds of an image in all its passes; "seconds_per_image", median over the calls of the
        pipeline, from labels to images; "seconds_per_step", median over denoising steps, both passes if guided, for
        one image: None with a single step; of D2iT `reconstruction_at` that ratio.

    Raises:
        ValueError: a model has no such budget, or from `compare`.
    """
    asked = {f"{name}, {budget:g}": (name, budget) for name in drawings for budget in budgets}
    arguments = {row: drawings[name].pipe.transformer.budget_argument.at(one) for row, (name, one) in asked.items()}
    found = compare(
        {row: drawings[name] for row, (name, _) in asked.items()},
        arguments,
        evaluator,
        tuple(images.shape),
        title="samples of {}",
        costs=True,
        progress=True,
    )
    rows = []
    for row, (name, one) in zip(found, asked.values()):
        cost = {key: value for key, value in row.cost.items() if key != "macs"} | {"gmac": row.cost["macs"] / 1e9}
        rows.append({"checkpoint": name, "budget": one, "results": row.results, **cost})
        if isinstance(drawings[name].pipe, D2iTPipeline):
            rows[-1] |= reconstruction_at(drawings[name], images, one)
    return rows


def reconstruction_at(drawing: Drawing, images: torch.Tensor, fine_ratio: float) -> dict[str, float]:
    """Reconstruction from the mode of the posterior at a fine ratio: mean PSNR of the images, and their fine share.

    Args:
        drawing: the checkpoint, batch size.
        images: (N, 3, H, W) uint8.
        fine_ratio: in [0, 1], over the images that the thresholds were counted on.

    Returns:
        "reconstruction_psnr_db" and "reconstruction_fine_share".
    """

    def measure(numbers: slice) -> torch.Tensor:
        decoded, shares = reconstruct(drawing.pipe.vae, images[numbers], fine_ratio)
        error = (decoded.double() - images[numbers].to(decoded.device)).square().mean(dim=(1, 2, 3))
        return torch.stack([10 * (255**2 / error).log10(), shares], dim=1)

    measured = drawing.over_images(measure, torch.zeros(len(images), 2, dtype=torch.float64))
    return dict(zip(("reconstruction_psnr_db", "reconstruction_fine_share"), measured.mean(dim=0).tolist()))


def budget_table(rows: Sequence[dict], real: Sequence[dict]) -> str:
    """The rows of `budget` as a Markdown table, under them the results of real images in the place of samples."""
    metrics = [result["metric"] for result in real]
    cells = [["", "budget", *metrics, "PSNR, dB", "tokens", "GMAC / image", "s / image", "ms / step"]]
    for row in rows:
        step, psnr = row["seconds_per_step"], row.get("reconstruction_psnr_db")
        cells.append(
            [
                row["checkpoint"],
                f"{row['budget']:g}",
                *in_words(row["results"]),
                "" if psnr is None else f"{psnr:.2f}",
                " + ".join(f"{number:.4g}" for number in row["tokens"].values()),
                f"{row['gmac']:.3g}",
                f"{row['seconds_per_image']:.3g}",
                "" if step is None else f"{1e3 * step:.3g}",
            ]
        )
    cells.append(["real images", "", *in_words(real), *[""] * 5])
    return markdown_table(cells)


def check_matplotlib() -> None:
    """Raise a ValueError if matplotlib is missing or broken: a plot is drawn after hours of sampling."""
    import_optional("matplotlib.figure", "the plot of the budget", extra="metrics")


def plot_budget(rows: Sequence[dict], path: str | Path) -> None:
    """The rows of `budget` as a picture: each metric over multiply-adds and over seconds, a line a checkpoint."""
    from matplotlib.figure import Figure

    metrics = [result["metric"] for result in rows[0]["results"]]
    costs = {"gmac": "GMAC of an image, all steps", "seconds_per_image": "seconds of an image"}
    figure = Figure(figsize=(8, 3 * len(metrics)), layout="constrained")
    for of_metric, metric, panels in zip(
        range(len(metrics)), metrics, figure.subplots(len(metrics), 2, squeeze=False)
    ):
        for panel, (cost, title) in zip(panels, costs.items()):
            for name in dict.fromkeys(row["checkpoint"] for row in rows):
                points = [row for row in rows if row["checkpoint"] == name]
                x, y = [row[cost] for row in points], [row["results"][of_metric]["value"] for row in points]
                panel.plot(x, y, marker="o", label=name)
                for row, place in zip(points, zip(x, y)):
                    panel.annotate(f"{row['budget']:g}", place, xytext=(4, 4), textcoords="offset points")
            panel.set_xlabel(title)
            panel.set_ylabel(metric)
            panel.set_xlim(0, 1.1 * max(row[cost] for row in rows))
            panel.grid(alpha=0.3)
            panel.legend()
    figure.savefig(path, dpi=150, format="png")


def describe_machine(accelerator: Accelerator) -> dict[str, str | int]:
    """What seconds depend on, beside the checkpoint: device, processes, threads, version of torch."""
    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "num_processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main(args: argparse.Namespace) -> None:
    check_matplotlib()
    folder = Path(args.output_dir).absolute()
    report = prepare(args, folder / "bad_images.jsonl")
    accelerator = report.accelerator
    images, others = counted(args.num_images, "image"), counted(args.num_reference_images, "other")
    accelerator.print(f"{report.description}: {images} to reconstruct, {others}")

    rows = budget(report.drawings, report.images, report.evaluator, args.budgets)
    if accelerator.is_main_process:
        machine = describe_machine(accelerator)
        table = budget_table(rows, report.real)
        caption = (
            f"{counted(args.num_images, 'sample')} a row: {counted(args.num_inference_steps, 'step')},"
            f" guidance {args.guidance_scale:g}, seed {args.seed}, {args.dtype} on {machine['device']}."
            f" Compared with {counted(args.num_reference_images, 'image')} of {report.description}."
        )
        print(table, end="")  # before anything is saved, which may fail
        data_file, table_file, plot_file = (folder / name for name in FILES)
        checkpoints = {name: drawing.describe() for name, drawing in report.drawings.items()}
        protocol = report.describe() | {"machine": machine, "checkpoints": checkpoints}
        save_report(data_file, {"protocol": protocol, "rows": rows, "real_images": report.real})
        with durable_file(table_file) as staged:
            staged.write_text(f"{caption}\n\n{table}", encoding="utf-8")
        with durable_file(plot_file) as staged:
            plot_budget(rows, staged)
        if report.bad_images.summary():
            print(report.bad_images.summary())
        print(f"{args.output_dir}: {', '.join(FILES)}")
    accelerator.end_training()


if __name__ == "__main__":
    main(ARGS)
