# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Host memory of `from_pretrained`, over the size of the file, and its time; beside it diffusers' own loading.

    python benchmarks/loading.py --preset content-xl

Each turn is a fresh process that loads a model as bfloat16 and then reads every weight once. Two peaks are told apart:
that of resident memory beyond what the imports hold, which counts the mapped pages of the file, and that of anonymous
memory, which is what cannot be given back when memory runs short. The claim is for the first. diffusers' DiT of the
same width and depth is loaded without the checks of this library; both files hold random weights in bfloat16. A
float32 file of the same model, cast while it is loaded, is noted.
"""

import tempfile
import threading
import time
from pathlib import Path

import torch
from common import Bench, Flag, forget_peak_memory, in_fresh_process, main, process_memory
from diffusers import DiTTransformer2DModel, ModelMixin
from peers import cast

from diffusers_d2it import D2iTContentModel, load_preset


MOST_TURNS = {"cpu": 3}  # a turn starts a process, and memory repeats to a few MiB


def load(cls: type[ModelMixin], folder: str, threads: int) -> tuple[float, float, float, float]:
    """MiB of the peaks of resident and of anonymous memory, milliseconds of loading, and the sum of all weights."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter  # as of a `Bench`, without the thread below
    forget_peak_memory()
    before, anonymous, done = process_memory("VmRSS"), [process_memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            anonymous.append(process_memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = clock()
    model = cls.from_pretrained(folder, dtype=torch.bfloat16)
    milliseconds, total = 1e3 * (clock() - start), sum_of(model)
    done.set()
    watcher.join()
    if any(weight.dtype != torch.bfloat16 for weight in model.state_dict().values()):
        raise RuntimeError("not all weights were loaded as bfloat16.")
    return process_memory("VmHWM") - before, max(anonymous) - anonymous[0], milliseconds, total


def sum_of(model: torch.nn.Module) -> float:
    """Of all weights, each of which is read once."""
    parts = (part for weight in model.state_dict().values() for part in weight.flatten().split(2**18))
    return sum(part.sum(dtype=torch.float64).item() for part in parts)


def random_model(cls: type[ModelMixin], config: dict, dtype: torch.dtype) -> ModelMixin:
    """A model of random weights that are exact in bfloat16, without a copy in another dtype."""
    with torch.device("meta"):
        model = cast(cls(**config), "meta", dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, dtype=torch.bfloat16) / 8)
    return model


def same_size_dit(preset: dict) -> dict:
    """Configuration of diffusers' DiT of the width and depth of a content preset, both parts of it together."""
    return {
        "num_attention_heads": preset["num_attention_heads"],
        "attention_head_dim": preset["attention_head_dim"],
        "num_layers": preset["num_layers"] + preset["num_refine_layers"],
        "sample_size": preset["sample_size"],
        "num_embeds_ada_norm": preset["num_classes"],
    }


def measure_side(bench: Bench, name: str, cls: type[ModelMixin], config: dict, dtype: torch.dtype) -> float:
    """Peak of resident memory over the size of the file of a model, which is loaded in processes of their own."""
    model = random_model(cls, config, dtype)
    expected = sum_of(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 2**20
        threads = bench.threads
        turns = [in_fresh_process(load, cls, folder, threads, threads=threads) for _ in range(bench.repeats)]
    resident, anonymous, milliseconds, totals = zip(*turns)
    if set(totals) != {expected}:
        raise RuntimeError(f"the loaded weights add up to {totals}, the saved ones to {expected}.")
    bench.record(f"{name}, from_pretrained", milliseconds)
    bench.note(f"{name}, MiB of the file", size)
    bench.note(f"{name}, resident peak / file", max(resident) / size)
    bench.note(f"{name}, anonymous peak / file", max(anonymous) / size)
    return max(resident) / size


def measure(bench: Bench, preset: str) -> str:
    torch.manual_seed(0)
    config = load_preset(preset)
    ours = measure_side(bench, "D2iTContentModel", D2iTContentModel, config, torch.bfloat16)
    measure_side(bench, "diffusers' DiT", DiTTransformer2DModel, same_size_dit(config), torch.bfloat16)
    measure_side(bench, "D2iTContentModel, float32 file", D2iTContentModel, config, torch.float32)
    bench.claim("peak host memory / file", ours, 1.1, goal=12 if preset == "content-xl" else None)
    return f"Loading {preset} as bfloat16 in a fresh process"


if __name__ == "__main__":
    preset = Flag("content-xl", "preset of the content model")
    main(measure, devices=("cpu",), most_turns=MOST_TURNS, preset=preset)
