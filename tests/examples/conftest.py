# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""One tiny run of each script, shared by the tests: eight photographs of eight classes, 32 pixels, five steps.

folder -> dvae -> cache -> grain -> d2it
folder -> kl_cache -> dcdit
"""

from pathlib import Path

import pytest
from script_runs import STEPS, call, call_train


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A photograph in each of eight class sub-folders, 64x64."""
    root = tmp_path_factory.mktemp("data") / "photos"
    call("photo_crops.py", "--output_dir", root, "--resolution", 64, "--crops", 1)
    return root


@pytest.fixture(scope="session")
def dvae_arguments(folder) -> list:
    """The discriminator joins at the fourth step; a preset or a start is still to be named."""
    return ["--train_data_dir", folder, "--perceptual_weight", 0, "--gan_start_step", 3]


@pytest.fixture(scope="session")
def dvae(dvae_arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "dvae"
    call_train("train_dvae.py", output, STEPS, *dvae_arguments, "--preset", "dvae-tiny", "--report_to", "tensorboard")
    return output


@pytest.fixture(scope="session")
def cache(folder, dvae, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "cache"
    flags = ["--train_data_dir", folder, "--vae", dvae / "vae", "--resolution", 32, "--output_dir", output]
    call("cache_latents.py", *flags)
    return output


@pytest.fixture(scope="session")
def grain_arguments(cache, dvae) -> list:
    arguments = ["--latent_cache", cache, "--preset", "grain-tiny", "--vae", dvae / "vae"]
    return [*arguments, "--gradient_accumulation_steps", 3, "--gradient_checkpointing"]


@pytest.fixture(scope="session")
def grain(grain_arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "grain"
    call_train("train_grain.py", output, STEPS, *grain_arguments)
    return output


@pytest.fixture(scope="session")
def d2it_arguments(cache, dvae, grain) -> list:
    """A preset or a start is still to be named."""
    return ["--latent_cache", cache, "--vae", dvae / "vae", "--grain", grain, "--fine_ratio", 0.3, 0.8]


@pytest.fixture(scope="session")
def d2it(d2it_arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "d2it"
    call_train("train_d2it.py", output, STEPS, *d2it_arguments, "--preset", "content-tiny")
    return output


@pytest.fixture(scope="session")
def autoencoder_kl(make_autoencoder_kl, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("models") / "autoencoder_kl"
    make_autoencoder_kl().save_pretrained(output)
    return output


@pytest.fixture(scope="session")
def kl_cache(folder, autoencoder_kl, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "kl_cache"
    flags = ["--train_data_dir", folder, "--vae", autoencoder_kl, "--resolution", 32, "--output_dir", output]
    call("cache_latents.py", *flags)
    return output


@pytest.fixture(scope="session")
def dcdit_arguments(kl_cache, autoencoder_kl) -> list:
    """A preset or a start is still to be named. Means of these budgets are none of them."""
    arguments = ["--latent_cache", kl_cache, "--vae", autoencoder_kl, "--report_to", "tensorboard"]
    return [*arguments, "--budget_warmup_steps", 2, "--budgets", 0.1, 0.3, 0.6, 1]


@pytest.fixture(scope="session")
def dcdit_start(make_dcdit, tmp_path_factory) -> Path:
    """Of ten classes. It keeps about two cells of five, and a new one hardly any."""
    output = tmp_path_factory.mktemp("models") / "dcdit"
    make_dcdit().save_pretrained(output)
    return output


@pytest.fixture(scope="session")
def dcdit(dcdit_arguments, dcdit_start, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "dcdit"
    call_train("train_dcdit.py", output, STEPS, *dcdit_arguments, "--init_from", dcdit_start)
    return output
