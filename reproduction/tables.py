# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Tables 3, 4 and 5 of arXiv:2504.09454, and two decisions, each in rows of trained arms and claims about them.

    python reproduction/tables.py --data tiny-imagenet-20 --work_dir runs/reproduction
    python reproduction/tables.py table_3 --data tiny-imagenet-20 --work_dir runs/reproduction

table_3: from DiT to D2iT, one part after the other, and both ends again with velocity predicted instead of noise. All
arms have the same width, layers, batches and noise. DiT is the Multi-grained Net alone on latents of which every
region is fine: the autoencoder is the same for all, so what differs is the grain of its latents.

table_4: how many of the layers should be RefineNet's. The number of layers stays; of twelve in the paper none, two
(one to five) or four (one to two) are RefineNet's.

table_5: where the grain map comes from. One trained D2iT, the same labels and noise, and maps of photographs, of the
grain model, of independent regions with the same share, and uniform ones, which it has not been trained on.

loss_and_noise: a coarse code is copied over four cells. Its loss counts a quarter a cell, or as much as that of a fine
cell. Its noise is one draw; or four, and then every cell has a prediction of its own, goes its own way when samples
are drawn, and the four are averaged before they are decoded.
"""

from report import Claim, Row, open_study, score_table
from study import make_parser


TIED, INDEPENDENT = "weights 1/4 : 1, tied noise", "weights 1/4 : 1, independent noise"
TABLES = {
    "table_3": (
        [
            Row("DiT", "dit", "fine", 34.67),
            Row("+ DVAE and router", "router", paper=29.10),
            Row("+ grain loss", "grain-loss", paper=27.62),
            Row("+ RefineNet (D2iT)", "d2it", paper=22.11),
            Row("DiT, velocity", "dit-velocity", "fine"),
            Row("D2iT, velocity", "d2it-velocity"),
        ],
        [
            Claim("DVAE and router improve on DiT", "+ DVAE and router", "DiT"),
            Claim("the grain loss improves on that", "+ grain loss", "+ DVAE and router"),
            Claim("RefineNet improves on that", "+ RefineNet (D2iT)", "+ grain loss"),
            Claim("D2iT improves on DiT", "+ RefineNet (D2iT)", "DiT"),
            Claim("D2iT improves on DiT, both with velocity", "D2iT, velocity", "DiT, velocity"),
            Claim("velocity improves on noise, in D2iT", "D2iT, velocity", "+ RefineNet (D2iT)"),
        ],
    ),
    "table_4": (
        [
            Row("no RefineNet", "grain-loss", paper=25.15),
            Row("1 layer in 6", "d2it", paper=22.11),
            Row("1 layer in 3", "refine-1-2", paper=26.53),
        ],
        [
            Claim("one layer in six is better than none", "1 layer in 6", "no RefineNet"),
            Claim("one in six is better than one in three", "1 layer in 6", "1 layer in 3"),
            Claim("one in three is worse than none", "no RefineNet", "1 layer in 3"),
        ],
    ),
    "table_5": (
        [
            Row("true maps", "d2it", "true", 4.35),
            Row("predicted", "d2it", "predicted", 4.47),
            Row("random", "d2it", "random", 15.93),
            Row("all fine", "d2it", "fine"),
            Row("all coarse", "d2it", "coarse"),
        ],
        [
            Claim("predicted maps are better than random ones", "predicted", "random"),
            Claim("true maps are better than random ones", "true maps", "random"),
            Claim("true maps are better than predicted ones", "true maps", "predicted"),
        ],
    ),
    "loss_and_noise": (
        [
            Row(TIED, "d2it"),
            Row("weights 1 : 1, tied noise", "equal-weights"),
            Row(INDEPENDENT, "independent-noise"),
        ],
        [
            Claim("weights 1/4 : 1 are better than 1 : 1", TIED, "weights 1 : 1, tied noise"),
            Claim("tied noise is better than independent noise", TIED, INDEPENDENT),
        ],
    ),
}


def main() -> None:
    parser = make_parser(__doc__)
    names = [*TABLES, []]  # none is a choice, too
    parser.add_argument("tables", nargs="*", choices=names, metavar="table", help=f"{', '.join(TABLES)}; default: all")
    with open_study(parser) as (args, scorer):
        for name in args.tables or TABLES:
            score_table(scorer, args, name, *TABLES[name])


if __name__ == "__main__":
    main()
