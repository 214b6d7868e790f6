# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Steps of training a content model from cached latents: images a second, share of the machine's peak, memory.

    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True    # tokens of a batch differ from step to step
    python benchmarks/training_throughput.py --device cuda     # content-xl at 256 px, batch 256, bf16 autocast
    python benchmarks/training_throughput.py                   # a small shape, batch 4, fp32

A step of ours is that of examples/train_d2it.py, latents and maps at hand: noise, forward, multi-grained loss,
backward, clipping behind the gate, fused AdamW, average. Variants of the packed model share weights, optimizer and
average. The step of the original DiT is a plain one: noise, forward, mean squared error, backward, AdamW and average
as torch and a loop over the weights do them. It gets cached latents too. Every step takes the next of a few batches
with the maps of crops of photographs: how many regions are fine changes from batch to batch.

RefineNet on the whole grid needs more memory than there is for a batch of 256. So it is compared at half the batch,
and so is the original DiT, whose weights and moments stand beside ours. Operations are those of matrix products and
attention, forward and backward, of the packed model, without what checkpointing repeats. Memory is all that a training
needs: weights, gradients, moments, average, activations.

What a residual stream in bfloat16 saves and changes is measured forward and backward under autocast, on a CPU too.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
from common import Claim, Timing, parse_args, peak_memory, report, time_sides
from forward_mfu import count_operations
from matmul_peak import matmul_peak
from original_dit import DiTShape
from peers import XL, cast, content_model
from torch import nn
from training_sides import (
    CHECKPOINTED,
    COMPILED,
    COMPILED_CHECKPOINTED,
    DENSE,
    ORIGINAL,
    PACKED,
    Batch,
    DenseContentModel,
    OriginalTraining,
    Training,
    make_batches,
    sharing_weights,
    state_bytes,
    variants,
)

from diffusers_d2it import D2iTContentModel


SMALL = DiTShape(num_layers=6, heads=8, head_dim=32, sample_size=32)
COUNTED_IMAGES = 4  # whose operations are counted at a time, attention written out


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


def time_steps(steps: dict[str, Callable[[Batch], None]], batches: list[Batch], args: argparse.Namespace) -> dict:
    """Timings of the sides, each of which goes through the batches by itself."""
    rounds = {name: itertools.cycle(batches) for name in steps}
    sides = {name: lambda step=step, b=rounds[name]: step(next(b)) for name, step in steps.items()}
    return time_sides(sides, args, warmup=len(batches))  # every batch has been seen, whatever its maps ask for


def memory_of(training: Training | OriginalTraining, step: Callable, batch: Batch, device: str) -> float:
    """GiB that a training needs at the peak of a step."""
    peak = peak_memory(lambda: step(batch), device)
    return peak / 2**10 + state_bytes(training.optimizer) / 2**30


def operations_of(training: Training, model: nn.Module, batches: list[Batch]) -> float:
    """Floating-point operations of forward and backward, the mean over the batches."""
    size = len(batches[0].latents)
    parts = [batch.images(i, i + COUNTED_IMAGES) for batch in batches for i in range(0, size, COUNTED_IMAGES)]
    counted = sum(count_operations(lambda part=part: training.loss(model, part).backward()) for part in parts)
    training.optimizer.zero_grad()
    return counted / len(batches)


def gradient_error(training: Training, models: dict[str, nn.Module], batch: Batch) -> float:
    """Largest difference of a side's gradients from the first side's under the same noise, relative to their norm."""
    gradients = []
    for model in models.values():
        torch.manual_seed(1)
        training.loss(model, batch).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in training.weights]))
        training.optimizer.zero_grad()
    first, *others = gradients
    return max(((other - first).norm() / first.norm()).item() for other in others)


def compare_residual_dtypes(
    training: Training, model: D2iTContentModel, batch: Batch, args: argparse.Namespace
) -> tuple[dict[str, Timing], dict[str, float]]:
    """The residual stream in float32 and in bfloat16, under autocast: timings and notes of forward and backward."""
    _, timesteps, noised = training.noised(batch)
    inputs = (noised, timesteps, batch.grain_map, batch.class_labels)
    with torch.no_grad():
        expected = model(*inputs).sample
    sides, notes = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"autocast, residual stream in {dtype}".replace("torch.", "")
        variant = sharing_weights(model)
        variant.set_residual_dtype(dtype)
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
            difference = variant(*inputs).sample - expected
        notes[f"{name}: relative error of the output"] = (difference.norm() / expected.norm()).item()
        if args.compile:
            variant.compile_repeated_blocks()

        def run(variant: D2iTContentModel = variant) -> None:
            with torch.autocast(args.device, torch.bfloat16):
                loss = training.loss(variant, batch)
            loss.backward()
            training.optimizer.zero_grad()

        sides[f"{name}, forward and backward"] = run
        notes[f"{name}: GiB of forward and backward"] = peak_memory(run, args.device) / 2**10
    return time_sides(sides, args), notes


