# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Table 3 of arXiv:2504.09454: from DiT to D2iT, one part after the other.

    python reproduction/table_3.py --data tiny-imagenet-20 --work_dir runs/reproduction

All arms have the same width, layers, batches and noise. DiT is the Multi-grained Net alone on latents of which every
region is fine: the autoencoder is the same for all, so what differs is the grain of its latents.
"""

from report import Claim, Row, run


ROWS = [
    Row("DiT", "dit", "fine", 34.67),
    Row("+ DVAE and router", "router", paper=29.10),
    Row("+ grain loss", "grain-loss", paper=27.62),
    Row("+ RefineNet (D2iT)", "d2it", paper=22.11),
]
CLAIMS = [
    Claim("DVAE and router improve on DiT", "+ DVAE and router", "DiT"),
    Claim("the grain loss improves on that", "+ grain loss", "+ DVAE and router"),
    Claim("RefineNet improves on that", "+ RefineNet (D2iT)", "+ grain loss"),
    Claim("D2iT improves on DiT", "+ RefineNet (D2iT)", "DiT"),
]

if __name__ == "__main__":
    run("table_3", __doc__, ROWS, CLAIMS)
