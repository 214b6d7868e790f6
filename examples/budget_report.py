# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""One checkpoint, many budgets: quality and cost at several shares of fine regions.

    accelerate launch examples/budget_report.py --checkpoint runs/d2it/pipeline --train_data_dir photos \
        --features inception --num_images 1000 --fine_ratios 0 0.25 0.5 0.75 1 --output_dir budget

Writes budget.json (all figures with their protocols), budget.md (a table) and budget.png (a plot). At every ratio the
grain model draws maps that have it exactly; labels and noise stay the same. Seconds are medians over batches of the
ratios in turns, so a machine that is busy with other things slows all of them alike.
"""

import argparse
import json
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from diffusers_d2it.data.bad_images import BadImages
from diffusers_d2it.evaluation import compute_exactly
from diffusers_d2it.evaluation.budget import (
    RATIOS,
    budget,
    budget_table,
    check_matplotlib,
    check_ratios,
    describe_machine,
    plot_budget,
)
from diffusers_d2it.evaluation.report_inputs import (
    check_report_arguments,
    finite,
    load_checkpoint,
    load_labelled_images,
    load_report_features,
    sampling_of,
    score_real_images,
)
from diffusers_d2it.files.folders import write_durably, write_text_durably
from flags import add_report_arguments


FILES = ("budget.json", "budget.md", "budget.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_report_arguments(parser)
    parser.add_argument("--fine_ratios", type=float, nargs="+", default=list(RATIOS), help="shares of fine regions")
    parser.add_argument("--output_dir", default="budget", help="folder for budget.json, budget.md and budget.png")
    args = parser.parse_args(arguments)
    for name in FILES:
        if Path(args.output_dir, name).exists():
            parser.error(f"{Path(args.output_dir, name)} exists: remove it, or name another folder")
    return args


def main(args: argparse.Namespace) -> None:
    compute_exactly()
    check_report_arguments(args)
    check_ratios(args.fine_ratios, name="--fine_ratios")
    check_matplotlib()
    # The others wait while the main process compares features
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))])
    pipe, protocol = load_checkpoint(args, accelerator)
    features = load_report_features(args, accelerator)
    folder = Path(args.output_dir).absolute()
    bad_images = BadImages(folder / "bad_images.jsonl")
    if accelerator.is_main_process:
        bad_images.path.unlink(missing_ok=True)  # of an earlier report
    accelerator.wait_for_everyone()
    data = load_labelled_images(args, pipe, bad_images, accelerator)
    accelerator.print(f"{data.description}: {len(data.images)} images to reconstruct, {len(data.reference)} others")

    sampling = sampling_of(args)
    real = score_real_images(args, data, features, sampling, accelerator)
    rows = budget(
        pipe,
        data.images,
        data.labels,
        data.reference,
        features,
        sampling,
        args.fine_ratios,
        args.metrics,
        accelerator,
        protocol,
        progress=True,
    )
    if accelerator.is_main_process:
        protocol |= {"data": data.description, "num_images": args.num_images}
        protocol |= sampling.describe() | {"machine": describe_machine(accelerator)}
        table = budget_table(rows, real)
        caption = (
            f"{args.num_images} samples at each ratio: {args.num_inference_steps} steps, guidance"
            f" {args.guidance_scale:g}, seed {args.seed}, {args.dtype} on {protocol['machine']['device']}."
            f" Compared with {args.num_reference_images} images of {data.description}."
        )
        folder.mkdir(parents=True, exist_ok=True)
        report = json.dumps(finite({"protocol": protocol, "ratios": rows, "real_images": real}), indent=2)
        data_file, table_file, plot_file = (folder / name for name in FILES)
        write_text_durably(data_file, report + "\n")
        write_text_durably(table_file, f"{caption}\n\n{table}")
        write_durably(plot_file, lambda path: plot_budget(rows, path))
        print(table, end="")
        if bad_images.summary():
            print(bad_images.summary())
        print(f"{args.output_dir}: {', '.join(FILES)}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
