# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Does a device compute what the CPU computes, and do the ways work there in which users of diffusers run a pipeline?

    python benchmarks/device/checks.py same --device cuda --output runs/device/same-cuda.json

same        images and gradients on the device against those on the CPU, in float32 and in half precision
doors       offloading, device_map, casting and attention backends against the plain pipeline on the device
compiled    blocks and models, CUDA graphs, gradients, the decoder, against the same uncompiled

D2iT is the bundled checkpoint. None of DC-DiT is bundled: it is a preset with random weights, whose router wants a
quarter of the cells, and the same autoencoder. What is checked is a difference in norm, relative, and the file is
written after each check. On a CPU all has its smallest form, which only shows that the checks run.
"""

import argparse
import copy
import datetime
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chunk_forward import prepared
from common import DEVICES, Bench, describe_machine
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.attention_dispatch import attention_backend
from diffusers.utils import logging
from peers import Inputs, quiet
from torch._dynamo.utils import counters

from diffusers_d2it import D2iTPipeline, DCDiTPipeline, bundled_checkpoint, region_entropy


LABELS = [207, 291]  # of the bundled checkpoint
HALVES = torch.bfloat16, torch.float16
EXACT, TF32, HALF, ROUGH = 1e-4, 1e-2, 5e-2, 0.2  # at most; ROUGH for gradients in half precision, and for fp8
BACKENDS = {torch.float32: ["native", "_native_efficient"]}
BACKENDS[torch.bfloat16] = [*BACKENDS[torch.float32], "_native_flash", "_native_cudnn", "flex"]


class Family(NamedTuple):
    """One of the two models."""

    load: Callable[..., DiffusionPipeline]  # takes the options of from_pretrained
    network: torch.nn.Module  # on the CPU, in float32
    inputs: tuple[torch.Tensor, ...]  # of its forward pass
    given: dict[str, torch.Tensor]  # to a call in half precision, which might draw other maps


class Checks:
    """What has been found, and the file that has it."""

    def __init__(self, device: str, output: Path):
        self.device, self.output = torch.device(device), output
        machine = describe_machine(device) | {"date": datetime.date.today().isoformat()}
        self.found: dict[str, Any] = {"machine": machine, "checks": {}}

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def add(self, name: str, function: Callable[..., dict | float], *arguments, limit: float, **options) -> None:
        """Keep the difference that a function returns, or the error that it ends in: the other checks go on."""
        start = time.perf_counter()
        torch._dynamo.reset()
        counters.clear()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            values = function(*arguments, **options)
            values = values if isinstance(values, dict) else {"difference": values}
            values |= {"limit": limit, "reached": values["difference"] <= limit}  # NaN is not
        except Exception as error:
            traceback.print_exc()
            values = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", "reached": False}
        values["seconds"] = round(time.perf_counter() - start, 2)
        if self.cuda:
            values["peak MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
        print(name, values, flush=True)
        self.found["checks"][name] = values
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def missed(self) -> list[str]:
        return [name for name, values in self.found["checks"].items() if not values["reached"]]


# ---- What is compared ----


def families(cuda: bool, folder: str) -> dict[str, Family]:
    """Both models; a pipeline of DC-DiT is saved in the folder."""
    load = partial(D2iTPipeline.from_pretrained, bundled_checkpoint())
    pipe = load()
    side = pipe.transformer.config.sample_size // pipe.transformer.patch_size
    given = Inputs.random((torch.rand(4, side, side) < 0.5).long())
    inputs = given.latents, given.timestep, given.grain_map, given.class_labels
    d2it = Family(load, pipe.transformer, inputs, {"grain_map": given.grain_map[: len(LABELS)]})
    with torch.no_grad():
        network, inputs = prepared(Bench("cpu", threads=1, repeats=1), "dcdit-s" if cuda else "dcdit-tiny", 4)
        # Or images hardly depend on the network, and the network on where its tokens look
        for block in network.transformer_blocks:
            for projection in (block.attn.to_q, block.attn.to_k):
                projection.weight *= 2
        network.norm_out.proj_out.weight /= network(*inputs).sample.std()
    DCDiTPipeline(pipe.vae, network, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    dcdit = Family(partial(DCDiTPipeline.from_pretrained, folder), network, inputs, {})
    return {"DC-DiT": dcdit, "D2iT": d2it}


def draw(pipe: DiffusionPipeline, seed: int, **given) -> torch.Tensor:
    """Images of four steps, on the CPU, from where all that is random comes: alike for every device and dtype."""
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(seed)
    shape = len(LABELS), config.in_channels, config.sample_size, config.sample_size
    options = {"latents": torch.randn(shape, generator=generator), "generator": generator, "output_type": "pt"}
    labels = [label % config.num_classes for label in LABELS]
    return quiet(pipe)(labels, num_inference_steps=4, **options, **given).images.float().cpu()


def drawn(load: Callable, device: torch.device | str, **given) -> list[torch.Tensor]:
    """What `through` is to draw: by the plain pipeline, on a device."""
    pipe = load().to(device)
    return [draw(pipe, seed, **given) for seed in (0, 1)]


def through(load: Callable, set_up: Callable, expected: list[torch.Tensor], **given) -> dict[str, Any]:
    """Two calls of a pipeline: weights have to come again, graphs to serve other maps and numbers of tokens."""
    pipe, differences, graphs = load(), [], []
    set_up(pipe)
    for seed, images in enumerate(expected):
        start = time.perf_counter()
        differences.append(relative(draw(pipe, seed, **given), images))
        milliseconds = 1e3 * (time.perf_counter() - start)
        graphs.append(counters["stats"]["unique_graphs"])
    found = {"difference": max(differences), "ms of the second call": round(milliseconds, 1)}
    if graphs[-1]:
        found |= {"graphs after each call": graphs, "refused CUDA graphs": counters["inductor"]["cudagraph_skips"]}
    return found


def derived(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """Output and gradients of all matrices, each over its norm, in a row on the CPU."""
    device = next(network.parameters()).device
    network.zero_grad()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = network(*(tensor.to(device) for tensor in inputs)).sample.float()
    output.square().mean().backward()
    gradients = (weight.grad for weight in network.parameters() if weight.ndim > 1 and weight.grad is not None)
    return torch.cat([F.normalize(part.flatten(), dim=0).cpu() for part in (output.detach(), *gradients)])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def derived_as(network: torch.nn.Module, set_up: Callable, inputs: tuple, dtype: torch.dtype, expected: torch.Tensor):
    """The difference that a copy makes, set up in some way."""
    network = copy.deepcopy(network)
    with attention_backend("native"):  # what one model is set to would hold for all others too
        set_up(network)
        return relative(derived(network, inputs, dtype), expected)


# ---- The steps, for each model ----


def same(checks: Checks, name: str, family: Family) -> None:
    load, network, inputs, given = family

    def there(part: DiffusionPipeline | torch.nn.Module) -> None:
        part.to(checks.device)

    images = drawn(load, "cpu")
    checks.add(f"{name}: images, float32", through, load, there, images, limit=EXACT)
    expected = derived(network, inputs, torch.float32)
    for dtype, limit in ((torch.float32, EXACT), (torch.bfloat16, ROUGH)):
        title = f"{name}: output and gradients, {dtype}"
        checks.add(title, derived_as, network, there, inputs, dtype, expected, limit=limit)
    torch.backends.cudnn.allow_tf32 = True
    checks.add(f"{name}: images, float32 as torch comes, tf32", through, load, there, images, limit=TF32)
    torch.backends.cudnn.allow_tf32 = False
    images = drawn(load, "cpu", **given)
    for dtype in HALVES if checks.cuda else ():
        half = partial(load, dtype=dtype)
        checks.add(f"{name}: images, {dtype}", through, half, there, images, limit=HALF, **given)
    pixels = torch.rand(4, 3, 64, 64)
    expected = region_entropy(pixels)
    checks.add(
        "region_entropy", lambda: relative(region_entropy(pixels.to(checks.device)).cpu(), expected), limit=EXACT
    )


def doors(checks: Checks, name: str, family: Family) -> None:
    device, load, images = checks.device, family.load, drawn(family.load, checks.device)

    def check(way: str, set_up: Callable[[DiffusionPipeline], object], **options) -> None:
        checks.add(f"{name}: {way}", through, partial(load, **options), set_up, images, limit=EXACT)

    def groups(part: DiffusionPipeline | torch.nn.Module, level: str = "leaf_level", **options) -> None:
        options |= {"num_blocks_per_group": 1} if level == "block_level" else {}
        part.enable_group_offload(onload_device=device, offload_type=level, **options)

    if checks.cuda:  # diffusers refuses these without a GPU
        check("enable_model_cpu_offload", lambda pipe: pipe.enable_model_cpu_offload(device=device))
        check("enable_sequential_cpu_offload", lambda pipe: pipe.enable_sequential_cpu_offload(device=device))
        check("device_map=cuda", lambda pipe: None, device_map="cuda")
        check("device_map=balanced", lambda pipe: None, device_map="balanced")
        check("group offload, leaves, in a stream", lambda pipe: groups(pipe, use_stream=True))
        check("group offload, blocks, in a stream", lambda pipe: groups(pipe, "block_level", use_stream=True))
    check("group offload, leaves", groups)
    check("group offload, blocks", lambda pipe: groups(pipe, "block_level"))
    with tempfile.TemporaryDirectory() as folder:

        def to_disk(pipe: DiffusionPipeline) -> None:
            pipe.to(device)
            groups(pipe.transformer.to("cpu"), offload_to_disk_path=folder)

        check("group offload of the network to disk", to_disk)
    check("decoder in channels_last", lambda pipe: pipe.to(device).vae.to(memory_format=torch.channels_last))
    half, casting = partial(load, dtype=torch.bfloat16), (torch.float8_e4m3fn, torch.bfloat16)
    checks.add(
        f"{name}: layerwise casting, fp8",
        through,
        half,
        lambda pipe: pipe.to(device).transformer.enable_layerwise_casting(*casting),
        drawn(half, device),
        limit=ROUGH,
    )

    network = copy.deepcopy(family.network).to(device)
    for dtype, backends in (BACKENDS if checks.cuda else {torch.float32: ["_native_flash"]}).items():
        with attention_backend("_native_math"):
            expected = derived(network, family.inputs, dtype)
        ways = {"as it comes": lambda network: None}
        ways |= {name: partial(type(network).set_attention_backend, backend=name) for name in backends}
        for way, set_up in ways.items():
            title, limit = f"{name}: attention {way}, {dtype}", EXACT if dtype == torch.float32 else HALF
            checks.add(title, derived_as, network, set_up, family.inputs, dtype, expected, limit=limit)


def compiled(checks: Checks, name: str, family: Family) -> None:
    device, load, images = checks.device, family.load, drawn(family.load, checks.device)
    whole = {"fullgraph": name == "D2iT"}  # of DC-DiT a graph ends where numbers of tokens are read

    def check(way: str, compile: Callable[[DiffusionPipeline], object]) -> None:
        checks.add(f"{name}: {way}", through, load, lambda pipe: compile(pipe.to(device)), images, limit=EXACT)

    def blocks(network: torch.nn.Module, **options) -> None:
        network.compile_repeated_blocks(fullgraph=True, **options)

    simplest, graphs = {} if checks.cuda else {"backend": "eager"}, {"mode": "reduce-overhead"}
    check("compiled blocks", lambda pipe: blocks(pipe.transformer, **simplest))
    network = copy.deepcopy(family.network).to(device)
    expected, set_up = derived(network, family.inputs, torch.bfloat16), partial(blocks, **simplest)
    title = f"{name}: compiled blocks, output and gradients, {torch.bfloat16}"
    checks.add(title, derived_as, network, set_up, family.inputs, torch.bfloat16, expected, limit=ROUGH)
    check("compiled model", lambda pipe: pipe.transformer.compile(**whole, **simplest))
    if checks.cuda:
        check("compiled blocks, CUDA graphs", lambda pipe: blocks(pipe.transformer, **graphs))
        check("compiled model, CUDA graphs", lambda pipe: pipe.transformer.compile(**whole, **graphs))
    check("compiled decoder", lambda pipe: pipe.vae.decoder.compile(**simplest))


STEPS = {"same": same, "doors": doors, "compiled": compiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--output", type=Path, required=True, help="the file")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # as the benchmarks
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # convolutions take it unless they are told
    checks = Checks(args.device, args.output)
    with tempfile.TemporaryDirectory() as folder:
        for name, family in families(checks.cuda, folder).items():
            STEPS[args.step](checks, name, family)
    if missed := checks.missed():
        sys.exit(f"not as expected: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
