# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The seventeen goals of speed and memory: what is promised, and on which device. Claims name the goal they belong to.

Goals for a GPU are meant for one of the H200 class.
"""

from typing import NamedTuple


class Goal(NamedTuple):
    """What is promised, and where it is to be shown: "cpu", "cuda", or both."""

    text: str
    devices: tuple[str, ...]


GOALS = {
    1: Goal(
        "coarse path: at most 17 compute operators a block, 15 with diffusers' fuse_qkv_projections(), of the original"
        " DiT's 20; beside it the times at width 64, 28 layers, 16 tokens, eager, fused and compiled",
        ("cpu",),
    ),
    2: Goal(
        "one guided image at XL/2 shape: eager 2 times and compiled 3 times as fast as diffusers' DiT eager, compiled"
        " 1.15 times as fast as its compiled form",
        ("cuda",),
    ),
    3: Goal("XL forward, batch 64, bf16: at least 55 % of the machine's matrix product peak", ("cuda",)),
    4: Goal(
        "RefineNet at most the fine share + 0.05 of dense (CPU); whole forward at r = 0.5 at most 0.82 (CPU), 0.85"
        " (GPU) of dense; equal within 1e-5",
        ("cpu", "cuda"),
    ),
    5: Goal("window attention at most 0.25 of masked dense attention over 1024 tokens", ("cpu",)),
    6: Goal(
        "XL training from cached latents, bf16, compiled: at least 40 % of peak and 380 images/s packed at r = 0.5; at"
        " least 1.5 times the original training step",
        ("cuda",),
    ),
    7: Goal(
        "training memory at batch 256: packed at most 130 GiB, with block checkpointing 40 GiB at 1.33 times the time",
        ("cuda",),
    ),
    8: Goal(
        "sampling XL with guidance, batch 128: at least 3.2 images/s at 250 steps, 36 at 20 with decoding; packed D2iT"
        " at most 1.25 of DiT/2 and under 0.35 of DiT/1",
        ("cuda",),
    ),
    9: Goal("no host synchronisation and no recompilation between steps", ("cuda",)),
    10: Goal(
        "entropy of a 256x256 image: at most 2 ms on a thread, 8 MiB, 2e-5 nats of error; 100 times the broadcast",
        ("cpu",),
    ),
    11: Goal(
        "pipeline at most 3 % over denoiser and decoder at 20 steps, batch 8; grain sampling at most 5 % of the total",
        ("cpu", "cuda"),
    ),
    12: Goal("from_pretrained of XL in bf16: peak host memory at most 1.1 times the file", ("cpu",)),
    13: Goal(
        "packed block of DC-DiT on images of mixed lengths: at most 1.2 of DiT's on as many tokens in equal ones",
        ("cpu", "cuda"),
    ),
    14: Goal(
        "from tokens back to cells at most 0.6 of the form with all pairs (45 % of 32x32 cells), 0.5 (25 % of 64x64);"
        " equal within 1e-6",
        ("cpu",),
    ),
    15: Goal(
        "seconds of a DC-DiT forward linear in its tokens (R^2 at least 0.99); at most 1.2 of DiT/2's a multiply-add",
        ("cpu", "cuda"),
    ),
    16: Goal("guided step of DC-DiT with a null budget of 0.1 at most 0.72 of the full one", ("cpu", "cuda")),
    17: Goal("training step of DC-DiT, N = 4: at most 1.25 of DiT/2's a multiply-add", ("cpu", "cuda")),
}
