# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Figure 5 of arXiv:2504.09454: reconstruction and generation at fine ratios 0, 0.3, 0.5, 0.7 and 1.

    python reproduction/figure_5.py --data tiny-imagenet-20 --work_dir runs/reproduction

A content model and a grain model are trained for each ratio. One autoencoder serves all ratios; its reconstructions
are those of the validation images. At ratio 0 there is nothing to refine, and all layers are the backbone's. Ratios 0
and 1 need no map to be predicted: samples with the maps of photographs tell what prediction costs the others.
"""

from plots import plot_ratios
from report import Claim, Row, markdown_table, open_study, score_table
from scoring import Scorer
from study import make_parser

from diffusers_d2it.evaluation.reconstruction import psnr
from diffusers_d2it.pixels import from_uint8


RATIOS = (0.0, 0.3, 0.5, 0.7, 1.0)
ROWS = [
    Row("ratio 0", "ratio-0", paper=51.33),
    Row("ratio 0.3", "ratio-0.3"),
    Row("ratio 0.5", "d2it", paper=22.11),
    Row("ratio 0.7", "ratio-0.7", paper=23.64),
    Row("ratio 1", "ratio-1", paper=29.15),
    Row("ratio 0.3, true maps", "ratio-0.3", "true"),
    Row("ratio 0.5, true maps", "d2it", "true"),
    Row("ratio 0.7, true maps", "ratio-0.7", "true"),
]
CLAIMS = [
    Claim("half fine generates better than all coarse", "ratio 0.5", "ratio 0"),
    Claim("half fine generates better than all fine", "ratio 0.5", "ratio 1"),
    Claim("0.7 generates better than all fine", "ratio 0.7", "ratio 1"),
    Claim("half fine generates better than 0.7", "ratio 0.5", "ratio 0.7"),
    Claim("half fine with true maps generates better than all fine", "ratio 0.5, true maps", "ratio 1"),
    Claim("0.7 with true maps generates better than all fine", "ratio 0.7, true maps", "ratio 1"),
]


def reconstructions(scorer: Scorer) -> dict[str, dict[str, float]]:
    """Frechet distance to their originals (rFID's counterpart) and PSNR of validation images, by ratio."""
    images = scorer.validation[0]
    originals, found = scorer.statistics(images), {}
    for ratio in RATIOS:
        reconstructed = scorer.reconstructions("validation", ratio)
        scores = psnr(from_uint8(images), from_uint8(reconstructed))
        distance = scorer.distance(reconstructed, originals)
        found[f"ratio {ratio:g}"] = {"frechet_distance": distance, "psnr_db": scores.mean().item()}
    return found


def reconstructions_table(found: dict[str, dict[str, float]]) -> str:
    """`reconstructions` as Markdown."""
    head = ["", "reconstructions, Fréchet distance to the originals", "PSNR"]
    rows = ([label, f"{row['frechet_distance']:.2f}", f"{row['psnr_db']:.2f} dB"] for label, row in found.items())
    return markdown_table(head, *rows)


def main() -> None:
    with open_study(make_parser(__doc__)) as (args, scorer):
        reconstructed = reconstructions(scorer)
        print(reconstructions_table(reconstructed))
        table = score_table(scorer, args, "figure_5", ROWS, CLAIMS, reconstructions=reconstructed)
    drawn = {label: row for label, row in table.items() if row["source"] == "predicted"}
    plot_ratios(args.output_dir / f"figure_5-{args.preset}.png", RATIOS, list(reconstructed.values()), drawn)


if __name__ == "__main__":
    main()
