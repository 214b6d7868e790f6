# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Reconstructions against their originals, image by image."""

from importlib.util import find_spec

import numpy as np
import pytest
import skimage.metrics
import torch
from image_files import encode, photo, write_folder
from metric_inputs import crops, refused

from diffusers_d2it.evaluation import (
    ImageSet,
    evaluate,
    evaluate_pairs,
    evaluate_reconstructions,
    reconstruction_scores,
)
from diffusers_d2it.evaluation.images import open_images
from diffusers_d2it.evaluation.reconstruction import reconstruct
from diffusers_d2it.evaluation.results import compare, differences


@pytest.fixture(scope="module")
def originals() -> ImageSet:
    return ImageSet.from_tensor(crops(20, seed=0), "originals")


@pytest.fixture(scope="module")
def noisy(originals) -> ImageSet:
    noise = torch.randint(-20, 21, (20, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return ImageSet.from_tensor((originals[0:20].int() + noise).clamp(0, 255).to(torch.uint8), "noisy")


def scores(samples, reference, metrics, *args, **kwargs) -> dict:
    return {result.metric: result for result in evaluate_pairs(samples, reference, metrics, *args, **kwargs)}


def test_psnr_and_ssim_are_those_of_scikit_image(originals, noisy):
    found = scores(noisy, originals, ["psnr", "ssim"], batch_size=6)
    pairs = [[np.moveaxis(images[i].numpy(), 0, 2) for images in (originals, noisy)] for i in range(20)]
    psnr = [skimage.metrics.peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs]
    assert found["psnr"].value == pytest.approx(np.mean(psnr), rel=1e-5)
    # Edges count here, where scikit-image and torchmetrics continue the images by other rows
    how = {"data_range": 255, "channel_axis": 2, "gaussian_weights": True, "use_sample_covariance": False}
    ssim = [skimage.metrics.structural_similarity(*pair, sigma=1.5, full=True, **how)[1].mean() for pair in pairs]
    assert found["ssim"].value == pytest.approx(np.mean(ssim), abs=1e-3) and found["ssim"].value < 0.95


def test_a_perfect_reconstruction(originals, features):
    found = scores(originals, originals, ["psnr", "ssim", "rfid"], features)
    assert found["psnr"].value == float("inf") and found["ssim"].value == pytest.approx(1)
    assert found["rfd_small"].value == pytest.approx(0, abs=1e-10)


def test_rfid_is_the_fid_between_both_sets(originals, noisy, features):
    rfid = scores(noisy, originals, ["rfid"], features, batch_size=3)["rfd_small"]
    [fid] = evaluate(noisy, originals, ["fid"], features)
    assert rfid.value == pytest.approx(fid.value, rel=1e-6) and rfid.value > 0
    assert rfid.protocol["features"] == fid.protocol["features"]
    assert rfid.protocol["reference"] == fid.protocol["reference"]


def test_pairs_are_those_of_one_order_and_batches_do_not_matter(originals, noisy):
    expected = scores(noisy, originals, ["psnr"])["psnr"].value
    for batch_size in (1, 7):
        found = scores(noisy, originals, ["psnr"], batch_size=batch_size)["psnr"].value
        assert found == pytest.approx(expected, rel=1e-6)
    turned = ImageSet.from_tensor(noisy[0:20].flip(0), "turned")
    assert scores(turned, originals, ["psnr"])["psnr"].value < expected - 5


def test_an_autoencoder_is_scored_by_its_reconstructions_and_in_training_alike(originals, make_vae, features):
    vae, metrics, pixels = make_vae(), ["psnr", "ssim", "rfid"], originals[0:20].float() / 127.5 - 1
    results = evaluate_reconstructions(vae, originals, metrics, features, fine_ratio=0.5, batch_size=20)
    decoded, shares = reconstruct(vae, originals[0:20], 0.5)
    expected = evaluate_pairs(ImageSet.from_tensor(decoded, "decoded"), originals, metrics, features)
    for found, other in zip(results, expected):
        assert found.value == pytest.approx(other.value, rel=1e-6)
        assert found.protocol["reference"] == other.protocol["reference"]
    assert results[3].metric == "fine_share" and results[3].value == pytest.approx(shares.mean().item())

    by_training, in_batches = (reconstruction_scores(vae, pixels.split(n), 0.5, features) for n in (20, 6))
    values = dict(zip([*metrics, "fine_share"], (result.value for result in results))) | {"num_images": 20}
    assert by_training == pytest.approx(values, rel=1e-6)
    assert in_batches == pytest.approx(values, rel=1e-3)  # rounding of the network decides about few values


def test_protocol_of_a_reconstruction(originals, make_vae):
    def psnr(vae, **kwargs):
        return evaluate_reconstructions(vae, originals, ["psnr"], **kwargs)[0]

    a = psnr(make_vae(), fine_ratio=0.5)
    assert a.protocol["samples"]["fine_ratio"] == 0.5 and a.protocol["samples"]["latents"] == "mode of the posterior"
    assert psnr(make_vae()) == a  # its default
    refused("samples.fine_ratio: 0.5 and 1.0", compare, a, psnr(make_vae(), fine_ratio=1.0))
    other = psnr(make_vae(seed=1), fine_ratio=0.5)
    assert compare(a, other) == other.value - a.value
    assert set(differences(a, other)) == {"samples.checkpoint.weights"}
    # Other thresholds make other maps
    calibration = make_vae().config.calibration
    moved = calibration | {"quantiles": [value - 0.5 for value in calibration["quantiles"]]}
    assert set(differences(a, psnr(make_vae(calibration=moved)))) == {"samples.checkpoint.config"}


def test_what_makes_no_pairs_is_refused(originals, noisy, features):
    refused("19 .*few.* 20 .*originals", scores, ImageSet.from_tensor(noisy[0:19], "few"), originals, ["psnr"])
    with pytest.raises(ValueError, match="40x40 .*large.* 32x32 .*originals"):
        scores(ImageSet.from_tensor(crops(20, 0, side=40), "large"), originals, ["psnr"])
    for metrics in (["fid"], ["psnr", "psnr"], []):
        refused("`metrics`.*psnr, ssim, lpips, rfid", scores, noisy, originals, metrics)
    refused("'rfid'.*`features`", scores, noisy, originals, ["rfid"])
    one = ImageSet.from_tensor(crops(1, 0), "one")
    refused("2 images, got 1", scores, one, one, ["rfid"], features)


def test_nothing_to_reconstruct_is_refused(make_vae):
    refused("`batches`", reconstruction_scores, make_vae(), [])


@pytest.mark.skipif(find_spec("lpips") is not None, reason="lpips is installed")
def test_without_lpips_the_way_to_get_it_is_told(originals, noisy):
    refused(r"'lpips'.*`pip install .*\[lpips\]", scores, noisy, originals, ["lpips"])


@pytest.mark.skipif(not (find_spec("lpips") and find_spec("torchvision")), reason="needs the extra lpips")
def test_lpips_is_that_of_its_package(originals, noisy, tmp_path, monkeypatch):
    import lpips
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="'lpips'.*AlexNet.*checkpoints"):
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **kwargs: open("/nowhere/file"))
        scores(noisy, originals, ["lpips"])
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet(weights=None)
    torch.save(alexnet.state_dict(), tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    larger, noise = crops(6, seed=0, side=64), torch.randint(0, 9, (6, 3, 64, 64), dtype=torch.uint8)
    sets = [ImageSet.from_tensor(images, "images") for images in ((larger // 2) + noise, larger)]
    found = scores(*sets, ["lpips"], batch_size=4)["lpips"]
    pixels = [images[0:6].float() / 127.5 - 1 for images in sets]
    with torch.no_grad():
        expected = lpips.LPIPS(net="alex", verbose=False).eval()(*pixels)
    assert found.value == pytest.approx(expected.mean().item(), rel=1e-5) and found.value > 0
    assert found.protocol["features"]["name"] == "alex" and len(found.protocol["features"]["digest"]) == 64


# ---- Pairs of files ----


def pictures(*names: str) -> dict[str, bytes]:
    """Photographs as files; which one it is stands before the ending."""
    return {name: encode(photo(int(name.split(".")[-2][-1]))) for name in names}


ORIGINALS = pictures("0.png", "1.png", "10/2.png", "cafe\u0301 3.png")


@pytest.mark.parametrize(
    "reconstructions",
    [
        pictures("0.png", "1.png", "10/2.png", "caf\u00e9 3.png"),
        pictures("1.bmp", "10/2.webp", "0.tiff", "cafe\u0301 3.png"),
        dict(reversed(ORIGINALS.items())),
    ],
)
@pytest.mark.parametrize("resolution", [None, 64])
def test_files_are_paired_by_their_names(tmp_path, reconstructions, resolution):
    samples = open_images(write_folder(tmp_path / "samples", reconstructions))
    reference = open_images(write_folder(tmp_path / "reference", ORIGINALS), resolution)
    [result] = evaluate_pairs(samples, reference, ["ssim"], batch_size=3)
    assert result.value == pytest.approx(1) and result.protocol["samples"]["paired"] == "by name"


@pytest.mark.parametrize(
    "files, named",
    [
        (pictures("0.png", "1.png", "10/2.png"), "3"),
        (pictures("0.png", "1.png", "10/2.png", "10/3.png"), "10/3"),
        (pictures("0.png", "1.png", "10/2.png", "cafe\u0301 3.png", "extra4.png"), "extra4"),
        (ORIGINALS | pictures("1.bmp"), "1"),
    ],
)
def test_files_without_a_partner_are_named(tmp_path, files, named):
    samples = open_images(write_folder(tmp_path / "samples", files))
    reference = open_images(write_folder(tmp_path / "reference", ORIGINALS))
    for one, other in ((samples, reference), (reference, samples)):
        refused(f"(samples|reference).*{named}", evaluate_pairs, one, other, ["psnr"])


@pytest.mark.parametrize("resolution", [None, 64])  # a data set would leave them out
@pytest.mark.parametrize("metric", ["ssim", "psnr", "rfid"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_reconstructions_that_cannot_be_used_are_named(tmp_path, features, resolution, metric, batch_size):
    # Folders have 2 before 10, data sets after it: pairs are read in another order than that of the set
    files = pictures("0.png", "2.png") | {"10/1.webp": b""}
    samples = open_images(write_folder(tmp_path / "samples", files), resolution)
    reference = open_images(write_folder(tmp_path / "reference", pictures("0.png", "2.png", "10/1.png")), 64)
    message = "of samples .*: .*10/1.webp: "
    refused(message, evaluate_pairs, samples, reference, [metric], features, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_an_original_that_is_left_out_leaves_out_its_pair(tmp_path, batch_size):
    samples = open_images(write_folder(tmp_path / "samples", ORIGINALS))
    files = ORIGINALS | {"0.png": b"", "1.png": b"<html>"}
    reference = open_images(write_folder(tmp_path / "reference", files), 64)
    [result] = evaluate_pairs(samples, reference, ["ssim"], batch_size=batch_size)
    assert result.value == pytest.approx(1)
    assert {result.protocol[part]["num_images"] for part in ("samples", "reference")} == {2}
    assert result.protocol["reference"]["num_left_out"] == 2


def test_images_that_are_no_files_are_paired_in_order(tmp_path):
    samples = open_images(write_folder(tmp_path, ORIGINALS))
    others = ImageSet.from_tensor(samples[:4], "tensor")
    [result] = evaluate_pairs(samples, others, ["ssim"])
    assert result.value == pytest.approx(1) and result.protocol["samples"]["paired"] == "in order"
