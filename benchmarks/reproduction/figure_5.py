# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Figure 5 of arXiv:2504.09454: reconstruction and generation at fine ratios 0, 0.3, 0.5, 0.7 and 1.

    python benchmarks/reproduction/figure_5.py --data tiny-imagenet-20 --work_dir runs/reproduction

A content model is trained for each ratio and sampled with the maps of photographs at that ratio. One autoencoder
serves all ratios; its reconstructions are those of the validation images. At ratio 0 there is nothing to refine, and
all layers are the backbone's.
"""

import torch
from plots import plot_ratios
from report import Claim, Row, judge, parse, print_claims, print_table, protocol, score_rows
from scoring import BATCH, Scorer, to_uint8
from study import Study, write_json

from diffusers_d2it.metrics.reconstruction import psnr


RATIOS = (0.0, 0.3, 0.5, 0.7, 1.0)
ROWS = [
    Row("ratio 0", "ratio-0", "true", 51.33),
    Row("ratio 0.3", "ratio-0.3", "true"),
    Row("ratio 0.5", "d2it", "true", 22.11),
    Row("ratio 0.7", "ratio-0.7", "true", 23.64),
    Row("ratio 1", "ratio-1", "true", 29.15),
]
CLAIMS = [
    Claim("half fine generates better than all coarse", "ratio 0.5", "ratio 0"),
    Claim("half fine generates better than all fine", "ratio 0.5", "ratio 1"),
    Claim("0.7 generates better than all fine", "ratio 0.7", "ratio 1"),
    Claim("half fine generates better than 0.7", "ratio 0.5", "ratio 0.7"),
]


@torch.no_grad()
def reconstructions(scorer: Scorer) -> dict[str, dict[str, float]]:
    """Frechet distance to the training images, and PSNR, of validation images through the autoencoder."""
    vae, found = scorer.study.vae, {}
    images = scorer.validation[0]
    for ratio in RATIOS:
        decoded, scores = [], []
        for batch in images.split(BATCH):
            pixels = batch.to(scorer.study.device).float() / 127.5 - 1
            reconstruction = vae.decode(vae.encode(pixels, fine_ratio=ratio).latent_dist.mode()).sample
            decoded.append(to_uint8(reconstruction).cpu())
            scores.append(psnr(pixels, reconstruction))
        distance = scorer.distance(torch.cat(decoded))
        found[f"ratio {ratio:g}"] = {"frechet_distance": distance, "psnr_db": torch.cat(scores).mean().item()}
    return found


def main() -> None:
    args = parse(__doc__)
    scorer = Scorer(Study(args))
    reconstructed = reconstructions(scorer)
    print("| | Frechet distance of reconstructions | PSNR |\n|---|---|---|")
    for label, row in reconstructed.items():
        print(f"| {label} | {row['frechet_distance']:.2f} | {row['psnr_db']:.2f} dB |")
    print()
    table = score_rows(scorer, args, ROWS)
    judged = judge(CLAIMS, table)
    print_table(table)
    print_claims(judged)
    result = {"protocol": protocol(scorer, args), "reconstructions": reconstructed, "rows": table, "claims": judged}
    write_json(args.output_dir / f"figure_5-{args.preset}.json", result)
    plot_ratios(args.output_dir / f"figure_5-{args.preset}.png", RATIOS, list(reconstructed.values()), table)


if __name__ == "__main__":
    main()
