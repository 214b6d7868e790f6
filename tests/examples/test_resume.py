# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Runs of several processes, and what does not belong together is refused.

That an interrupted run ends in the state of one that was not: tests/faults/test_interrupted_runs.py
"""

import json
from functools import partial

import launched_script
import pytest
import torch
from safetensors.torch import load_file
from script_runs import (
    SHARDED_PROCESSES,
    call,
    call_train,
    in_processes,
    logged,
    run,
    together,
    training_flags,
)

from diffusers_d2it import load_preset
from diffusers_d2it.training import draw_budget


@pytest.mark.parametrize(
    "name, own",
    [
        ("dvae", ["--preset", "dvae-tiny", "--gan_weight", 0]),  # a weight is of the images of a pass
        ("grain", ["--preset", "grain-tiny"]),
        ("d2it", ["--preset", "content-tiny"]),
        ("dcdit", ["--ratio_group_size", 1]),
    ],
)
def test_a_run_is_the_same_with_any_number_of_processes_and_passes(name, own, request, tmp_path):
    """Four images an update: of one process, and of two, then of four, then of one in two passes.

    Samples that are drawn on the way change nothing.
    """
    script, arguments = f"train_{name}.py", [*request.getfixturevalue(f"{name}_arguments"), *own]
    arguments += ["--init_from", request.getfixturevalue("dcdit_start")] if name == "dcdit" else []
    arguments += ["--report_to", "tensorboard", "--checkpointing_steps", 20, "--ema_decay", 0.5]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    batch = ["--gradient_accumulation_steps", 1, "--train_batch_size"]
    call_train(script, whole, 20, *arguments, *batch, 4)
    arguments += ["--validation_steps", 1000]
    for steps, processes in ((7, 2), (13, 4)):
        resume = ["--resume_from_checkpoint", "latest"] if parts.exists() else []
        flags = [*arguments, *batch, 4 // processes, *resume]
        in_processes(partial(call_train, script, parts, steps, *flags), processes)
    resume = ["--resume_from_checkpoint", "latest", "--gradient_accumulation_steps", 2, "--train_batch_size", 2]
    call_train(script, parts, 20, *arguments, *resume)

    expected, found = (logged(folder)["loss"] for folder in (whole, parts))
    assert sorted(found) == list(range(1, 21)) and found == pytest.approx(expected, rel=1e-6)
    weights = "checkpoint-20/model_ema/diffusion_pytorch_model.safetensors"
    torch.testing.assert_close(load_file(parts / weights), load_file(whole / weights), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="checkpoint-20.*batch 4.* 6"):
        call_train(script, parts, 21, *arguments, *resume, "--gradient_accumulation_steps", 3)


@pytest.mark.parametrize(
    "name, result, is_launched", [("grain", "grain_model", True), ("dcdit", "pipeline/transformer", False)]
)
def test_a_sharded_run_of_two_processes_ends_in_the_weights_of_one(name, result, is_launched, request, tmp_path):
    """One is launched, as users do; the other, spared that, by what the launcher tells its processes."""
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    script, arguments = f"train_{name}.py", request.getfixturevalue(f"{name}_arguments")
    if name == "dcdit":  # whose number of tokens is another one in every pass and process
        arguments = [*arguments, "--init_from", request.getfixturevalue("dcdit_start"), "--ratio_group_size", 1]
    call_train(script, alone, 4, *arguments)
    words = ["sharded", script, *training_flags(sharded, 4), *arguments, "--train_batch_size", 1]
    if is_launched:
        run(launched_script.__file__, *words, launch=SHARDED_PROCESSES, ACCELERATE_USE_CPU="true")
    else:
        together(partial(launched_script.main, *map(str, words)), sharded=True)
    weights = "diffusion_pytorch_model.safetensors"
    for part in ("model", "model_ema"):
        of_one, of_sharded = (load_file(run / "checkpoint-4" / part / weights) for run in (alone, sharded))
        if name == "grain":
            torch.testing.assert_close(of_one, of_sharded, rtol=1e-5, atol=1e-7)
            continue
        # AdamW makes much of the rounding of a gradient that is almost zero: compared is what four updates moved
        start = load_file(request.getfixturevalue("dcdit_start") / weights)
        differing, moved = (
            torch.cat([(of_one[key] - other[key]).flatten() for key in start if key != "label_embed.weight"]).norm()
            for other in (of_sharded, start)
        )
        assert differing < 1e-4 * moved
    torch.testing.assert_close(load_file(sharded / result / weights), of_sharded, rtol=0, atol=0)
    if name == "dcdit":  # means over processes: both have drawn the same
        budgets = {step + 1: draw_budget([0.1, 0.3, 0.6, 1.0], 2, 7, step) for step in range(4)}
        assert [logged(one)["budget"] for one in (alone, sharded)] == [pytest.approx(budgets)] * 2


# ---- What is refused ----


def test_budgets_must_be_those_of_the_checkpoint(dcdit, dcdit_arguments, dcdit_start, tmp_path):
    arguments = [*dcdit_arguments, "--init_from", dcdit_start, "--resume_from_checkpoint", dcdit / "checkpoint-4"]
    with pytest.raises(ValueError, match="checkpoint-4.*budgets.*0.3.*0.4"):
        call_train("train_dcdit.py", tmp_path, 6, *arguments, "--budgets", 0.1, 0.4, 0.6, 1)


def test_a_preset_may_be_named_otherwise_but_be_no_other(grain, grain_arguments, tmp_path):
    config, file = load_preset("grain-tiny"), tmp_path / "grain.json"
    resume = ["--preset", file, "--resume_from_checkpoint", grain / "checkpoint-4"]
    file.write_text(json.dumps(config | {"num_layers": config["num_layers"] + 1}))
    with pytest.raises(ValueError, match="checkpoint-4.*num_layers"):
        call_train("train_grain.py", tmp_path / "run", 5, *grain_arguments, *resume)
    file.write_text(json.dumps(config))
    call_train("train_grain.py", tmp_path / "run", 5, *grain_arguments, *resume)


@pytest.mark.parametrize("of_photos, flag", [(False, ["--seed", 8]), (True, ["--num_classes", 9])])
def test_flags_that_change_the_result_must_be_those_of_the_checkpoint(
    grain, dvae, grain_arguments, folder, tmp_path, of_photos, flag
):
    arguments = ["--train_data_dir", folder, "--preset", "grain-tiny", "--vae", dvae / "vae"]
    arguments = [*arguments, "--gradient_accumulation_steps", 3] if of_photos else grain_arguments
    with pytest.raises(ValueError, match=f"checkpoint-4.*{flag[0].removeprefix('--')}.* {flag[1]}"):
        call_train(
            "train_grain.py", tmp_path, 6, *arguments, "--resume_from_checkpoint", grain / "checkpoint-4", *flag
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (["--resolution", 64], "resolution"),
        (["--push_to_hub"], "hub_model_id"),
        (["--objective", "flow_matching", "--learn_sigma"], "`learn_sigma`"),
        (["--init_from", "nowhere"], "nowhere"),
        (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint`.*nowhere"),
        (["--preset", "dvae-tiny"], "dvae-tiny.*D2iTContentModel"),
        (["--report_to", "carrier_pigeon"], "carrier_pigeon"),
    ],
)
def test_arguments_that_contradict_one_another_are_named(d2it_arguments, tmp_path, change, message):
    arguments = ["--output_dir", tmp_path, "--max_train_steps", 1, "--resolution", 32, "--train_batch_size", 2]
    with pytest.raises((ValueError, OSError), match=message):
        call("train_d2it.py", *arguments, *d2it_arguments, *change)
