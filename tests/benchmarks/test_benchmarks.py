# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every benchmark can be imported, the cheap ones run in their smallest form, and the table shows what they wrote."""

import importlib
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from script_runs import BENCHMARKS, importing_from
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_d2it import D2iTContentModel, load_preset
from diffusers_d2it.grains import tie
from diffusers_d2it.models.layers import SelfAttention
from diffusers_d2it.models.packed_attention import PackedAttention


SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
SMALLEST = {
    "dit_forward": "--no-compile",
    "refine_net": "--preset content-tiny --batch_size 1 --fine_ratio 0.5",
    "whole_forward": "--preset content-tiny --batch_size 1",
    "window_attention": "--preset content-tiny",
    "packed_chunks": "--preset dcdit-tiny --batch_size 2",
    "chunk_forward": "--preset dcdit-tiny --guided_preset dcdit-tiny --batch_size 1",
    "chunk_training": "--preset dcdit-tiny --batch_size 1",
    "feeding": "--num_images 2",
    "saving": "--preset content-tiny",
    "between_steps": "",
    "pipeline_overhead": "--batch_size 1 --num_inference_steps 1",
}
UNIPC = "UniPCMultistepScheduler"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    with importing_from(BENCHMARKS):
        yield


def test_every_script_imports_and_is_run_by_run():
    scripts = [name for name in SCRIPTS if hasattr(importlib.import_module(name), "measure")]
    assert sorted(importlib.import_module("run").BENCHMARKS) == scripts


