# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Table 4 of arXiv:2504.09454: how many of the layers should be RefineNet's.

    python reproduction/table_4.py --data tiny-imagenet-20 --work_dir runs/reproduction

The number of layers stays; of twelve in the paper none, two (one to five) or four (one to two) are RefineNet's.
"""

from report import Claim, Row, run


ROWS = [
    Row("no RefineNet", "grain-loss", paper=25.15),
    Row("1 layer in 6", "d2it", paper=22.11),
    Row("1 layer in 3", "refine-1-2", paper=26.53),
]
CLAIMS = [
    Claim("one layer in six is better than none", "1 layer in 6", "no RefineNet"),
    Claim("one in six is better than one in three", "1 layer in 6", "1 layer in 3"),
    Claim("one in three is worse than none", "no RefineNet", "1 layer in 3"),
]

if __name__ == "__main__":
    run("table_4", __doc__, ROWS, CLAIMS)
