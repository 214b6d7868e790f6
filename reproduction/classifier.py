# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A small classifier of real photographs: its features measure generated ones where Inception is out of reach.

Fréchet distances in its features compare the models of one run with one another. They are no FID, and no number of
another paper can be set beside them.
"""

import random
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_d2it.data import to_pixels
from diffusers_d2it.files import durable_file


BATCH = 100


def load_split(path: str, split: str, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, R, R) in [-1, 1] and labels (N,) of a split of a data set with columns image and label."""
    images = datasets.load_dataset(path, split=split)
    pixels = torch.stack([to_pixels(row["image"], resolution) for row in images])
    return pixels, torch.tensor(images["label"])


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


class Classifier(nn.Module):
    """Four strided residual stages, about 0.7M parameters: (B, 3, R, R) in [-1, 1] -> logits (B, num_classes)."""

    def __init__(self, num_classes: int):
        super().__init__()
        width = 32
        layers = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(3):
            layers += [ResidualBlock(width), nn.Conv2d(width, min(2 * width, 128), 3, stride=2, padding=1)]
            width = min(2 * width, 128)
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers, ResidualBlock(width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def train_classifier(pixels: torch.Tensor, targets: torch.Tensor, num_classes: int, epochs: int) -> Classifier:
    """AdamW with one cycle of the learning rate; images flipped and shifted by up to 8 pixels."""
    model = Classifier(num_classes).to(pixels.device).train()
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
        flip = torch.rand(len(x), device=x.device) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        loss = F.cross_entropy(model(x), targets[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, pixels: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of images (N, 3, R, R) in [-1, 1] that are labelled correctly."""
    predicted = torch.cat([model(batch).argmax(dim=1) for batch in pixels.split(BATCH)])
    return (predicted == targets).float().mean().item()


def trained_classifier(
    file: Path | None, train: tuple[torch.Tensor, torch.Tensor], classes: list[int], epochs: int, seed: int
) -> Classifier:
    """The classifier kept in `file`; if there is none it is trained on pixels and labels, and kept if a file is named.

    `classes` are the labels in the order of the logits; weights, order and augmentation are those of the seed.
    """
    if file is not None and file.exists():
        classifier = Classifier(len(classes))
        classifier.load_state_dict(torch.load(file, weights_only=True))
        return classifier.eval()
    random.seed(seed)
    torch.manual_seed(seed)
    classifier = train_classifier(train[0], class_targets(train[1], classes).to(train[0].device), len(classes), epochs)
    if file is not None:
        with durable_file(file) as staged:
            torch.save(classifier.state_dict(), staged)
    return classifier


def class_targets(labels: torch.Tensor, classes: list[int]) -> torch.Tensor:
    """Position of each label among the classes."""
    index = {label: i for i, label in enumerate(classes)}
    return torch.tensor([index[label] for label in labels.tolist()])
