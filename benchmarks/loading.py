# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Host memory of `from_pretrained`, over the size of the file, and its time; beside it diffusers' own loading.

    python benchmarks/loading.py --preset content-xl

Each turn is a fresh process that loads a model as bfloat16 and then reads every weight once. Two peaks are told apart:
that of resident memory beyond what the imports hold, which counts the mapped pages of the file, and that of anonymous
memory, which is what cannot be given back when memory runs short. The claim is for the first. diffusers' DiT of the
same width and depth is loaded without the checks of this library; both files hold random weights in bfloat16. A
float32 file of the same model, cast while it is loaded, is noted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import Claim, Timing, parse_args, report
from diffusers import DiTTransformer2DModel
from torch import nn

from diffusers_d2it import D2iTContentModel, load_preset


MOST_TURNS = 3  # a turn starts a process, and memory repeats to a few MiB
MIB = 2**20

# Prints KiB of the peaks of resident and anonymous memory, seconds of loading, and the sum of all weights.
LOAD = """
import json, sys, threading, time
from pathlib import Path
import torch
from diffusers import DiTTransformer2DModel
from diffusers_d2it import D2iTContentModel
torch.set_num_threads(int(sys.argv[3]))
clock = time.thread_time if sys.argv[3] == "1" else time.perf_counter  # as in common.py, without the thread below
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":")))
def watch():
    while not done.wait(0.002):
        anonymous.append(status("RssAnon"))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before, anonymous, done = status("VmRSS"), [status("RssAnon")], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
start = clock()
model = {"d2it": D2iTContentModel, "diffusers": DiTTransformer2DModel}[sys.argv[1]].from_pretrained(
    sys.argv[2], dtype=torch.bfloat16
)
seconds = clock() - start
parts = (part for weight in model.state_dict().values() for part in weight.flatten().split(2**18))
total = sum(part.sum(dtype=torch.float64).item() for part in parts)
assert all(weight.dtype == torch.bfloat16 for weight in model.state_dict().values())
done.set()
watcher.join()
print(json.dumps([status("VmHWM") - before, max(anonymous) - anonymous[0], seconds, total]))
"""


def random_model(cls: type, config: dict, dtype: torch.dtype) -> torch.nn.Module:
    """A model of random weights that are exact in bfloat16, without a copy in another dtype."""
    with torch.device("meta"):
        model = nn.Module.to(cls(**config), dtype)  # that of diffusers warns of modules that need float32: none here
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


def measure(
    cls: type, config: dict, dtype: torch.dtype, turns: int, threads: int
) -> tuple[float, list[tuple[float, ...]]]:
    """MiB of a model's file, and of every turn MiB of the two peaks and the seconds of loading.

    Raises:
        RuntimeError: other weights were loaded than were saved.
    """
    model = random_model(cls, config, dtype)
    parts = (part for weight in model.state_dict().values() for part in weight.flatten().split(2**18))
    expected = sum(part.sum(dtype=torch.float64).item() for part in parts)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / MIB
        kind = "d2it" if cls is D2iTContentModel else "diffusers"
        command = [sys.executable, "-c", LOAD, kind, folder, str(threads)]
        measured = []
        for _ in range(turns):
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            resident, anonymous, seconds, total = json.loads(output.splitlines()[-1])
            if total != expected:
                raise RuntimeError(f"the loaded weights add up to {total}, the saved ones to {expected}.")
            measured.append((resident / 1024, anonymous / 1024, seconds))
    return size, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="content-xl", help="preset of the content model")
    args = parse_args(parser, "loading")
    if args.device != "cpu" or not Path("/proc/self/clear_refs").is_file():
        parser.error("this is about the CPU, and reads /proc of Linux.")

    torch.manual_seed(0)
    preset = load_preset(args.preset)
    sides = {
        "D2iTContentModel": (D2iTContentModel, preset, torch.bfloat16),
        "diffusers' DiT": (DiTTransformer2DModel, same_size_dit(preset), torch.bfloat16),
        "D2iTContentModel, float32 file": (D2iTContentModel, preset, torch.float32),
    }
    timings, claims, notes = {}, [], {}
    for name, (cls, config, dtype) in sides.items():
        size, measured = measure(cls, config, dtype, min(args.repeats, MOST_TURNS), args.threads)
        resident, anonymous, seconds = zip(*measured)
        times = [1e3 * second for second in seconds]
        timings[f"{name}, from_pretrained"] = Timing(min(times), statistics.median(times), max(times))
        notes[f"{name}, MiB of the file"] = size
        notes[f"{name}, resident peak / file"] = max(resident) / size
        notes[f"{name}, anonymous peak / file"] = max(anonymous) / size
        if name == "D2iTContentModel":
            goal = 12 if args.preset == "content-xl" else None
            claims.append(Claim("peak host memory / file", max(resident) / size, 1.1, goal=goal))

    report(args, f"Loading {args.preset} as bfloat16 in a fresh process", timings, claims, notes)


if __name__ == "__main__":
    main()
