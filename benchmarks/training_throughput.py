# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Steps of training a content model from cached latents: images a second, share of the machine's peak, memory.

    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True    # tokens of a batch differ from step to step
    python benchmarks/training_throughput.py --device cuda     # content-xl at 256 px, batch 256, bf16 autocast
    python benchmarks/training_throughput.py                   # a small shape, batch 4, fp32

A step of ours is that of examples/train_d2it.py, latents and maps at hand; that of the original DiT has a mean squared
error, and AdamW and average as torch and a loop over the weights do them. Variants of the packed model share weights,
optimizer and average. Every step takes the next of a few batches with the maps of crops of photographs.

RefineNet on the whole grid needs more memory than there is for a batch of 256. So it is compared at half the batch,
and so is the original DiT, whose weights and moments stand beside ours. Operations are those of matrix products and
attention of the packed model, without what checkpointing repeats. Memory is all that a training needs.

What a residual stream in bfloat16 saves and changes is measured forward and backward under autocast, on a CPU too.
"""

import itertools
from collections.abc import Callable

import torch
import training_sides
from common import Bench, Flag, main
from dense_refine import DenseContentModel
from forward_mfu import count_operations
from matmul_peak import matmul_peak
from original_dit import DiTShape
from peers import XL, cast, content_model, sharing_weights
from torch import nn
from training_sides import CHECKPOINTED, COMPILED, COMPILED_CHECKPOINTED, DENSE, ORIGINAL, PACKED, Batch, Training

from diffusers_d2it import D2iTContentModel


SMALL = DiTShape(num_layers=6, heads=8, head_dim=32, sample_size=32)
FINE_RATIO = 0.5  # over all batches
COUNTED_IMAGES = 4  # whose operations are counted at a time, attention written out


def time_steps(
    bench: Bench, steps: dict[str, Callable[[Batch], None]], batches: list[Batch], suffix: str = ""
) -> dict:
    """Medians of the sides, each of which goes through the batches by itself."""
    rounds = {name: itertools.cycle(batches) for name in steps}
    sides = {name + suffix: lambda step=step, b=rounds[name]: step(next(b)) for name, step in steps.items()}
    median = bench.time(sides, warmup=len(batches))  # every batch has been seen, whatever its maps ask for
    return {name: median[name + suffix] for name in steps}


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


def compare_residual_dtypes(bench: Bench, training: Training, model: D2iTContentModel, batch: Batch, compile: bool):
    """The residual stream in float32 and in bfloat16, forward and backward under autocast."""
    layout = model.prepare_grain_map(batch.grain_map)
    _, timesteps, noised = training.noised(layout, batch)
    inputs = (noised, timesteps, layout, batch.class_labels)
    with torch.no_grad():
        expected = model(*inputs).sample
    sides = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"autocast, residual stream in {dtype}".replace("torch.", "")
        variant = sharing_weights(model)
        variant.set_residual_dtype(dtype)
        with torch.no_grad(), torch.autocast(bench.device, torch.bfloat16):
            difference = variant(*inputs).sample - expected
        bench.note(f"{name}: relative error of the output", (difference.norm() / expected.norm()).item())
        if compile:
            variant.compile_repeated_blocks()

        def run(variant: D2iTContentModel = variant) -> None:
            with torch.autocast(bench.device, torch.bfloat16):
                loss = training.loss(variant, batch)
            loss.backward()
            training.optimizer.zero_grad()

        sides[f"{name}, forward and backward"] = run
        bench.note(f"{name}: GiB of forward and backward", bench.peak_memory(run) / 2**10)
    bench.time(sides)


def measure(bench: Bench, batch_size: int, compile: bool) -> str:
    shape, num_refine_layers, dtype = (XL, 5, torch.bfloat16) if bench.cuda else (SMALL, 1, torch.float32)
    torch.manual_seed(0)
    batches = training_sides.make_batches(shape, batch_size, FINE_RATIO, bench.device)
    halves = [batch.images(0, batch_size // 2) for batch in batches]
    model = cast(content_model(shape, num_refine_layers), bench.device, torch.float32).train()
    training = Training(model, bench.device)
    models = training_sides.variants(model, compile) | {DENSE: DenseContentModel(model)}
    error = gradient_error(training, models, batches[0].images(0, COUNTED_IMAGES))
    bench.note("largest relative difference of gradients", error)
    operations = operations_of(training, model, batches)
    bench.note("billion multiply-adds an image, forward and backward", operations / 2e9 / batch_size)

    steps = {name: lambda batch, m=variant: training.step(m, batch) for name, variant in models.items()}
    at_full = {name: step for name, step in steps.items() if name != DENSE}
    peak = matmul_peak(bench, dtype)
    median = time_steps(bench, at_full, batches)
    first, memory_of, optimizer = batches[0], training_sides.memory_of, training.optimizer
    memory = {name: memory_of(bench, optimizer, lambda s=step: s(first)) for name, step in at_full.items()}
    original = training_sides.OriginalTraining(shape, bench.device)
    steps = {name: step for name, step in steps.items() if name in (PACKED, COMPILED, DENSE)}
    steps[ORIGINAL] = original.step
    half = time_steps(bench, steps, halves, ", half the batch")
    for name, step in steps.items():
        optimizer = (original if name == ORIGINAL else training).optimizer
        at_half = memory_of(bench, optimizer, lambda s=step: s(halves[0]))
        bench.note(f"GiB, {name}, half the batch", at_half)
        bench.note(f"{name} / {PACKED}, half the batch, time", half[name] / half[PACKED])
    peak = max(peak, matmul_peak(bench, dtype))
    bench.note("matrix product peak, TFLOP/s", peak / 1e12)

    best, checkpointed = (COMPILED, COMPILED_CHECKPOINTED) if compile else (PACKED, CHECKPOINTED)
    promised = {  # limit, at least, goal; at the size that the goals speak of
        f"share of the matrix product peak, {best}": (0.40, True, 6),
        f"images a second, {best}": (380, True, 6),
        f"original DiT / {best}, half the batch": (1.5, True, 6),
        f"GiB, {PACKED}": (130, False, 7),
        f"GiB, {CHECKPOINTED}": (40, False, 7),
        f"{checkpointed} / {best}, time": (1.33, False, 7),
    }
    found = {
        f"original DiT / {best}, half the batch": half[ORIGINAL] / half[best],
        f"{checkpointed} / {best}, time": median[checkpointed] / median[best],
    }
    for name, milliseconds in median.items():
        found[f"images a second, {name}"] = batch_size / (1e-3 * milliseconds)
        found[f"share of the matrix product peak, {name}"] = operations / (1e-3 * milliseconds) / peak
        found[f"GiB, {name}"] = memory[name]
    for text, value in found.items():
        if text in promised and batch_size == 256:
            bench.claim(text, value, *promised[text])
        else:
            bench.note(text, value)
    compare_residual_dtypes(bench, training, model, halves[0], compile)
    return f"Training: width {shape.width}, {shape.num_layers} blocks, batch {batch_size}, {dtype}"


if __name__ == "__main__":
    main(
        measure,
        batch_size=Flag({"cpu": 4, "cuda": 256}, "images of a step, an even number", lambda n: n % 2 == 0 < n),
        compile=Flag({"cpu": False, "cuda": True}, "compiled variants too, which takes minutes on a CPU"),
    )
