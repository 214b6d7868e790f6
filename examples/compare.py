# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Compare the metrics of two files of evaluate.py, if they were measured alike.

    python examples/compare.py baseline.json ours.json
    python examples/compare.py steps-50.json steps-250.json --varying samples.num_inference_steps

Protocols may differ in the checkpoint, and in the fields of --varying, with all that they hold. If they differ in
anything else, each field is named with both values, nothing is compared, and the exit status is 2.
"""

import argparse

from command_line import begin, make_parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("a", help="JSON file of evaluate.py")
    parser.add_argument("b", help="another one")
    parser.add_argument(
        "--varying",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="dotted names of fields that may differ besides samples.checkpoint",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    ARGS = begin(parse_args)  # before torch is imported, which takes seconds

import sys

from diffusers_d2it.evaluation.results import Result, compare, load_results


def by_metric(path: str) -> dict[str, Result]:
    """The results of a file."""
    results = load_results(path)
    metrics = [result.metric for result in results]
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"{path} must hold a metric once, got {', '.join(metrics)}.")
    return dict(zip(metrics, results))


def main(args: argparse.Namespace) -> None:
    a, b = by_metric(args.a), by_metric(args.b)
    shared = [metric for metric in a if metric in b]
    lines = [f"{'':>24}{'a':>14}{'b':>14}{'b - a':>14}"] if shared else []
    refusals = [] if shared else [f"{args.a} and {args.b} have no metric in common: {', '.join(a)}; {', '.join(b)}."]
    for metric in shared:
        try:
            difference = compare(a[metric], b[metric], ("samples.checkpoint", *args.varying))
        except ValueError as error:
            refusals.append(f"{args.a}, {args.b}: {error}")
        else:
            lines.append(f"{metric:>24}{a[metric].value:>14.6g}{b[metric].value:>14.6g}{difference:>14.6g}")
    if refusals:
        print("\n".join(refusals), file=sys.stderr)
        sys.exit(2)
    print("\n".join(lines))
    for path, ours, theirs in ((args.a, a, b), (args.b, b, a)):
        alone = [metric for metric in ours if metric not in theirs]
        if alone:
            print(f"only in {path}: {', '.join(alone)}")
    for path, ours in ((args.a, a), (args.b, b)):
        if any("checkpoint" not in result.protocol["samples"] for result in ours.values()):
            print(f"{path} does not say how its samples were drawn: they had no protocol.json")


if __name__ == "__main__":
    main(ARGS)
