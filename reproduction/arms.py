# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What is compared, and at which size: the arms of the study and its presets, each once."""

from dataclasses import dataclass

from diffusers_d2it import load_preset


@dataclass(frozen=True)
class Arm:
    """A content model that is trained as examples/train_d2it.py does, but for what is named here."""

    fine_ratio: float = 0.5  # share of fine regions over the data set; 1 is a plain VAE, 0 one of the largest factor
    refine_share: float = 1 / 6  # of the layers; 0 leaves RefineNet out
    grain_weights: tuple[float, float] = (0.25, 1.0)  # of a coarse and a fine cell in the loss: Eq. 11
    objective: str = "epsilon"  # what is predicted
    tied_noise: bool = True  # a coarse code has one draw of noise; or its cells are noised and predicted on their own


ARMS = {
    "dit": Arm(fine_ratio=1.0, refine_share=0, grain_weights=(1.0, 1.0)),
    "d2it": Arm(),
    "router": Arm(refine_share=0, grain_weights=(1.0, 1.0)),
    "grain-loss": Arm(refine_share=0),
    "refine-1-2": Arm(refine_share=1 / 3),
    "ratio-0": Arm(fine_ratio=0.0, refine_share=0),  # nothing to refine
    "ratio-0.3": Arm(fine_ratio=0.3),
    "ratio-0.7": Arm(fine_ratio=0.7),
    "ratio-1": Arm(fine_ratio=1.0),
    "equal-weights": Arm(grain_weights=(1.0, 1.0)),
    "independent-noise": Arm(tied_noise=False),
    "dit-velocity": Arm(fine_ratio=1.0, refine_share=0, grain_weights=(1.0, 1.0), objective="v_prediction"),
    "d2it-velocity": Arm(objective="v_prediction"),
}


@dataclass(frozen=True)
class ChunkedArm:
    """A model over the finest latents that is trained as examples/train_dcdit.py does, a token one cell in four."""

    every_cell: bool = False  # DiT/1 in the place of DC-DiT
    budgets: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of which an update draws one


CHUNKED_ARMS = {"dc-dit": ChunkedArm(), "dit-1": ChunkedArm(every_cell=True, budgets=(1.0,))}


@dataclass(frozen=True)
class Preset:
    """Size of the study."""

    resolution: int  # side of the images in pixels
    grain_preset: str  # of the grain model: a preset, or a file of examples/configs
    grain_steps: int
    num_layers: int  # of backbone and RefineNet together
    num_attention_heads: int
    head_dim: int
    batch_size: int
    steps: int  # of every arm at equal steps, and of d2it at equal seconds
    learning_rate: float  # constant after `warmup`, so that a shorter run is the beginning of a longer one
    warmup: int  # steps
    ema_decay: float  # of the average that is sampled from
    num_samples: int  # images behind a Frechet distance
    mixed_precision: str = "no"
    seeds: tuple[int, ...] = (0, 1, 2)  # runs of every arm
    sampling_steps: int = 20  # of UniPC
    classifier_epochs: int = 12
    timed_steps: int = 20  # of every arm, interleaved, behind the equal seconds


PRESETS = {
    # A few seconds on photographs of any kind: that the scripts run
    "smoke": Preset(
        resolution=32, grain_preset="grain-tiny", grain_steps=2,
        num_layers=6, num_attention_heads=1, head_dim=32, batch_size=4, steps=2, learning_rate=1e-3, warmup=0,
        ema_decay=0.5, num_samples=4, seeds=(0,), sampling_steps=2, classifier_epochs=1,
        timed_steps=1,
    ),
    # Two cores, in the background
    "small": Preset(
        resolution=32, grain_preset="grain-64.json", grain_steps=1000,
        num_layers=6, num_attention_heads=2, head_dim=32, batch_size=32, steps=3000, learning_rate=2e-3, warmup=100,
        ema_decay=0.998, num_samples=1000,
    ),
    # One GPU; width and layers of content-b's blocks
    "gpu": Preset(
        resolution=64, grain_preset="grain-s", grain_steps=10_000,
        num_layers=12, num_attention_heads=12, head_dim=64, batch_size=256, steps=5000, learning_rate=2e-4,
        warmup=500, ema_decay=0.999, num_samples=10_000, mixed_precision="bf16",
    ),
}  # fmt: skip


def find_arm(name: str) -> Arm | ChunkedArm:
    return (ARMS | CHUNKED_ARMS)[name]


def model_config(arm: Arm | ChunkedArm, preset: Preset) -> dict:
    """Configuration of an arm's content model, all of one width and number of blocks.

    A model without RefineNet has one that is never called: the configuration knows no 0.
    """
    width = {"num_attention_heads": preset.num_attention_heads, "attention_head_dim": preset.head_dim}
    if isinstance(arm, ChunkedArm):
        return load_preset("dcdit-tiny") | {"num_layers": preset.num_layers} | width
    num_refine_layers = round(preset.num_layers * arm.refine_share)  # of 6 or 12 layers, as those of the paper
    return (
        load_preset("content-tiny")
        | {
            "num_layers": preset.num_layers - num_refine_layers,
            "num_refine_layers": max(1, num_refine_layers),
        }
        | width
    )
