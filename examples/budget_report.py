# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""One checkpoint, many budgets: quality and cost at several shares of fine regions.

    python examples/budget_report.py --checkpoint runs/d2it/pipeline --train_data_dir photos \
        --features inception --num_images 1000 --fine_ratios 0 0.25 0.5 0.75 1 --output_dir budget

Writes budget.json (all numbers with their protocols), budget.md (a table) and budget.png (a plot). At every ratio the
grain model draws maps that have it exactly; labels and noise stay the same. Seconds are medians over batches of the
ratios in turns, so a machine that is busy with other things slows all of them alike.
"""

import argparse
from pathlib import Path

from command_line import begin, make_parser, output_folder, share
from flags import add_report_arguments


RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
FILES = ("budget.json", "budget.md", "budget.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_report_arguments(parser)
    parser.add_argument("--fine_ratios", type=share, nargs="+", default=list(RATIOS), help="shares of fine regions")
    parser.add_argument(
        "--output_dir", type=output_folder, default="budget", help="folder for budget.json, budget.md and budget.png"
    )
    args = parser.parse_args(arguments)
    for name in FILES:
        if Path(args.output_dir, name).exists():
            parser.error(f"{Path(args.output_dir, name)} exists: remove it, or name another folder")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffusers_d2it.evaluation import (
    Drawing,
    Evaluator,
    compare,
    describe_machine,
    reconstruct,
    save_report,
)
from diffusers_d2it.files import durable_file
from diffusers_d2it.grains import check_fine_ratio, fine_share
from diffusers_d2it.optional import import_optional
from diffusers_d2it.words import counted
from report_inputs import in_words, markdown_table, prepare


def check_ratios(ratios: Sequence[float]) -> None:
    """Raise a ValueError unless --fine_ratios are different numbers in [0, 1]."""
    for ratio in ratios:
        check_fine_ratio(ratio, "fine_ratios")
    if len(set(ratios)) < len(ratios):
        raise ValueError(f"`fine_ratios` must be different numbers, got {list(ratios)}.")


def budget(
    drawing: Drawing,
    images: torch.Tensor,
    evaluator: Evaluator,
    ratios: Sequence[float],
    protocol: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[dict]:
    """Quality and cost of one checkpoint at several shares of fine regions.

    Maps are drawn by the grain model, each with its ratio to the nearest region.

    Args:
        drawing: how images are drawn.
        images: real images (N, 3, H, W) uint8, to be reconstructed.
        evaluator: metrics and reference.
        ratios: in [0, 1].
        protocol, progress: of `compare`.

    Returns:
        For each ratio: "fine_ratio"; "results" of `evaluate`; "fine_share" of the maps that were drawn;
        "reconstruction_psnr_db", mean over the images, and "reconstruction_fine_share", as thresholds meet a ratio
        over their data set only; "backbone_tokens" and "fine_tokens" of an image; "gmac_per_forward", 10^9
        multiply-adds of one image in one forward of the content model; "seconds_per_image", median over the calls of
        the pipeline, from labels to images; "seconds_per_step", median over denoising steps, both passes if guided,
        for one image: None with a single step.

    Raises:
        ValueError: a ratio lies outside [0, 1], or from `compare`.
    """
    argument = drawing.pipe.transformer.budget_argument
    num_grains = drawing.pipe.transformer.config.num_grains
    rows = compare(
        drawing,
        {f"{ratio:g}": argument.at(ratio) for ratio in ratios},
        evaluator,
        tuple(images.shape),
        title="samples at fine ratio {}",
        protocol={"grain_map": "predicted"} | dict(protocol or {}),
        costs=True,
        averaged=lambda output: {"fine_share": fine_share(output.grain_maps, num_grains)},
        progress=progress,
    )
    return [
        {
            "fine_ratio": ratio,
            "results": row.results,
            "fine_share": row.cost["averaged"]["fine_share"],
            "backbone_tokens": round(row.cost["tokens"]["backbone"]),
            "fine_tokens": row.cost["tokens"]["refine"],
            "gmac_per_forward": row.cost["macs_per_forward"] / 1e9,
            "seconds_per_image": row.cost["seconds_per_image"],
            "seconds_per_step": row.cost["seconds_per_step"],
        }
        | reconstruction_at(drawing, images, ratio)
        for ratio, row in zip(ratios, rows)
    ]


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
    cells = [["fine ratio", *metrics, "PSNR, dB", "tokens", "GMAC / forward pass", "s / image", "ms / step"]]
    for row in rows:
        step = row["seconds_per_step"]
        cells.append(
            [
                f"{row['fine_ratio']:g}",
                *in_words(row["results"]),
                f"{row['reconstruction_psnr_db']:.2f}",
                f"{row['backbone_tokens']} + {row['fine_tokens']:g}",
                f"{row['gmac_per_forward']:.3g}",
                f"{row['seconds_per_image']:.3g}",
                "" if step is None else f"{1e3 * step:.3g}",
            ]
        )
    cells.append(["real images", *in_words(real), *[""] * 5])
    return markdown_table(cells)


def check_matplotlib() -> None:
    """Raise a ValueError if matplotlib is missing or broken: a plot is drawn after hours of sampling."""
    import_optional("matplotlib.figure", "the plot of the budget", extra="metrics")


def plot_budget(rows: Sequence[dict], path: str | Path) -> None:
    """The rows of `budget` as a picture: quality and cost over the fine ratio."""
    check_matplotlib()
    from matplotlib.figure import Figure

    metrics = [result["metric"] for result in rows[0]["results"]]
    curves = {name: [row["results"][i]["value"] for row in rows] for i, name in enumerate(metrics)}
    curves["PSNR of reconstructions, dB"] = [row["reconstruction_psnr_db"] for row in rows]
    num_qualities = len(curves)
    curves["GMAC of a forward pass, one image"] = [row["gmac_per_forward"] for row in rows]
    curves["seconds of sampling, one image"] = [row["seconds_per_image"] for row in rows]
    figure = Figure(figsize=(6.4, 2.4 * -(-len(curves) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(curves) // 2), 2, squeeze=False).flatten()
    for i, (panel, (title, values)) in enumerate(zip(panels, curves.items())):
        panel.plot([row["fine_ratio"] for row in rows], values, marker="o")
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("fine ratio")
        if i >= num_qualities:  # costs are compared as shares of one another
            panel.set_ylim(0, 1.1 * max(values))
        panel.grid(alpha=0.3)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=150, format="png")


def main(args: argparse.Namespace) -> None:
    check_ratios(args.fine_ratios)
    check_matplotlib()
    folder = Path(args.output_dir).absolute()
    report = prepare(args, folder / "bad_images.jsonl")
    accelerator, drawing, data = report.accelerator, report.drawing, report.data
    images, others = counted(len(data.images), "image"), counted(len(data.reference), "other")
    accelerator.print(f"{data.description}: {images} to reconstruct, {others}")

    rows = budget(drawing, data.images, report.evaluator, args.fine_ratios, report.protocol, progress=True)
    if accelerator.is_main_process:
        machine = describe_machine(accelerator)
        table = budget_table(rows, report.real)
        caption = (
            f"{counted(args.num_images, 'sample')} at each ratio: {counted(args.num_inference_steps, 'step')},"
            f" guidance {args.guidance_scale:g}, seed {args.seed}, {args.dtype} on {machine['device']}."
            f" Compared with {counted(args.num_reference_images, 'image')} of {data.description}."
        )
        print(table, end="")  # before anything is saved, which may fail
        data_file, table_file, plot_file = (folder / name for name in FILES)
        protocol = report.describe() | {"machine": machine}
        save_report(data_file, {"protocol": protocol, "ratios": rows, "real_images": report.real})
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
