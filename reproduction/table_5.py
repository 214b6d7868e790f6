# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Table 5 of arXiv:2504.09454: where the grain map comes from.

    python reproduction/table_5.py --data tiny-imagenet-20 --work_dir runs/reproduction

One trained D2iT, the same labels and noise, and maps of photographs, of the grain model, of independent regions with
the same share, and uniform ones, which the content model has not been trained on.
"""

from report import Claim, Row, run


ROWS = [
    Row("true maps", "d2it", "true", 4.35),
    Row("predicted", "d2it", "predicted", 4.47),
    Row("random", "d2it", "random", 15.93),
    Row("all fine", "d2it", "fine"),
    Row("all coarse", "d2it", "coarse"),
]
CLAIMS = [
    Claim("predicted maps are better than random ones", "predicted", "random"),
    Claim("true maps are better than random ones", "true maps", "random"),
    Claim("true maps are better than predicted ones", "true maps", "predicted"),
]

if __name__ == "__main__":
    run("table_5", __doc__, ROWS, CLAIMS)
