# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint is found, what a run must find again, and what its logs say."""

from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_d2it.training.checkpoints import Checkpoints, check_output_dir, find_checkpoint
from diffusers_d2it.training.steps import LossMeans, draw_fine_ratio
from diffusers_d2it.training.training_data import check_resolution, identity_of, load_autoencoder


def flags(**changed) -> Namespace:
    args = {"output_dir": "out", "resume_from_checkpoint": None, "checkpoints_total_limit": None, "streaming": False}
    args |= {"lr_scheduler": "constant_with_warmup", "max_train_steps": 10, "seed": 0}
    return Namespace(**(args | changed))


def test_latest_is_the_highest_step_and_strangers_do_not_count(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-final", "checkpoint-11.old", ".staging-12"):
        (tmp_path / name).mkdir()
    args = flags(output_dir=str(tmp_path), resume_from_checkpoint="latest")
    assert find_checkpoint(args) == tmp_path / "checkpoint-10"
    assert find_checkpoint(flags()) is None
    with pytest.raises(ValueError, match="checkpoint-final is not a folder named checkpoint-<step>"):
        find_checkpoint(flags(resume_from_checkpoint=str(tmp_path / "checkpoint-final")))
    with pytest.raises(ValueError, match="no checkpoint in .*nowhere"):
        find_checkpoint(flags(output_dir=str(tmp_path / "nowhere"), resume_from_checkpoint="latest"))


def test_a_folder_with_anything_in_it_is_refused_with_the_way_out(tmp_path):
    check_output_dir(flags(output_dir=str(tmp_path)))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt: pass another folder, or remove it\."):
        check_output_dir(flags(output_dir=str(tmp_path)))
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest to continue"):
        check_output_dir(flags(output_dir=str(tmp_path)))
    check_output_dir(flags(output_dir=str(tmp_path), resume_from_checkpoint="latest"))


@pytest.mark.parametrize("schedule, fixed", [("constant", False), ("constant_with_warmup", False), ("cosine", True)])
def test_the_length_of_a_run_is_fixed_where_its_schedule_ends_with_it(make_grain_model, schedule, fixed):
    model = make_grain_model()
    checkpoints = Checkpoints(
        Accelerator(cpu=True),
        flags(lr_scheduler=schedule),
        model,
        EMAModel(model.parameters()),
        identity={"data": "x"},
    )
    assert ("max_train_steps" in checkpoints.flags) == fixed
    assert checkpoints.flags["data"] == "x" and checkpoints.flags["num_processes"] == 1
    assert all(isinstance(value, (int, float, str, bool)) for value in checkpoints.scalars().values())


def test_identity_changes_with_weights_thresholds_and_data_and_not_with_the_folder(make_vae):
    data = Namespace(fingerprint="images")
    vae, same, other = make_vae(), make_vae(), make_vae(seed=1)
    same.register_to_config(_name_or_path="elsewhere")
    assert identity_of(data, vae) == identity_of(data, same) != identity_of(data, other)
    shifted = dict(vae.config.calibration)
    shifted["quantiles"] = [quantile + 0.5 for quantile in shifted["quantiles"]]
    assert identity_of(data, make_vae(calibration=shifted)) != identity_of(data, vae)
    assert identity_of(Namespace(fingerprint="others"), vae) != identity_of(data, vae)


def test_logged_losses_are_means_over_the_forward_passes_of_an_update():
    means = LossMeans(Accelerator(cpu=True))
    for loss in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(loss, requires_grad=True), "kl": torch.tensor(2 * loss)})
    assert means.take() == {"loss": 3.0, "kl": 6.0}
    means.add({"loss": torch.tensor(5.0)})
    assert means.take() == {"loss": 5.0}


def test_fine_ratio_of_a_batch():
    generator = torch.Generator().manual_seed(0)
    assert draw_fine_ratio(None, generator) is None
    assert draw_fine_ratio([0.4], generator) == 0.4
    draws = [draw_fine_ratio([0.2, 0.6], generator) for _ in range(1000)]
    assert 0.2 <= min(draws) < 0.21 and 0.59 < max(draws) <= 0.6
    assert sum(draws) / 1000 == pytest.approx(0.4, abs=0.02)


def test_an_autoencoder_that_is_not_there_or_does_not_suit_is_named(make_vae, tmp_path):
    make_vae().save_pretrained(tmp_path / "run" / "vae")
    with pytest.raises(ValueError, match="did you mean .*vae"):
        load_autoencoder(str(tmp_path / "run"), 32)
    with pytest.raises(ValueError, match="neither a folder nor a name of the Hub"):
        load_autoencoder(str(tmp_path / "nowhere" / "vae"), 32)
    with pytest.raises(ValueError, match="--resolution must be a multiple of 8, the region size, got 60"):
        load_autoencoder(str(tmp_path / "run" / "vae"), 60)
    check_resolution(64, 16)
