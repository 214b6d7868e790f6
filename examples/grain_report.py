# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Table 5 of arXiv:2504.09454 on one checkpoint, and diagnostics of its grain maps.

    accelerate launch examples/grain_report.py --checkpoint runs/d2it/pipeline --train_data_dir photos \
        --features inception --num_images 1000 --output report.json
    accelerate launch examples/grain_report.py --dataset_name tiny-imagenet-20 --split validation \
        --num_images 500 --num_reference_images 500 --features package.module:callable --output report.json

The second form reports on the bundled checkpoint. Images are drawn with maps of five sources: those of real images of
the class (true), of the grain model (predicted), random ones of the same share, all coarse, all fine. Labels and noise
are the same in every row, and real images of the same data set, but others than those that gave the maps, are what the
samples are compared with. All that was measured goes into the file with its protocol; what matters is printed.
"""

import argparse
import json
import os
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from diffusers_d2it.data.bad_images import BadImages
from diffusers_d2it.evaluation import compute_exactly
from diffusers_d2it.evaluation.grain_report import grain_diagnostics, maps_of_sources, report_text, table_5
from diffusers_d2it.evaluation.report_inputs import (
    check_report_arguments,
    finite,
    load_checkpoint,
    load_labelled_images,
    load_report_features,
    sampling_of,
    score_real_images,
)
from diffusers_d2it.files.folders import write_text_durably
from flags import add_report_arguments


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_report_arguments(parser)
    parser.add_argument("--output", default="grain_report.json", help="JSON file for the report")
    args = parser.parse_args(arguments)
    if os.path.exists(args.output):
        parser.error(f"{args.output} exists: remove it, or name another file")
    return args


def main(args: argparse.Namespace) -> None:
    compute_exactly()
    check_report_arguments(args)
    # The others wait while the main process compares features
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))])
    pipe, protocol = load_checkpoint(args, accelerator)
    features = load_report_features(args, accelerator)
    bad_images = BadImages(f"{os.path.normpath(args.output)}.bad_images.jsonl")
    if accelerator.is_main_process:
        bad_images.path.unlink(missing_ok=True)  # of an earlier report
    accelerator.wait_for_everyone()
    data = load_labelled_images(args, pipe, bad_images, accelerator)
    accelerator.print(f"{data.description}: {len(data.images)} images with their maps, {len(data.reference)} others")

    sampling = sampling_of(args)
    real = score_real_images(args, data, features, sampling, accelerator)
    maps = maps_of_sources(pipe, data.images, data.labels, sampling, accelerator=accelerator)
    rows = table_5(
        pipe,
        maps,
        data.labels,
        data.reference,
        features,
        sampling,
        args.metrics,
        accelerator,
        protocol,
        progress=True,
    )
    diagnostics = grain_diagnostics(pipe, data.images, data.labels, maps, sampling, accelerator=accelerator)
    if accelerator.is_main_process:
        protocol |= {"data": data.description, "num_images": args.num_images}
        protocol |= sampling.describe()
        report = {"protocol": protocol, "table_5": rows, "real_images": real, "diagnostics": diagnostics}
        write_text_durably(Path(args.output).absolute(), json.dumps(finite(report), indent=2) + "\n")
        print(report_text(rows, real, diagnostics))
        if bad_images.summary():
            print(bad_images.summary())
        print(f"{args.output}: all of it, with the protocol")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
