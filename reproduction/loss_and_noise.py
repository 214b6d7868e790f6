# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Two decisions: the weight of a coarse cell in Eq. 11, and noise that has the grain of its region.

    python reproduction/loss_and_noise.py --data tiny-imagenet-20 --work_dir runs/reproduction

A coarse code is copied over four cells. Its loss counts a quarter a cell, or as much as that of a fine cell. Its noise
is one draw; or four, and then every cell has a prediction of its own, goes its own way when samples are drawn, and the
four are averaged before they are decoded.
"""

from report import Claim, Row, run


ROWS = [
    Row("weights 1/4 : 1, tied noise", "d2it"),
    Row("weights 1 : 1, tied noise", "equal-weights"),
    Row("weights 1/4 : 1, independent noise", "independent-noise"),
]
CLAIMS = [
    Claim("weights 1/4 : 1 are better than 1 : 1", ROWS[0].label, ROWS[1].label),
    Claim("tied noise is better than independent noise", ROWS[0].label, ROWS[2].label),
]

if __name__ == "__main__":
    run("loss_and_noise", __doc__, ROWS, CLAIMS)
