# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Table 5 of arXiv:2504.09454 on one checkpoint, and diagnostics of its grain maps.

    python examples/grain_report.py --checkpoint runs/d2it/pipeline --train_data_dir photos \
        --features inception --num_images 1000 --output report.json
    python examples/grain_report.py --dataset_name tiny-imagenet-20 --split validation \
        --num_images 500 --num_reference_images 500 --features package.module:callable --output report.json

The second form reports on the bundled checkpoint. Images are drawn with maps of five sources: those of real images of
the class (true), of the grain model (predicted), random ones of the same share, all coarse, all fine. Labels and noise
are the same in every row, and real images of the same data set, but others than those that gave the maps, are what the
samples are compared with. All that was measured goes into the file with its protocol; what matters is printed.
"""

import argparse
import os

from command_line import begin, make_parser, output_file
from flags import add_report_arguments


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_report_arguments(parser)
    parser.add_argument("--output", type=output_file, default="grain_report.json", help="JSON file for the report")
    args = parser.parse_args(arguments)
    if os.path.exists(args.output):
        parser.error(f"{args.output} exists: remove it, or name another file")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from diffusers_d2it import D2iTPipeline
from diffusers_d2it.evaluation import (
    MAP_SOURCES,
    Drawing,
    Evaluator,
    compare,
    grain_diagnostics,
    map_accuracy,
    save_report,
    spatial_autocorrelation,
)
from diffusers_d2it.grains import fine_share
from diffusers_d2it.words import counted
from report_inputs import in_words, markdown_table, prepare


def table_5(drawing: Drawing, maps: Mapping[str, torch.Tensor], evaluator: Evaluator) -> list[dict]:
    """How good images are by where their maps come from.

    Args:
        drawing: how images are drawn.
        maps: the maps of each row, (N, h, w) int64, by the name of the row, such as those of `Drawing.maps`.
        evaluator: metrics and reference. If the real images that the maps were taken from are among the reference, the
            true maps are at an advantage.

    Returns:
        For each row: "map", its name; "results" of `evaluate`; "fine_share" and "autocorrelation" of its maps;
        "agreement", `map_accuracy` of the maps by entropy of the images that came out against those they were drawn
        with.

    Raises:
        ValueError: from `compare`.
    """
    num_grains, side = drawing.pipe.transformer.config.num_grains, drawing.pipe.vae.region_size
    num_images, height, width = next(iter(maps.values())).shape
    arguments = {source: {"grain_map": asked} for source, asked in maps.items()}
    shape = (num_images, 3, height * side, width * side)
    rows = compare(drawing, arguments, evaluator, shape, title="samples with {} maps", progress=True)
    return [
        {
            "map": row.name,
            "results": row.results,
            "fine_share": fine_share(maps[row.name], num_grains).mean().item(),
            "autocorrelation": spatial_autocorrelation(maps[row.name], num_grains)["autocorrelation"],
            "agreement": map_accuracy(drawing.true_maps(row.images), maps[row.name], num_grains),
        }
        for row in rows
    ]


def report_text(rows: Sequence[dict], real: Sequence[dict], diagnostics: dict) -> str:
    """The rows of `table_5` as a Markdown table, and what `grain_diagnostics` found below it.

    Args:
        rows: of `table_5`.
        real: results of real images in the place of samples: no map makes them better.
        diagnostics: of `grain_diagnostics`.
    """
    metrics = [result["metric"] for result in real]
    cells = [["map", *metrics, "fine share", "autocorrelation", "map of the image", "by chance"]]
    for row in rows:
        numbers = (row["fine_share"], row["autocorrelation"], row["agreement"]["accuracy"], row["agreement"]["chance"])
        cells.append([row["map"], *in_words(row["results"]), *(f"{value:.3f}" for value in numbers)])
    cells.append(["real images", *in_words(real), *[""] * 4])

    share, of_maps = diagnostics["fine_ratio_error"], diagnostics["autocorrelation"]
    accuracy, errors = diagnostics["grain_model_accuracy"], diagnostics["error_by_grain"]
    lines = [
        "",
        "map of the image: share of regions whose grain, by the entropy of the image, is that of the map asked for",
        f"fine share of an image: predicted {share['fine_share']:.3f} +- {share['std']:.3f}, true"
        f" {share['fine_share_real']:.3f} +- {share['std_real']:.3f}, Wasserstein distance {share['wasserstein']:.3f}",
        f"predicted maps against true ones: accuracy {diagnostics['map_accuracy']['accuracy']:.3f},"
        f" chance {diagnostics['map_accuracy']['chance']:.3f}",
        "autocorrelation: " + ", ".join(f"{of} {one['autocorrelation']:.3f}" for of, one in of_maps.items()),
        "accuracy of the grain model on noised true maps: "
        + ", ".join(f"t={t} {one['accuracy']:.3f} (chance {one['chance']:.3f})" for t, one in accuracy.items()),
        "denoising error by grain, coarsest first: "
        + ", ".join(f"t={t} {' / '.join(f'{e:.4f}' for e in grains)}" for t, grains in errors["denoising"].items()),
        "PSNR of reconstructions by grain, dB: "
        + " / ".join(f"{value:.2f}" for value in errors["reconstruction_psnr_db"]),
    ]
    return markdown_table(cells) + "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    report = prepare(args, Path(f"{os.path.normpath(args.output)}.bad_images.jsonl"))
    accelerator = report.accelerator
    ((name, drawing),) = report.drawings.items()
    if not isinstance(drawing.pipe, D2iTPipeline):
        raise ValueError(f"--checkpoint {name} must be of D2iT, which has maps, got {type(drawing.pipe).__name__}.")
    images, others = counted(args.num_images, "image"), counted(args.num_reference_images, "other")
    accelerator.print(f"{report.description}: {images} with their maps, {others}")

    true_maps = drawing.true_maps(report.images)
    maps = {source: drawing.maps(source, true_maps) for source in MAP_SOURCES}
    rows = table_5(drawing, maps, report.evaluator)
    diagnostics = grain_diagnostics(drawing, report.images, maps)
    if accelerator.is_main_process:
        found = {"table_5": rows, "real_images": report.real, "diagnostics": diagnostics}
        print(report_text(rows, report.real, diagnostics))  # before it is saved, which may fail
        save_report(args.output, {"protocol": report.describe() | drawing.describe(), **found})
        if report.bad_images.summary():
            print(report.bad_images.summary())
        print(f"{args.output}: all of it, with the protocol")
    accelerator.end_training()


if __name__ == "__main__":
    main(ARGS)
