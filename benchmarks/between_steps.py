# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Does sampling wait for the device, or compile anything, between its steps?

    python benchmarks/between_steps.py --device cuda     # content-xl, bf16, compiled by inductor
    python benchmarks/between_steps.py                   # content-tiny on the meta device, blocks traced by dynamo

The pipeline itself is called, with every scheduler, and watched from the end of its first step to the end of its last.
On a GPU torch reports what makes the host wait for it. On the meta device a tensor has a shape and no data: reading a
value raises, and what is sent there is counted. A scalar of the CPU in an operator is no traffic: a kernel takes it as
an argument. Counted apart is what a scheduler does inside its own step. Graphs are counted over the steps of a call,
and over calls with different grain maps; on the CPU the backend does nothing, so only dynamo's guards matter.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import diffusers
import torch
from common import Bench, main
from peers import quiet, random_pipeline
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_d2it import D2iTContentModel, D2iTPipeline, load_preset
from diffusers_d2it.grains import GrainLayout


KINDS = ("DDIM", "DDPM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "FlowMatchEulerDiscrete")
SCHEDULERS = [f"{kind}Scheduler" for kind in KINDS]
NUM_STEPS = 6  # multistep schedulers are at their full order from the third on
NUM_MAPS = 20
BATCH_SIZE = 2


def host_traffic(
    pipe: D2iTPipeline, grain_map: torch.Tensor, num_inference_steps: int = NUM_STEPS, **options
) -> tuple[list[str], list[str]]:
    """What the host reads from the device, or sends to it, in the steps after the first, for a map (B, h, w).

    The pipeline is on a GPU, or on the meta device by `move_to_meta`, where to read a value is a RuntimeError.
    Returned are the traffic of the denoising loop, and that inside `scheduler.step`.
    """
    device = pipe.transformer.device
    watch = _watch_meta if device.type == "meta" else _watch_cuda
    found, of_scheduler = [], []
    kind = type(pipe.scheduler)  # of which each call makes a copy of its own
    scheduler_step = kind.step

    @functools.wraps(scheduler_step)  # its signature is asked for
    def step(*arguments, **keywords):
        before = len(found)
        result = scheduler_step(*arguments, **keywords)
        of_scheduler.extend(found[before:])
        del found[before:]
        return result

    def on_step_end(pipe: D2iTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if step == 0:
            stack.enter_context(watch(found))
            torch.ones(2).to(device)
            if not found:
                raise RuntimeError("a copy to the device went unnoticed.")
            found.clear()
        if step == num_inference_steps - 1:
            raise _LoopIsOver
        return {}

    with patch.object(kind, "step", step), ExitStack() as stack:
        try:
            _call(pipe, grain_map, num_inference_steps, on_step_end, **options)
        except _LoopIsOver:  # what follows, decoding to images, has to wait
            pass
    return found, of_scheduler


class _LoopIsOver(Exception):
    pass


@contextmanager
def _watch_cuda(found: list[str]) -> Iterator[None]:
    """Note where torch says that the host waits for the GPU."""

    def note(message: Warning | str, *_) -> None:
        if "synchroniz" in str(message):
            found.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _watch_meta(found: list[str]) -> Iterator[None]:
    """Note what would make the host wait if the meta device were a GPU; a read raises by itself."""
    with _Operators() as operators, _Constructors() as constructors:
        operators.found = constructors.found = found
        yield


class _Operators(TorchDispatchMode):
    """Notes operators that move data between the CPU and the meta device, or check on the host what they computed."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_meta for tensor in (*given, *made)):
            name = operator.name()
            copies = name.startswith(("aten::_to_copy", "aten::copy_"))
            from_host = any(not tensor.is_meta and (copies or tensor.ndim > 0) for tensor in given)
            to_host = any(not tensor.is_meta for tensor in made)
            if from_host or to_host or name == "aten::_linalg_check_errors":
                self.found.append(name)
        return output


class _Constructors(TorchFunctionMode):
    """Notes tensors made on the meta device from values of the host, which never reach an operator there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and output.is_meta:
            if not isinstance(args[0], torch.Tensor):  # a tensor that is copied is seen as an operator
                self.found.append(function.__name__)
        return output


def move_to_meta(pipe: D2iTPipeline, grain_map: torch.Tensor) -> D2iTPipeline:
    """Move a pipeline to the meta device, where only layouts of this map (B, h, w) can be had: they read values."""
    pipe.to("meta")
    prepare = pipe.transformer.prepare_grain_map

    def prepare_for_meta(on_meta: torch.Tensor) -> GrainLayout:
        return prepare(grain_map.repeat(len(on_meta) // len(grain_map), 1, 1)).to("meta")

    pipe.transformer.prepare_grain_map = prepare_for_meta
    return pipe


def count_graphs(
    pipe: D2iTPipeline, grain_maps: list[torch.Tensor], num_inference_steps: int = NUM_STEPS, **options
) -> list[list[int]]:
    """Graphs that exist after every step of a call for each map (B, h, w); the blocks of the pipeline are compiled."""
    torch._dynamo.reset()
    counters.clear()
    graphs: list[list[int]] = []

    def on_step_end(pipe: D2iTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        graphs[-1].append(counters["stats"]["unique_graphs"])
        return {}

    for grain_map in grain_maps:
        graphs.append([])
        _call(pipe, grain_map, num_inference_steps, on_step_end, output_type="latent", **options)
    return graphs


def different_maps(count: int, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Random maps of two grains and of all shares; the third has no fine region, the fourth no coarse one."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(count, generator=generator)
    shares[2:4] = torch.tensor([0.0, 1.0])
    return [(torch.rand(shape, generator=generator) < share).long() for share in shares]


def _call(pipe: D2iTPipeline, grain_map: torch.Tensor, num_inference_steps: int, on_step_end: Callable, **options):
    labels = None if pipe.transformer.config.num_classes is None else list(range(len(grain_map)))
    options |= {"num_inference_steps": num_inference_steps, "callback_on_step_end": on_step_end}
    pipe(labels, grain_map=grain_map, **({"guidance_interval": (0.0, 1.0)} | options))  # of one kind of step


def make_scheduler(name: str):
    """A scheduler of diffusers by name, for a model that predicts noise on DDPM's schedule, or a flow."""
    cls = getattr(diffusers, name)
    if name.startswith("FlowMatch"):
        return cls()
    beta = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear", "clip_sample": False}
    return cls.from_config(diffusers.DDPMScheduler(**beta).config)


def build_pipeline(device: str) -> D2iTPipeline:
    """A pipeline without a grain model: content-xl in bf16 on a GPU, content-tiny on the CPU."""
    large, small = ("content-xl", "dvae-f8f16", torch.bfloat16), ("content-tiny", "dvae-tiny", torch.float32)
    size, vae, dtype = small if device == "cpu" else large
    return random_pipeline(D2iTContentModel(**load_preset(size)).eval(), vae, None, device, dtype)


def count_all_traffic(bench: Bench, pipe: D2iTPipeline, grain_map: torch.Tensor, form: str) -> int:
    """Traffic of the loop over all schedulers; that of each is noted."""
    total = 0
    for name in SCHEDULERS:
        # A pipeline of its own: one keeps to the kind, diffusion or flow, that it was made with
        of_kind = quiet(D2iTPipeline(**pipe.components | {"scheduler": make_scheduler(name)}))
        of_loop, of_scheduler = host_traffic(of_kind, grain_map)
        bench.note(f"{name}, {form}: host traffic a step", len(of_loop) / (NUM_STEPS - 1))
        bench.note(f"{name}, {form}: inside its own step", len(of_scheduler) / (NUM_STEPS - 1))
        total += len(of_loop)
    return total


def measure(bench: Bench) -> str:
    torch.manual_seed(0)
    pipe = build_pipeline(bench.device)
    side = pipe.transformer.config.sample_size // pipe.transformer.patch_size
    grain_maps = different_maps(NUM_MAPS, (BATCH_SIZE, side, side))
    pipe.transformer.compile_repeated_blocks(**({} if bench.cuda else {"backend": "eager"}))
    graphs = count_graphs(pipe, grain_maps)
    traffic = count_all_traffic(bench, pipe, grain_maps[0], "compiled") if bench.cuda else 0
    pipe = build_pipeline(bench.device)
    pipe = pipe if bench.cuda else move_to_meta(pipe, grain_maps[0])
    traffic += count_all_traffic(bench, pipe, grain_maps[0], "eager")

    bench.note("graphs of the first map", graphs[0][-1])
    found = {
        "host traffic between steps, outside of the schedulers": traffic,
        "graphs compiled between the steps of a call": sum(call[-1] - call[0] for call in graphs),
        f"graphs compiled for maps 3 to {NUM_MAPS}": graphs[-1][-1] - graphs[1][-1],
    }
    for text, number in found.items():
        bench.claim(text, number, 0, goal=9)
    return f"Between the steps of sampling, content-{'xl on a GPU' if bench.cuda else 'tiny on the meta device'}"


if __name__ == "__main__":
    main(measure)
