# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint reaches on a labelled set of real images: the figures of its model card.

    python reproduction/bundled_checkpoint.py --data tiny-imagenet-20

`--data` is a folder that datasets.load_dataset reads, with splits train and validation and columns image and label.

- PSNR of the autoencoder on the validation images at fine ratios 0, 0.3, 0.5, 0.7, 1.
- Cross-entropy of the grain model on validation maps, by noise level, against that of the marginal: how often each
  region is fine in the training images of the class.
- Share of guided samples that a small classifier labels correctly. The classifier is trained here on the real training
  images and its accuracy on the real validation images is reported beside it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from classifier import BATCH, accuracy, class_targets, load_split, trained_classifier
from report import RESULTS
from study import write_json

from diffusers_d2it import D2iTPipeline, bundled_checkpoint
from diffusers_d2it.evaluation.reconstruction import psnr
from diffusers_d2it.grains import fine_share
from diffusers_d2it.losses import grain_loss


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from common import describe_machine  # noqa: E402


RATIOS = (0.0, 0.3, 0.5, 0.7, 1.0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with splits train and validation")
    parser.add_argument("--checkpoint", default=bundled_checkpoint(), help="folder of a D2iTPipeline")
    parser.add_argument("--output", type=Path, default=RESULTS / "bundled_checkpoint.json", help="JSON file")
    parser.add_argument("--samples_per_class", type=int, default=25, help="generated images of each class")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 2.5, 4.0], help="to sample at")
    parser.add_argument("--classifier_epochs", type=int, default=12, help="passes over the training images")
    parser.add_argument("--classifier", type=Path, help="file that keeps the classifier between runs")
    parser.add_argument("--seed", type=int, default=0, help="of the classifier and the samples")
    return parser.parse_args()


@torch.no_grad()
def reconstruction(pipe: D2iTPipeline, pixels: torch.Tensor) -> dict[str, dict[str, float]]:
    """Mean PSNR in dB, and the share of fine regions, at each ratio."""
    result = {}
    for ratio in RATIOS:
        scores, shares = [], []
        for batch in pixels.split(BATCH):
            encoded = pipe.vae.encode(batch, fine_ratio=ratio)
            scores.append(psnr(batch, pipe.vae.decode(encoded.latent_dist.mode()).sample))
            shares.append(fine_share(encoded.grain_map, pipe.vae.num_grains))
        result[str(ratio)] = {"psnr_db": torch.cat(scores).mean().item(), "share": torch.cat(shares).mean().item()}
    return result


@torch.no_grad()
def grain_cross_entropy(pipe: D2iTPipeline, train: tuple, validation: tuple, seed: int) -> dict[str, float]:
    """Nats per region on validation maps: of the per-class marginal, and of the grain model by noise level."""
    model, scheduler = pipe.grain_model, pipe.grain_scheduler
    train_maps, maps = (
        torch.cat([pipe.grain_map_from_image((batch + 1) / 2) for batch in pixels.split(BATCH)])
        for pixels in (train[0], validation[0])
    )
    k = model.config.num_grains
    frequency = {}
    for label in train[1].unique().tolist():
        counts = F.one_hot(train_maps[train[1] == label], k).float().sum(dim=0) + 1  # (h, w, k), Laplace's rule
        frequency[label] = counts / counts.sum(dim=-1, keepdim=True)
    probability = torch.stack([frequency[label] for label in validation[1].tolist()])
    marginal = -probability.gather(-1, maps[..., None]).log().mean().item()

    generator = torch.Generator().manual_seed(seed)
    result = {"per_class_marginal": marginal}
    levels = {f"t={t}": torch.full((len(maps),), t) for t in (999, 750, 500, 250)}
    levels["uniform t"] = torch.randint(1000, (len(maps),), generator=generator)
    for name, timesteps in levels.items():
        state = model.state_from_grain_map(maps, k)
        noised = scheduler.add_noise(state, torch.randn(state.shape, generator=generator), timesteps)
        losses = [
            grain_loss(model(*inputs[:3]).logits, inputs[3])["loss"] * len(inputs[0])
            for inputs in zip(*(x.split(BATCH) for x in (noised, timesteps, validation[1], maps)))
        ]
        result[name] = (torch.stack(losses).sum() / len(maps)).item()
    return result


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    pipe = D2iTPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    resolution = pipe.vae.config.sample_size
    train, validation = (load_split(args.data, split, resolution) for split in ("train", "validation"))
    classes = sorted(pipe.id2label)
    result = {
        "machine": describe_machine("cpu"),
        "protocol": {key: value for key, value in vars(args).items() if key not in ("data", "checkpoint", "output")}
        | {"scheduler": type(pipe.scheduler).__name__, "train": len(train[0]), "validation": len(validation[0])},
        "reconstruction": reconstruction(pipe, validation[0]),
        "grain_cross_entropy_nats": grain_cross_entropy(pipe, train, validation, args.seed),
    }
    print(json.dumps(result, indent=2), flush=True)

    targets = class_targets(validation[1], classes)
    classifier = trained_classifier(args.classifier, train, classes, args.classifier_epochs, args.seed)
    with torch.no_grad():
        decoded = [pipe.vae(batch).sample.clamp(-1, 1) for batch in validation[0].split(BATCH)]
    result["classifier"] = {
        "accuracy_on_real_validation": accuracy(classifier, validation[0], targets),
        "accuracy_on_reconstructions": accuracy(classifier, torch.cat(decoded), targets),
        "chance": 1 / len(classes),
    }

    labels = torch.tensor(classes).repeat_interleave(args.samples_per_class)
    for scale in args.guidance_scales:
        generator = torch.Generator().manual_seed(args.seed)
        options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": scale, "output_type": "pt"}
        start = time.perf_counter()
        images = [pipe(part.tolist(), generator=generator, **options).images for part in labels.split(BATCH)]
        seconds = (time.perf_counter() - start) / len(labels)
        share = accuracy(classifier, 2 * torch.cat(images) - 1, class_targets(labels, classes))
        result["classifier"][f"samples_labelled_correctly_at_guidance_{scale:g}"] = share
        result["classifier"][f"seconds_per_sample_at_guidance_{scale:g}"] = round(seconds, 4)
        print(json.dumps(result["classifier"], indent=2), flush=True)

    write_json(args.output, result)


if __name__ == "__main__":
    main(parse_args())