def claims_and_notes(
    timings: dict[str, Timing], half: dict[str, Timing], memory: dict[str, float], share: dict[str, float], args
) -> tuple[list[Claim], dict[str, float]]:
    """Goals 6 and 7: claims at the size they speak of, notes otherwise."""
    best, checkpointed = (COMPILED, COMPILED_CHECKPOINTED) if COMPILED in timings else (PACKED, CHECKPOINTED)
    speed = {name: args.batch_size / (1e-3 * timing.median) for name, timing in timings.items()}
    promised = (
        (f"share of the matrix product peak, {best}", share[best], 0.40, True, 6),
        (f"images a second, {best}", speed[best], 380, True, 6),
        (f"original DiT / {best}, half the batch", half[ORIGINAL].median / half[best].median, 1.5, True, 6),
        (f"GiB, {PACKED}", memory[PACKED], 130, False, 7),
        (f"GiB, {CHECKPOINTED}", memory[CHECKPOINTED], 40, False, 7),
        (f"{checkpointed} / {best}, time", timings[checkpointed].median / timings[best].median, 1.33, False, 7),
    )
    notes = {f"images a second, {name}": value for name, value in speed.items()}
    notes |= {f"share of the matrix product peak, {name}": value for name, value in share.items()}
    notes |= {f"GiB, {name}": value for name, value in memory.items()}
    notes |= {f"{name} / {PACKED}, half the batch, time": t.median / half[PACKED].median for name, t in half.items()}
    notes = {text: value for text, value in notes.items() if text not in {text for text, *_ in promised}}
    if args.device == "cuda" and args.batch_size == 256 and args.fine_ratio == 0.5:
        return [Claim(text, value, limit, more, goal) for text, value, limit, more, goal in promised], notes
    return [], {f"{text}; small shape": value for text, value, *_ in promised} | notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fine_ratio", type=float, default=0.5, help="share of fine regions over all batches")
    parser.add_argument("--batch_size", type=int, help="default: 256 on CUDA, 4 on a CPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compiled variants too; default: on CUDA, on a CPU it takes minutes",
    )
    args = parse_args(parser, "training_throughput")
    cuda = args.device == "cuda"
    shape, num_refine_layers, dtype = (XL, 5, torch.bfloat16) if cuda else (SMALL, 1, torch.float32)
    args.batch_size = args.batch_size or (256 if cuda else 4)
    args.compile = cuda if args.compile is None else args.compile
    if args.batch_size % 2:
        parser.error("--batch_size must be even.")

    torch.manual_seed(0)
    batches = make_batches(shape, args.batch_size, args.fine_ratio, args.device)
    halves = [batch.images(0, args.batch_size // 2) for batch in batches]
    model = cast(content_model(shape, num_refine_layers), args.device, torch.float32).train()
    training = Training(model, args.device)
    models = variants(model, args.compile)
    dense = DenseContentModel(model)
    error = gradient_error(training, models | {DENSE: dense}, batches[0].images(0, COUNTED_IMAGES))
    operations = operations_of(training, model, batches)

    steps = {name: lambda batch, m=variant: training.step(m, batch) for name, variant in models.items()}
    peak = matmul_peak(args.device, dtype)
    timings = time_steps(steps, batches, args)
    memory = {name: memory_of(training, step, batches[0], args.device) for name, step in steps.items()}

    original = OriginalTraining(shape, args.device)
    steps = {name: step for name, step in steps.items() if name in (PACKED, COMPILED)}
    steps |= {DENSE: lambda batch: training.step(dense, batch), ORIGINAL: original.step}
    half = time_steps(steps, halves, args)
    for name, step in steps.items():
        owner = original if name == ORIGINAL else training
        memory[f"{name}, half the batch"] = memory_of(owner, step, halves[0], args.device)
    peak = max(peak, matmul_peak(args.device, dtype))
    residual_timings, residual_notes = compare_residual_dtypes(training, model, halves[0], args)

    share = {name: operations / (1e-3 * timing.median) / peak for name, timing in timings.items()}
    claims, notes = claims_and_notes(timings, half, memory, share, args)
    notes["largest relative difference of gradients"] = error
    notes["billion multiply-adds an image, forward and backward"] = operations / 2e9 / args.batch_size
    notes["matrix product peak, TFLOP/s"] = peak / 1e12
    title = f"Training: width {shape.width}, {shape.num_layers} blocks, batch {args.batch_size}, {dtype}"
    timings |= {f"{name}, half the batch": timing for name, timing in half.items()} | residual_timings
    report(args, title, timings, claims, notes | residual_notes)


if __name__ == "__main__":
    main()
