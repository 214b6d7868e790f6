# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What training at the size of the paper takes: multiply-adds, memory, hours, traffic. Computed, not timed.

    python benchmarks/arithmetic.py        # writes results/arithmetic.json, which docs/scale.md shows

Weights, multiply-adds and what autograd keeps for the backward pass are counted on tensors without data, of the real
models under bf16 autocast with the maps of photographs at a fine ratio of 0.5. All else follows from these and from
the assumptions in `ASSUMED`.
"""

import argparse
import math
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from photo_maps import load_photographs, real_grain_maps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from diffusers_d2it import D2iTContentModel, load_preset
from diffusers_d2it.files import write_json_durably
from diffusers_d2it.grains import GrainLayout


MODELS = ("content-b", "content-l", "content-xl")
SIZES = (256, 512)  # pixels
GPUS = (1, 8, 64)
ASSUMED = {
    "peak TFLOP/s": {"A100": 312, "H100": 989},  # bf16, dense, of the data sheets
    "share of the peak": 0.4,
    "memory of a GPU, GiB": 80,
    "kept free, GiB": 8,  # for the context, kernels' work space and fragments
    "images": 1_281_167,  # ImageNet
    "epochs": 400,
    "batch": 256,
    "GB/s a GPU between 8 in a machine": 300,
    "GB/s a GPU between machines": 25,
    "GB/s of the disk": 2,
}
WEIGHTS_BYTES = {"weights": 4, "gradients": 4, "Adam": 8, "average": 4}  # of each parameter
GIB, GB = 2**30, 1e9


def count(name: str, size: int) -> dict[str, float]:
    """Of a preset at a size in pixels: parameters, multiply-adds of an image, bytes that autograd keeps of it.

    Returns:
        "parameters", "gmac" of a forward pass, "kept_bytes", "kept_bytes_checkpointed" of the model that recomputes
        its blocks, with what one of these keeps for itself, and "block_parameters" of the largest.
    """
    with torch.device("meta"):
        model = D2iTContentModel(**load_preset(name) | {"sample_size": size // 8})
    maps = real_grain_maps(load_photographs(4, size=size), 0.5)
    few, many = (kept(deepcopy(model), maps[:number]) for number in (2, 4))
    checkpointed = [kept(deepcopy(model), maps[:number], checkpointing=True) for number in (2, 4)]
    blocks = [*model.transformer_blocks, *(block for net in model.refine_nets for block in net.transformer_blocks)]
    whole, borders = ((after[1] - before[1]) / 2 for before, after in ((few, many), checkpointed))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gmac": many[0] / 4 / 1e9,
        "kept_bytes": whole,
        "kept_bytes_checkpointed": borders + (whole - borders) / len(blocks),
        "block_parameters": max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks),
    }


def kept(model: D2iTContentModel, maps: torch.Tensor, checkpointing: bool = False) -> tuple[float, int]:
    """(multiply-adds of a forward pass, bytes that autograd keeps of it), copies of weights included."""
    layout, fake = model.prepare_grain_map(maps), FakeTensorMode(allow_non_fake_inputs=True)
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    def without_data(value: Any) -> Any:
        return tree_map(lambda one: fake.from_tensor(one) if isinstance(one, torch.Tensor) else one, value)

    with fake:
        model = model.to_empty(device="cpu").train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        layout = replace(layout, **{one.name: without_data(getattr(layout, one.name)) for one in fields(GrainLayout)})
        side = model.config.sample_size
        latents = torch.randn(len(maps), model.config.in_channels, side, side)
        timesteps = labels = torch.zeros(len(maps), dtype=torch.int64)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        counter = FlopCounterMode(display=False)
        with hooks, torch.autocast("cpu", torch.bfloat16), counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            model(latents, timesteps, layout, labels)
    return counter.get_total_flops() / 2, sum(storage.nbytes() for storage in storages.values())


def run_of(counted: dict[str, float], gpus: int) -> dict[str, Any]:
    """A training on so many GPUs.

    Returns:
        "images_a_gpu" in a forward pass, a power of two that fits; "checkpointing", whether it fits with that alone;
        "memory_gib" of a GPU, averaged ("DDP") or sharded ("FSDP2"); "traffic_gb", which it sends in an update, and
        "traffic_seconds"; by kind of GPU "images_per_second", "hours", "gpu_hours" of all epochs and
        "seconds_an_update" of computing.
    """
    parameters, share = counted["parameters"], ASSUMED["batch"] // gpus
    whole = parameters * (sum(WEIGHTS_BYTES.values()) + 2)  # and what autocast makes of the weights
    # A block is gathered in half precision, and has gradients
    states = {"DDP": whole, "FSDP2": whole / gpus + (gpus > 1) * 6 * counted["block_parameters"]}
    room = (ASSUMED["memory of a GPU, GiB"] - ASSUMED["kept free, GiB"]) * GIB - whole
    checkpointing = room < min(share, 32) * counted["kept_bytes"]  # fewer images in a pass leave a GPU idle
    kept_bytes = counted["kept_bytes_checkpointed" if checkpointing else "kept_bytes"]
    images = min(share, 2 ** math.floor(math.log2(room / kept_bytes)))
    # Averaged: gradients in float32 around a ring, twice; sharded: weights in half precision twice, gradients once
    traffic = 8 * parameters * (gpus - 1) / gpus
    speed = ASSUMED["GB/s a GPU between 8 in a machine" if gpus <= 8 else "GB/s a GPU between machines"]
    found = {
        "gpus": gpus,
        "images_a_gpu": images,
        "checkpointing": checkpointing,
        "memory_gib": {kind: (state + images * kept_bytes) / GIB for kind, state in states.items()},
        "traffic_gb": traffic / GB,
        "traffic_seconds": traffic / GB / speed,
    }
    passes = 4 if checkpointing else 3  # forward, twice as much backward, and forward again
    for kind, peak in ASSUMED["peak TFLOP/s"].items():
        images_per_second = gpus * peak * 1e3 * ASSUMED["share of the peak"] / (2 * passes * counted["gmac"])
        hours = ASSUMED["images"] * ASSUMED["epochs"] / images_per_second / 3600
        found[kind] = {"images_per_second": images_per_second, "hours": hours, "gpu_hours": hours * gpus}
        found[kind]["seconds_an_update"] = ASSUMED["batch"] / images_per_second
    return found


def models_table(models: dict[str, dict]) -> str:
    """What was counted as Markdown, and what a checkpoint weighs."""
    lines = ["| model | pixels | weights | GMAC an image | kept for backward, MiB an image | with checkpointing |"]
    lines[0] += " state of a run, GB | checkpoint, GB | seconds on disk |"
    lines.append("|---|" + "---|" * 8)
    for name, sizes in models.items():
        for size, found in sizes["counted"].items():
            state, file = (bytes_ * found["parameters"] / GB for bytes_ in (sum(WEIGHTS_BYTES.values()), 16))
            cells = [name, size, f"{found['parameters'] / 1e6:.0f}M", f"{found['gmac']:.1f}"]
            cells += [f"{found[key] / 2**20:.0f}" for key in ("kept_bytes", "kept_bytes_checkpointed")]
            cells += [f"{state:.1f}", f"{file:.1f}", f"{file / ASSUMED['GB/s of the disk']:.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def runs_table(models: dict[str, dict]) -> str:
    """What a training takes as Markdown; two numbers are of the two kinds of GPUs, of memory of DDP and FSDP2."""
    kinds = list(ASSUMED["peak TFLOP/s"])
    head = ["model", "pixels", "GPUs", "images a GPU and pass", "GiB a GPU", f"images/s, {' / '.join(kinds)}"]
    head += ["hours", "GPU-hours", "ms of computing an update", "GB sent", "ms of sending"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, sizes in models.items():
        for size, runs in sizes["runs"].items():
            for run in runs:

                def of_kinds(key: str, scale: int = 1, run: dict = run) -> str:
                    return " / ".join(f"{scale * run[kind][key]:,.0f}" for kind in kinds)

                cells = [name, size, run["gpus"], f"{run['images_a_gpu']}{', checkpointing' * run['checkpointing']}"]
                cells.append(" / ".join(f"{memory:.0f}" for memory in run["memory_gib"].values()))
                cells += [of_kinds("images_per_second"), of_kinds("hours"), of_kinds("gpu_hours")]
                cells.append(of_kinds("seconds_an_update", 1000))
                cells += [f"{run['traffic_gb']:.1f}", f"{1e3 * run['traffic_seconds']:.0f}"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="presets of the content model")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="pixels")
    parser.add_argument("--output", type=Path, default=RESULTS / "arithmetic.json")
    args = parser.parse_args()
    models: dict[str, dict] = {}
    for name in args.models:
        counted = {str(size): count(name, size) for size in args.sizes}
        runs = {size: [run_of(found, gpus) for gpus in GPUS] for size, found in counted.items()}
        models[name] = {"counted": counted, "runs": runs}
    write_json_durably(args.output, {"assumed": ASSUMED, "bytes of a parameter": WEIGHTS_BYTES, "models": models})
    print(models_table(models), runs_table(models), sep="\n\n")


if __name__ == "__main__":
    main()