@pytest.mark.parametrize("script", SMALLEST)
def test_smallest_form(script, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--repeats", "1", *SMALLEST[script].split()])
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    result = json.loads((tmp_path / f"{script}.json").read_text())
    assert result["title"] and result["settings"]["device"] == "cpu" and result["settings"]["repeats"] == 1
    assert result["claims"] or result["notes"]
    assert all(timing["median"] > 0 for timing in result["milliseconds"].values())
    if script == "between_steps":  # nothing waits and nothing is compiled, whatever the scheduler
        notes = result["notes"]
        assert notes.pop("graphs of the first map") == 2 and len(notes) == 15
        # diffusers sends the coefficients of UniPC to the device and solves for them there
        assert {name for name, number in notes.items() if number} <= {f"{UNIPC}, eager: inside its own step"}


@pytest.mark.parametrize("flags", ["--fine_ratio 0", "--fine_ratio 0.5 2", "--repeats 0", "--threads 0"])
def test_a_flag_out_of_range_is_refused(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["refine_net.py", *flags.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(BENCHMARKS / "refine_net.py"), run_name="__main__")
    assert flags.split()[0] in capsys.readouterr().err


def test_the_table_shows_every_goal(tmp_path, monkeypatch, capsys):
    """Of the device that a goal speaks of; what another device has found is a note and no claim."""
    common, run = importlib.import_module("common"), importlib.import_module("run")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    bench = common.Bench("cpu", threads=1, repeats=1)
    bench.claim("of a CPU", 0.5, 0.25, goal=5)
    bench.claim("of a GPU", 0.5, 0.25, goal=3)
    bench.claim("of none", 0.5, 0.25, at_least=True)
    assert [claim.text for claim in bench.claims] == ["of a CPU", "of none"] and len(bench.notes) == 1
    bench.report("title", {}, common.result_path("window_attention", "cpu"))
    capsys.readouterr()
    run.print_goals()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.strip()[0].isdigit() for line in lines) == len(run.GOALS) == 17
    assert [line.split()[:3] for line in lines if "of a CPU" in line] == [["CPU", "NOT", "REACHED"]]
    assert [line.split()[:2] for line in lines if "of none" in line] == [["CPU", "reached"]]
    assert sum(line.split() == ["GPU", "not", "measured"] for line in lines) == 12


def test_arithmetic_counts_what_a_real_pass_does_and_keeps():
    arithmetic = importlib.import_module("arithmetic")
    config = load_preset("content-tiny") | {"sample_size": 8}
    model = D2iTContentModel(**config).train()
    maps = torch.tensor([[[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]]] * 2)
    storages, inputs = {}, (torch.randn(2, 4, 8, 8), torch.zeros(2), model.prepare_grain_map(maps))
    inputs[0][:] = tie(inputs[0], maps)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    counter = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    attention = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    with hooks, torch.autocast("cpu", torch.bfloat16), counter, attention:
        model(*inputs, torch.zeros(2, dtype=torch.int64))
    with torch.device("meta"):
        without_data = D2iTContentModel(**config)
    macs, kept = arithmetic.kept(without_data, maps)
    assert macs == counter.get_total_flops() / 2
    assert kept == pytest.approx(sum(storage.nbytes() for storage in storages.values()), rel=0.02)


def test_arithmetic_of_runs():
    """More GPUs take as many hours in all; what is sharded shrinks with them, what does not fit is computed again."""
    arithmetic = importlib.import_module("arithmetic")
    counted = {"parameters": 1e9, "gmac": 100.0, "kept_bytes": 2**29, "kept_bytes_checkpointed": 2**25}
    counted |= {"block_parameters": 1e7}
    one, eight, many = (arithmetic.run_of(counted, gpus) for gpus in (1, 8, 64))
    assert one["A100"]["gpu_hours"] == pytest.approx(many["A100"]["gpu_hours"]) and one["traffic_gb"] == 0
    hours = 1_281_167 * 400 * 6 * 100e9 / (0.4 * 312e12) / 3600
    assert one["A100"]["gpu_hours"] == pytest.approx(hours)
    assert [run["images_a_gpu"] for run in (one, eight, many)] == [64, 32, 4]
    assert one["memory_gib"]["DDP"] == pytest.approx((22e9 + 64 * 2**29) / 2**30)
    assert many["memory_gib"]["DDP"] - many["memory_gib"]["FSDP2"] > 18 > eight["traffic_gb"] > 6.9
    larger = arithmetic.run_of(counted | {"kept_bytes": 2**32}, 8)
    assert larger["checkpointing"] and larger["images_a_gpu"] == 32
    assert larger["A100"]["hours"] == pytest.approx(eight["A100"]["hours"] * 4 / 3)


# ---- The kit for a GPU ----


def of_kit(name: str, monkeypatch) -> ModuleType:
    """A script of benchmarks/device, whose run.py is another than that of benchmarks."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location(f"device_{name}", BENCHMARKS / "device" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch, capsys):
    kit = of_kit("run", monkeypatch)
    fails = [sys.executable, "-c", "print('first'); raise SystemExit('no memory')"]
    mine = {"fails": (60, fails), "hangs": (1, ["sh", "-c", "sleep 617 & wait"]), "same": (60, ["true"])}
    monkeypatch.setattr(kit, "steps", lambda device: mine)
    monkeypatch.setattr(kit.common, "RESULTS", None)
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="--only fails hangs$"):
        kit.main()
    found = json.loads((tmp_path / "steps.json").read_text())
    outcomes = ["failed, exit code 1: no memory", "stopped after 1 s", "ok"]
    assert [step["outcome"] for step in found.values()] == outcomes
    assert not any(process.info["cmdline"] == ["sleep", "617"] for process in psutil.process_iter(["cmdline"]))
    assert (tmp_path / "fails.log").read_text().split() == ["first", "no", "memory"]
    assert "not measured" in capsys.readouterr().out  # the table

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "same", "--budget", "1"])
    with pytest.raises(SystemExit, match="--only same$"):
        kit.main()
    left_out = json.loads((tmp_path / "steps.json").read_text())
    assert left_out == found | {"same": {"outcome": "left out: no time left", "seconds": 0.0}}


def test_every_step_names_a_script_that_is_there(monkeypatch):
    kit = of_kit("run", monkeypatch)
    for device in ("cpu", "cuda"):
        for name, (limit, step) in kit.steps(device).items():
            (script,) = (Path(word) for word in step if word.endswith(".py"))
            assert script.is_file() and script.stem in (name, "checks") and limit >= kit.LEAST


def test_checks_of_both_models(tmp_path, monkeypatch):
    """As the command of a step runs them."""
    _, command = of_kit("run", monkeypatch).steps("cpu")["same"]
    command[command.index("--output") + 1] = str(tmp_path / "same.json")
    monkeypatch.setattr(sys, "argv", command[1:])
    of_kit("checks", monkeypatch).main()
    same = json.loads((tmp_path / "same.json").read_text())
    assert same["machine"]["torch"] == torch.__version__
    assert {name.split(":")[0] for name in same["checks"]} == {"D2iT", "DC-DiT", "region_entropy"}
    assert all(check["reached"] and check["difference"] <= check["limit"] for check in same["checks"].values())


def test_checks_of_one_model(tmp_path, monkeypatch):
    kit = of_kit("checks", monkeypatch)
    torch.manual_seed(0)
    family = kit.families(False, str(tmp_path / "pipeline"))["DC-DiT"]
    checks = kit.Checks("cpu", tmp_path / "checks.json")
    kit.doors(checks, "DC-DiT", family)
    kit.compiled(checks, "DC-DiT", family)
    assert len(checks.found["checks"]) == 11 and not checks.missed()

    # An attention that sees other images is noticed, at the widest limit, and so is what fails
    def across_images(self, query, key, value, chunks):
        return SelfAttention.attend(self, query[None], key[None], value[None])[0]

    _, network, inputs, _ = family
    expected = kit.derived(network, inputs, torch.float32)
    mixed = lambda _: monkeypatch.setattr(PackedAttention, "attend", across_images)  # noqa: E731
    checks.add("mixed", kit.derived_as, network, mixed, inputs, torch.float32, expected, limit=kit.ROUGH)
    checks.add("fails", lambda: {}["weights"], limit=1)
    assert checks.missed() == ["mixed", "fails"] == [*json.loads(checks.output.read_text())["checks"]][-2:]
    assert checks.found["checks"]["fails"]["error"] == "KeyError: 'weights'"
