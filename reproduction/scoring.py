# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""How good a trained run is: the Frechet distance of its samples to the training photographs, in named features.

The samples of two arms with one seed have the same labels, the same noise and, where maps are not what is compared,
the same maps; another seed has others. Features are those of the classifier of classifier.py, trained on the same
photographs, or those of --features. True maps are those of validation images, which are not in the reference.
"""

import json
import math
import statistics
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, cached_property
from multiprocessing import get_context
from unittest.mock import patch

import torch
from arms import ARMS
from classifier import Classifier, accuracy, class_targets, load_split, trained_classifier
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from study import Study, write_json
from train_arm import independent_cells

from diffusers_d2it import D2iTContentModel, D2iTGrainModel, D2iTPipeline, load_sampler
from diffusers_d2it.evaluation import (
    Drawing,
    FeatureExtractor,
    ModuleFeatures,
    denoising_error_by_grain,
    frechet_distance,
    load_features,
    reconstruct,
)
from diffusers_d2it.evaluation.scores import FeatureStatistics
from diffusers_d2it.grains import GrainLayout
from diffusers_d2it.objectives import make_objective
from diffusers_d2it.pixels import from_uint8, to_uint8


BATCH = 50


def sampler_of(arm: str) -> UniPCMultistepScheduler:
    """UniPC for what an arm predicts."""
    return load_sampler("unipc", make_objective(ARMS[arm].objective, None, False).sampling_scheduler())


class Scorer:
    """Scores the runs of a study."""

    def __init__(self, study: Study):
        self.study = study

    @cached_property
    def photographs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Training images, uint8 (N, 3, R, R), and labels (N,)."""
        pixels, labels = load_split(self.study.data, "train", self.study.preset.resolution)
        return to_uint8(pixels), labels

    @cached_property
    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images that nothing was trained on."""
        pixels, labels = load_split(self.study.data, "validation", self.study.preset.resolution)
        return to_uint8(pixels), labels

    @cached_property
    def classes(self) -> list[int]:
        """Labels of the photographs, in the order of the classifier's logits."""
        return self.photographs[1].unique().tolist()

    @cached_property
    def classifier(self) -> Classifier:
        """Trained on the training images, kept in the work folder."""
        images, labels = self.photographs
        train = from_uint8(images.to(self.study.device)), labels
        file = self.study.work_dir / "classifier.pt"
        return trained_classifier(file, train, self.classes, self.study.preset.classifier_epochs, seed=0)

    @cached_property
    def features(self) -> FeatureExtractor:
        """The classifier's pooled features, 128 of them, or those asked for."""
        if self.study.features is not None:
            return load_features(self.study.features, self.study.weights).to(self.study.device)
        return ModuleFeatures(self.classifier.features, "classifier").to(self.study.device)

    def statistics(self, images: torch.Tensor) -> FeatureStatistics:
        """Mean and covariance of the features of uint8 images (N, 3, R, R)."""
        found = None
        for batch in images.split(BATCH):
            pool = self.features(batch.to(self.study.device))["pool"]
            found = found or FeatureStatistics(pool.shape[1])
            found.update(pool.cpu())
        return found

    @cached_property
    def reference(self) -> FeatureStatistics:
        """Of the training images."""
        return self.statistics(self.photographs[0])

    def distance(self, images: torch.Tensor, reference: FeatureStatistics | None = None) -> float:
        """Frechet distance of uint8 images to the training images, or to others."""
        found, reference = self.statistics(images), reference or self.reference
        return frechet_distance(*found.moments, *reference.moments)

    @cache  # noqa: B019  lives as long as the script
    def reconstructions(self, split: str, fine_ratio: float) -> torch.Tensor:
        """Images of a split through the autoencoder at a ratio of the data set, uint8."""
        images, _ = self.photographs if split == "train" else self.validation
        return torch.cat([reconstruct(self.study.vae, part, fine_ratio)[0].cpu() for part in images.split(BATCH)])

    @cache  # noqa: B019
    def reconstructed_reference(self, fine_ratio: float) -> FeatureStatistics:
        """Of the training images through the autoencoder: what a perfect content model would draw."""
        return self.statistics(self.reconstructions("train", fine_ratio))

    def labelled_correctly(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of uint8 images that the classifier gives their label."""
        device, classifier = self.study.device, self.classifier.to(self.study.device)
        pixels = from_uint8(images.to(device))
        return accuracy(classifier, pixels, class_targets(labels, self.classes).to(device))

    def drawing(self, seed: int, labels: torch.Tensor | None = None) -> Drawing:
        """Without guidance, as in the paper's ablations; by default for the labels of the samples."""
        labels = self.labels if labels is None else labels
        steps = self.study.preset.sampling_steps
        return Drawing(self.pipeline, labels, steps, guidance_scale=1.0, batch_size=BATCH, seed=seed)

    @cached_property
    def labels(self) -> torch.Tensor:
        """Of the samples: every class as often, to one."""
        classes = torch.tensor(self.classes)
        return classes.repeat(-(-self.study.preset.num_samples // len(classes)))[: self.study.preset.num_samples]

    @cache  # noqa: B019
    def chosen(self, seed: int) -> torch.Tensor:
        """For every sample the number of a validation image of its class, each as often as any other, to one."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.zeros_like(self.labels)
        for label in self.classes:
            images, samples = ((labels == label).nonzero().flatten() for labels in (self.validation[1], self.labels))
            rounds = -(-len(samples) // len(images))
            order = torch.cat([images[torch.randperm(len(images), generator=generator)] for _ in range(rounds)])
            chosen[samples] = order[: len(samples)]
        return chosen

    def true_maps(self, images: torch.Tensor, fine_ratio: float) -> torch.Tensor:
        """Maps of uint8 images, at a ratio of the data set."""
        maps = [self.pipeline.grain_map_from_image(part / 255, fine_ratio).cpu() for part in images.split(BATCH)]
        return torch.cat(maps)

    @cached_property
    def pipeline(self) -> D2iTPipeline:
        """The autoencoder of all runs; content and grain models are exchanged."""
        run = self.study.train("d2it", self.study.preset.seeds[0])
        folder, grain = run / f"checkpoint-{self.study.preset.steps}", self.study.grain_folder(0.5)
        pipe = D2iTPipeline(
            vae=self.study.vae,
            grain_model=D2iTGrainModel.from_pretrained(grain, subfolder="grain_model"),
            transformer=D2iTContentModel.from_pretrained(folder, subfolder="model_ema"),
            scheduler=sampler_of("d2it"),
            grain_scheduler=DDIMScheduler.from_pretrained(grain, subfolder="grain_scheduler"),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.study.device)

    @cache  # noqa: B019
    def maps(self, source: str, fine_ratio: float, seed: int) -> torch.Tensor:
        """Maps of one of `MAP_SOURCES` for the samples, at a ratio of the data set."""
        if fine_ratio in (0.0, 1.0):
            source = "coarse" if fine_ratio == 0 else "fine"
        elif source == "predicted":
            model = D2iTGrainModel.from_pretrained(self.study.grain_folder(fine_ratio), subfolder="grain_model")
            self.pipeline.register_modules(grain_model=model.to(self.study.device))
        true = self.true_maps(self.validation[0][self.chosen(seed)], fine_ratio)
        return self.drawing(seed).maps(source, true)

    def noise_error(self, arm: str) -> list[float | None]:
        """Mean squared error of the loaded model's prediction on the cells of each grain, on validation images.

        The maps are those of the images at the arm's fine ratio, the noise is tied and the same for all arms: arms of
        one ratio can be compared, those of different ratios cannot, nor those that were not trained on tied noise or
        that predict something else.
        """
        images, labels = self.validation
        maps = self.true_maps(images, ARMS[arm].fine_ratio)
        errors = denoising_error_by_grain(self.drawing(0, labels), images, maps)
        means = [statistics.mean(of_grain) for of_grain in zip(*errors.values())]
        return [None if math.isnan(mean) or not ARMS[arm].tied_noise else mean for mean in means]

    def score(self, arm: str, seed: int, steps: int, source: str) -> dict:
        """All figures of a run, kept in the work folder."""
        file = self.study.work_dir / "scores" / f"{arm}-{seed}-{steps}-{source}.json"
        if not file.exists():
            folder = self.study.train(arm, seed) / f"checkpoint-{steps}"
            transformer = D2iTContentModel.from_pretrained(folder, subfolder="model_ema").to(self.study.device)
            self.pipeline.register_modules(transformer=transformer, scheduler=sampler_of(arm))
            maps = self.maps(source, ARMS[arm].fine_ratio, seed)
            with nullcontext() if ARMS[arm].tied_noise else untied_sampling():
                images = self.drawing(seed).images(maps)
            score = {"frechet_distance": self.distance(images)}
            reconstructed = self.reconstructed_reference(ARMS[arm].fine_ratio)
            score["distance_to_reconstructions"] = self.distance(images, reconstructed)
            score["labelled_correctly"] = self.labelled_correctly(images, self.labels)
            score["noise_error"] = self.noise_error(arm)
            write_json(file, score)
        return json.loads(file.read_text())


@contextmanager
def untied_sampling():
    """Sample as if no code were tied: every cell goes its own way, and codes are averaged before they are decoded."""
    prepare, decode, average = D2iTPipeline.prepare_grain_map, D2iTPipeline.decode_latents, GrainLayout.average
    maps = []

    def remembered(*arguments, **options):
        maps.append(prepare(*arguments, **options))
        return maps[-1]

    def averaged(pipe, latents, output_type="pil"):
        layout = GrainLayout.from_grain_map(maps.pop(), pipe.vae.num_grains)
        return decode(pipe, average(layout, latents, grain=0), output_type)

    with independent_cells(), patch.multiple(D2iTPipeline, prepare_grain_map=remembered, decode_latents=averaged):
        yield


@cache
def _scorer_of_process(arguments: tuple) -> Scorer:
    return Scorer(Study(Namespace(**dict(arguments))))


def _run(function: Callable, arguments: tuple, job: tuple) -> dict:
    return function(_scorer_of_process(arguments), *job)


def map_jobs(function: Callable[..., dict], scorer: Scorer, args: Namespace, jobs: list[tuple]) -> dict[tuple, dict]:
    """function(scorer, *job) of each job, `--jobs` processes at a time."""
    _ = scorer.classifier  # trained once, not by each process
    if args.jobs == 1:
        return {job: function(scorer, *job) for job in jobs}
    arguments = tuple((name, value) for name, value in vars(args).items() if not isinstance(value, list))
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(_run, [function] * len(jobs), [arguments] * len(jobs), jobs)))


def score_all(scorer: Scorer, args, jobs: list[tuple[str, int, int, str]]) -> dict[tuple, dict]:
    """Scores of (arm, seed, steps, map source); trains what is missing first."""
    jobs = list(dict.fromkeys(jobs))
    scorer.study.train_all(list(dict.fromkeys(arm for arm, *_ in jobs)))
    for arm, *_, source in jobs:
        if source == "predicted" and 0 < ARMS[arm].fine_ratio < 1:
            scorer.study.grain_folder(ARMS[arm].fine_ratio)
    return map_jobs(Scorer.score, scorer, args, jobs)
