# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Every benchmark can be imported, the cheap ones run in their smallest form, and the table shows what they wrote."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
SMALLEST = {
    "dit_forward": "--no-compile",
    "refine_net": "--preset content-tiny --batch_size 1 --fine_ratio 0.5",
    "whole_forward": "--preset content-tiny --batch_size 1",
    "window_attention": "--preset content-tiny",
    "packed_chunks": "--preset dcdit-tiny --batch_size 2",
    "chunk_forward": "--preset dcdit-tiny --guided_preset dcdit-tiny --batch_size 1",
    "chunk_training": "--preset dcdit-tiny --batch_size 1",
    "pipeline_overhead": "--batch_size 1 --num_inference_steps 1",
}


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The modules of the folder, importable by their names as its scripts import them."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


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
    assert result["claims"] and all(timing["median"] > 0 for timing in result["milliseconds"].values())


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
