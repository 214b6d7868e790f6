# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint reaches on a labelled set of real images: the figures of its model card.

    python benchmarks/bundled_checkpoint.py --data tiny-imagenet-20 --output benchmarks/results/bundled_checkpoint.json

`--data` is a folder that datasets.load_dataset reads, with splits train and validation and columns image and label.

- PSNR of the autoencoder on the validation images at fine ratios 0, 0.3, 0.5, 0.7, 1.
- Cross-entropy of the grain model on validation maps, by noise level, against that of the marginal: how often each
  region is fine in the training images of the class.
- Share of guided samples that a small classifier labels correctly. The classifier is trained here on the real training
  images and its accuracy on the real validation images is reported beside it.
"""

import argparse
import json
import random
import time
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from common import describe_machine
from torch import nn

from diffusers_d2it import D2iTPipeline, bundled_checkpoint
from diffusers_d2it.data.images import to_pixels
from diffusers_d2it.grains import fine_share
from diffusers_d2it.losses import grain_loss
from diffusers_d2it.training.reconstruction import psnr


RATIOS = (0.0, 0.3, 0.5, 0.7, 1.0)
BATCH = 100


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with splits train and validation")
    parser.add_argument("--checkpoint", default=bundled_checkpoint(), help="folder of a D2iTPipeline")
    parser.add_argument("--output", default="benchmarks/results/bundled_checkpoint.json", help="JSON file")
    parser.add_argument("--samples_per_class", type=int, default=25, help="generated images of each class")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps")
    parser.add_argument(
        "--guidance_scales", type=float, nargs="+", default=[1.0, 2.5, 4.0], help="scales to sample at"
    )
    parser.add_argument("--classifier_epochs", type=int, default=12, help="passes over the training images")
    parser.add_argument("--classifier", help="file that keeps the classifier between runs")
    parser.add_argument("--seed", type=int, default=0, help="of the classifier and the samples")
    return parser.parse_args()


def load_split(path: str, split: str, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, R, R) in [-1, 1] and labels (N,) of a split."""
    images = datasets.load_dataset(path, split=split)
    pixels = torch.stack([to_pixels(row["image"], resolution) for row in images])
    return pixels, torch.tensor(images["label"])


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder and grain model
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Classifier
# ---------------------------------------------------------------------------------------------------------------------


class Classifier(nn.Sequential):
    """Four strided residual stages; about 0.7M parameters."""

    def __init__(self, num_classes: int, width: int = 32):
        layers = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(3):
            layers += [ResidualBlock(width), nn.Conv2d(width, min(2 * width, 128), 3, stride=2, padding=1)]
            width = min(2 * width, 128)
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        layers += [ResidualBlock(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
        super().__init__(*layers, nn.Linear(width, num_classes))


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


def train_classifier(pixels: torch.Tensor, targets: torch.Tensor, num_classes: int, epochs: int) -> Classifier:
    """AdamW with one cycle of the learning rate; images flipped and shifted by up to 8 pixels."""
    model = Classifier(num_classes).train()
    batch = 64
    steps = epochs * (len(pixels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(pixels) // batch) == 0:
            order = torch.randperm(len(pixels))
        chosen = order[(step * batch) % (len(pixels) // batch * batch) :][:batch]
        x = F.pad(pixels[chosen], (8, 8, 8, 8), mode="reflect")
        top, left = random.randrange(17), random.randrange(17)
        x = x[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]]
        flip = torch.rand(len(x)) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        loss = F.cross_entropy(model(x), targets[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, pixels: torch.Tensor, targets: torch.Tensor) -> float:
    predicted = torch.cat([model(batch).argmax(dim=1) for batch in pixels.split(BATCH)])
    return (predicted == targets).float().mean().item()


def main(args: argparse.Namespace) -> None:
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    pipe = D2iTPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    resolution = pipe.vae.config.sample_size
    train, validation = (load_split(args.data, split, resolution) for split in ("train", "validation"))
    classes = sorted(pipe.id2label)
    index = {label: i for i, label in enumerate(classes)}
    result = {
        "machine": describe_machine("cpu"),
        "protocol": {key: value for key, value in vars(args).items() if key not in ("data", "checkpoint", "output")}
        | {"scheduler": type(pipe.scheduler).__name__, "train": len(train[0]), "validation": len(validation[0])},
        "reconstruction": reconstruction(pipe, validation[0]),
        "grain_cross_entropy_nats": grain_cross_entropy(pipe, train, validation, args.seed),
    }
    print(json.dumps(result, indent=2), flush=True)

    targets = [torch.tensor([index[label] for label in labels.tolist()]) for _, labels in (train, validation)]
    if args.classifier is not None and Path(args.classifier).exists():
        classifier = Classifier(len(classes))
        classifier.load_state_dict(torch.load(args.classifier, weights_only=True))
        classifier.eval()
    else:
        classifier = train_classifier(train[0], targets[0], len(classes), args.classifier_epochs)
        if args.classifier is not None:
            torch.save(classifier.state_dict(), args.classifier)
    chance = 1 / len(classes)
    result["classifier"] = {"accuracy_on_real_validation": accuracy(classifier, validation[0], targets[1])}
    with torch.no_grad():
        decoded = [pipe.vae(batch).sample.clamp(-1, 1) for batch in validation[0].split(BATCH)]
    result["classifier"]["accuracy_on_reconstructions"] = accuracy(classifier, torch.cat(decoded), targets[1])
    result["classifier"]["chance"] = chance

    labels = [label for label in classes for _ in range(args.samples_per_class)]
    for scale in args.guidance_scales:
        generator = torch.Generator().manual_seed(args.seed)
        start, images = time.perf_counter(), []
        for first in range(0, len(labels), BATCH):
            images.append(
                pipe(
                    labels[first : first + BATCH],
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=scale,
                    generator=generator,
                    output_type="pt",
                ).images
            )
        seconds = (time.perf_counter() - start) / len(labels)
        share = accuracy(classifier, 2 * torch.cat(images) - 1, torch.tensor([index[label] for label in labels]))
        result["classifier"][f"samples_labelled_correctly_at_guidance_{scale:g}"] = share
        result["classifier"][f"seconds_per_sample_at_guidance_{scale:g}"] = round(seconds, 4)
        print(json.dumps(result["classifier"], indent=2), flush=True)

    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
