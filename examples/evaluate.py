# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
r"""Measure samples or an autoencoder, and write the metrics with the protocol they were measured by.

    python examples/evaluate.py --samples samples --reference imagenet --split validation --resolution 256 \
        --metrics fid sfid is precision recall --output results.json

Samples against real images: fid, sfid, is, precision, recall, kid, top1. Pairs of images, files of one name: psnr,
ssim, lpips, rfid, top1. Either side is a folder of images or an .npz with `arr_0`, uint8 NHWC. The reference may be a
data set too, which is resized to --resolution, or an .npz of statistics, mu and sigma, such as ADM's or those written
by

    python examples/evaluate.py --reference imagenet --resolution 256 --save_statistics imagenet-256.npz

An autoencoder is measured on the reference, by psnr, ssim, lpips, rfid or top1:

    python examples/evaluate.py --reconstruction runs/dvae/vae --fine_ratio 0.5 --reference imagenet \
        --split validation --resolution 256 --metrics psnr ssim rfid --output reconstruction.json

--features is inception, whose weights are downloaded or given by --weights; efficientnet-lite2, a classifier of
ImageNet that comes with packages (extra judge): top1 is the share of images that it finds in their class; a folder or
Hub name of a vision transformer, facebook/dinov2-large for FD-DINOv2; or module:callable, which returns any network
from images (B, 3, H, W) in [-1, 1] to features (B, D). compare.py compares two files of results, if they were measured
alike.
"""

import argparse
import os

from command_line import begin, make_parser, natural, number, output_file, positive, share
from flags import METRICS, PAIR_METRICS


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--samples", help="folder of images, or .npz: from sample.py or from elsewhere")
    task.add_argument("--reconstruction", metavar="CHECKPOINT", help="a pipeline, or a DynamicAutoencoderKL")
    task.add_argument(
        "--save_statistics", type=output_file, metavar="FILE", help="write statistics of --reference to this .npz"
    )
    parser.add_argument(
        "--reference", help="folder, .npz of images or statistics, or data set; 'is' and 'top1' need none"
    )
    parser.add_argument(
        "--resolution", type=positive, help="the reference is a data set, resized and cropped to this side"
    )
    parser.add_argument(
        "--split", help="of a data set, or of a folder with sub-folders train, val, ...; default: train"
    )
    parser.add_argument("--image_column", help="of a data set; default: the only one that holds images")
    parser.add_argument(
        "--metrics", nargs="+", choices=list(dict.fromkeys(METRICS + PAIR_METRICS)), default=[], metavar="METRIC"
    )
    parser.add_argument(
        "--features",
        default="inception",
        help="inception, efficientnet-lite2, a vision transformer, or module:callable",
    )
    parser.add_argument("--weights", help="file of Inception's weights; default: downloaded")
    parser.add_argument("--fine_ratio", type=share, help="with --reconstruction; default: that of the checkpoint")
    parser.add_argument(
        "--kid_subset_size", type=number(int, 2), default=1000, help="images of each set in a subset of kid"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of the subsets of kid")
    parser.add_argument("--batch_size", type=positive, default=64, help="images of a batch and process")
    parser.add_argument("--dataloader_num_workers", type=natural, default=0, help="processes that decode images")
    parser.add_argument("--output", type=output_file, help="JSON file for the results")
    args = parser.parse_args(arguments)
    if args.save_statistics is None and not (args.metrics and args.output):
        parser.error("pass --metrics and --output")
    if args.save_statistics is not None and (args.metrics or args.output):
        parser.error("--save_statistics computes no metrics: pass neither --metrics nor --output")
    if args.reference is None and (args.samples is None or not set(args.metrics) <= {"is", "top1"}):
        parser.error("--reference is needed, but for the metrics 'is' and 'top1' of --samples")
    if args.reconstruction is None and args.fine_ratio is not None:
        parser.error("--fine_ratio belongs to --reconstruction")
    if args.reconstruction is not None and not set(args.metrics) <= set(PAIR_METRICS):
        parser.error(f"--reconstruction is measured by {', '.join(PAIR_METRICS)}")
    for path in (args.output, args.save_statistics):
        if path is not None and os.path.exists(path):
            parser.error(f"{path} exists: remove it, or name another file")
    return args


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import sys
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from diffusers_d2it import DynamicAutoencoderKL
from diffusers_d2it.evaluation import (
    ImageSet,
    compute_exactly,
    evaluate,
    evaluate_pairs,
    evaluate_reconstructions,
    load_features,
    open_images,
    open_reference,
    save_results,
    save_statistics,
)
from diffusers_d2it.words import counted


def load_autoencoder(path: str) -> DynamicAutoencoderKL:
    """The autoencoder of a pipeline's folder, or one by itself."""
    subfolder = "vae" if os.path.isdir(os.path.join(path, "vae")) else None
    return DynamicAutoencoderKL.from_pretrained(path, subfolder=subfolder).eval()


def main(args: argparse.Namespace) -> None:
    compute_exactly()
    # The others wait while the main process compares the features of all images
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))])
    reading = {
        "batch_size": args.batch_size,
        "accelerator": accelerator,
        "num_workers": args.dataloader_num_workers,
    }
    features = reference = None
    if args.save_statistics or not set(args.metrics) <= {"psnr", "ssim", "lpips"}:
        sys.path.append(os.getcwd())  # where the module of --features module:callable may lie
        with accelerator.main_process_first():  # which downloads
            features = load_features(args.features, args.weights)
    if args.reference is not None:
        with accelerator.main_process_first():
            reference = open_reference(args.reference, args.resolution, args.split, args.image_column)
    of_sets = [metric for metric in args.metrics if metric in METRICS]
    of_pairs = [metric for metric in args.metrics if metric in PAIR_METRICS and metric not in of_sets]
    if args.reconstruction is not None:
        of_sets, of_pairs = [], args.metrics
    if not isinstance(reference, ImageSet) and (of_pairs or args.save_statistics):
        raise ValueError(f"--reference {args.reference} holds statistics, expected images.")

    if args.save_statistics:
        number = save_statistics(args.save_statistics, reference, features, **reading)
        accelerator.print(f"{args.save_statistics}: {features.name}, {counted(number, 'image')} of {reference.name}")
        return
    if args.reconstruction is not None:
        vae = load_autoencoder(args.reconstruction)
        results = evaluate_reconstructions(vae, reference, of_pairs, features, fine_ratio=args.fine_ratio, **reading)
    else:
        samples, results = open_images(args.samples), []
        if of_pairs:  # before the sets, which take longer to find that something is missing
            results = evaluate_pairs(samples, reference, of_pairs, features, **reading)
        if of_sets:
            kid = {"seed": args.seed, "kid_subset_size": args.kid_subset_size}
            results = evaluate(samples, reference, of_sets, features, **kid, **reading) + results

    if accelerator.is_main_process:
        for result in results:  # before they are saved, which may fail
            deviation = "" if result.deviation is None else f" +- {result.deviation:.6g}"
            print(f"{result.metric:>24}  {result.value:.6g}{deviation}")
        save_results(args.output, results)
        print(f"{args.output}: {counted(len(results), 'result')} with the protocol")


if __name__ == "__main__":
    main(ARGS)
